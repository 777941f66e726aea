"""What `python -m tests.reliability` tests: one module a promise, each with `run(scale, folder) -> Counts`."""
