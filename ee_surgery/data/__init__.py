"""Feed: any user data as batches, labels, shards over processes."""
