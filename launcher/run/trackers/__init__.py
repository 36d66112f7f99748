"""Trackers that a run also writes to: each in a process of its own, by the client of its library."""
