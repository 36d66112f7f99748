"""This process: its rank and device, its console, and how the ranks of one machine are started."""
