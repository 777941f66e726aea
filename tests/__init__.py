"""The tests, in folders that mirror `model/`."""
