"""`tritrain doctor`: find what would stop or slow down a run, before it starts."""
