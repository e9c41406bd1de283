"""Federation: rounds, who takes part, what is admitted, and how updates become the next global adapter."""
