"""Data: convert datasets or the built-in phantom to WebDataset shards, split them, and load batches for training."""
