"""Records become documents that people want to read: a report of one run, a comparison of several. No torch here."""
