"""Weights and tokenizers in the file formats of other programs, written and read."""
