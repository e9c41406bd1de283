"""What is done with a run's adapter afterwards: hand it on, proven to be the same, or let it write."""
