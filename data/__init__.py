"""Text to token shards (MDS), and token shards to batches."""
