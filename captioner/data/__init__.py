"""From pictures and captions as people have them to a dataset, and from that to batches."""
