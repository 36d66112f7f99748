"""The files in a run's folder, and who reads and writes them."""
