"""The recipe: every key, which settings exclude each other, and the way from a file to a frozen Recipe. No torch."""
