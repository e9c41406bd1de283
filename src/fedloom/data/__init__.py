"""Documents, the splits between them, and the token blocks made of them."""
