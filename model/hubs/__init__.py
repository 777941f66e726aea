"""Hugging Face and ModelScope: what is asked of them, with an answer or a line within seconds."""
