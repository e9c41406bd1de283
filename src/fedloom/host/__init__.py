"""This machine: files, locks, signals, frames between its processes, and facts about it."""
