"""The next token: sampling, the engine that reads tokens, scores."""
