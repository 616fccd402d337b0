"""open_clip models: image tower, loading from any source, student, frozen teachers, LoRA, synced batch norm."""
