"""Sends a model to Hugging Face or ModelScope, with a card that says what it was made from."""
