"""Pages for people, made from a run's records: a report of one run, a comparison of several. No torch here."""
