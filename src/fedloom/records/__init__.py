"""The run directory: the plan, the records, the state that a run goes on from, their check, an adapter's card."""
