"""What people are shown while a run works, and what is measured of it."""
