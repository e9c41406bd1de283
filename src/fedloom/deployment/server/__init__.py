"""Server's side: Flower's SuperLink, nginx before it, questions to clients, and the fleet that they make."""
