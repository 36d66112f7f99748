"""Checkpoints of other programs, read and written; conversion and exports."""
