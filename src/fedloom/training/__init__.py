"""Training: a client's job, the engines that carry it out, and the formulas that they share."""
