"""Wires the parts together: one run, a sweep, baselines. Read run.py first."""
