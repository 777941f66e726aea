"""State dicts, ours and other programs'."""
