"""Flower: the only room that imports flwr."""
