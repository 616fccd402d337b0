"""WebDataset shards: writing, index, global order, decoding, loading."""
