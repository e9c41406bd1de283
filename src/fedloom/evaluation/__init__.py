"""How good an adapter is: its loss on held-out blocks."""
