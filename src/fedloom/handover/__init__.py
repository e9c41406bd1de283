"""Handover: export a finished run's adapter, proven to be the same, or generate text with it."""
