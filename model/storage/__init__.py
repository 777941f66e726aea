"""Bytes on the disk: whole files or none, archives of tensors, GGUF's header. Knows no model."""
