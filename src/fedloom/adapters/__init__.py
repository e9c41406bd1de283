"""The weights that are trained and exchanged."""
