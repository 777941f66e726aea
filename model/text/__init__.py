"""Text to token ids and back: tokenizers of every kind, chat templates, whole characters while streaming."""
