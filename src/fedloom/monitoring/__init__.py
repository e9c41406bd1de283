"""Observers of a run: what people are shown while it works, and what is measured of it."""
