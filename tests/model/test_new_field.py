"""A field that is added to LMConfig: a part that does not know it refuses it by name (formats: test_convert.py)."""

from dataclasses import dataclass, fields

import pytest
import torch

from model.errors import InputError
from model.generation.decode_step import BatchAttention, DecodeStep
from model.generation.inference_model import InferenceModel
from model.LMConfig import NETWORK_FIELDS, LMConfig
from model.model import Transformer
from model.options import setting
from model.training.settings import ModelSettings
from model.weights import Weights, load_weights, save_weights

TINY = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400, "max_seq_len": 16}


@dataclass
class Windowed(LMConfig):
    """With a field that the program lacks."""

    window: int = setting(0, "tokens that a token sees; 0: all before it", at_least=0)


def model_with(**field) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Windowed(**TINY))
    for name, value in field.items():
        setattr(model.config, name, value)
    return model


def weights_with(**field) -> Weights:
    model = model_with(**field)
    return Weights(model.state_dict(), model.config)


CONSUMERS = {
    "the network": lambda field: Transformer(model_with(**field).config),
    "the inference model": lambda field: InferenceModel(model_with(**field)),
    "the compiled step": lambda field: DecodeStep(model_with(**field)),
    "the compiled attention": lambda field: BatchAttention(model_with(**field).config),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_field_that_a_part_does_not_know_is_refused_by_name(consumer):
    for field, message in (
        ({"window": 8}, r"does not know window 8 \(only 0\)"),
        ({"rope_scaling": "yarn"}, "does not know rope_scaling 'yarn'"),
    ):
        with pytest.raises(InputError, match=f"{consumer} {message}"):
            CONSUMERS[consumer](field)
    CONSUMERS[consumer]({})  # with its default it changes nothing


def test_our_own_file_keeps_the_field_and_a_program_without_it_refuses_it(tmp_path):
    save_weights(tmp_path / "new.pth", weights_with(window=8))
    with pytest.raises(InputError, match="new.json: config.window is unknown"):
        load_weights(tmp_path / "new.pth")


def test_every_field_is_a_setting():
    names = {field.name for field in fields(LMConfig)}
    assert {field.name for field in fields(ModelSettings)} == names >= NETWORK_FIELDS
