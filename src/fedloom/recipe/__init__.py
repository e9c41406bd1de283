"""What was asked for: every key, what excludes what, and how a file becomes a frozen Recipe. No torch here."""
