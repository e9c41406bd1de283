"""The same run over real machines: Flower carries it."""
