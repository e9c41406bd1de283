"""Audit on the owner's machine: what a server could read out of the updates that a client would send, or has sent."""
