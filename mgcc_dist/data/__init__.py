"""Data: public sets and the built-in phantom in, WebDataset shards and split files out, batches for training."""
