"""Feed: whatever the user has as batches, its labels, its shards over processes."""
