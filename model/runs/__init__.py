"""What a run leaves behind, and how it survives: checkpoints, metrics, status, restarts."""
