"""Evaluation: how good an adapter is, by its loss on held-out blocks, and by what it answers."""
