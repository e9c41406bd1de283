"""Adapters: the weights that are trained and exchanged."""
