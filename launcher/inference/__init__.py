"""Models that only run: loaded whole or sharded, measured, sampled from."""
