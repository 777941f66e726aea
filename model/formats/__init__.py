"""Weights as other programs keep them, read and written: one format a file."""
