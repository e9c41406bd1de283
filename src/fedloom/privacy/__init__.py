"""Privacy: what leaves a client is bounded and accounted. No torch in the accounting."""
