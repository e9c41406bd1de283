"""Runs over real machines: a server and its clients, between which Flower carries the messages."""
