"""What `benchmarks/reliability.py` tests: one module a promise, each with `run(scale, folder) -> Counts`."""
