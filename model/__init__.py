"""The model and everything that the scripts share: stands on its own and imports none of them."""
