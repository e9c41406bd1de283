"""Handover: export a finished run's adapter, proven to be the same, push it to the hub, or generate text."""
