"""The frozen base model: where it comes from, how it is loaded, and losses out of it."""
