"""Stored teacher embeddings: what they depend on, their files, how they are made and read."""
