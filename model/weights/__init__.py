"""State dicts, ours and other programs': `load_weights` reads any of them, `save_weights` writes ours."""

from model.weights.load import load_weights
from model.weights.weights import Weights, save_weights

__all__ = ["Weights", "load_weights", "save_weights"]
