"""This machine: files, locks, signals, and facts about it."""
