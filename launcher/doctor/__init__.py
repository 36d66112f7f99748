"""`tritrain doctor`: what would stop or slow down a run, found before it starts."""
