"""What a client does with a job; engines that do it, and the formulas that they share."""
