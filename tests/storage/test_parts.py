"""A checkpoint in parts: it comes back whole and is not held twice, and whatever is wrong with a file is one line."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

from model.errors import InputError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.runs.resume import load_checkpoint
from model.storage.archive import load_torch, save_torch
from model.storage.part_names import index_name, is_part, part_name
from model.storage.parts import load_parted, part_names
from model.storage.slices import SlicedTensors, flat_range
from model.weights import load_weights
from tests.conftest import ROOT
from tests.parted import in_dicts, save_in_parts
from tests.reliability.states import resumed_from
from tests.tiny_runs import HUNG, ONE_THREAD, assert_equal
from tests.weights.test_checkpoint import checkpoint_content


@pytest.fixture
def parted(tmp_path):
    """A checkpoint of step 5 in three parts, and one of step 4 that is whole."""
    save_torch(tmp_path / "checkpoint_step_4.pth", checkpoint_content(4))
    path = tmp_path / "checkpoint_step_5.pth"
    return path, save_in_parts(path, checkpoint_content(5), 3)


def refused(path) -> str:
    """The line with which a checkpoint is refused; `--resume` then takes the older one."""
    with pytest.raises(InputError) as raised:
        load_checkpoint(path)
    found, said = resumed_from(path.parent)
    assert found.path.name == "checkpoint_step_4.pth" and said == [f"resume: passed over {raised.value}"]
    assert "\n" not in str(raised.value) and str(raised.value).endswith("use an older file")
    return str(raised.value)


# ------------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("optimizer_type", ["adamw", "muon"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_what_is_read_is_what_one_file_would_hold(tmp_path, ranks, optimizer_type):
    content = checkpoint_content(optimizer_type=optimizer_type)
    content |= {"ema": {name: weight + 1 for name, weight in content["model"].items()}}
    whole, path = tmp_path / "whole.pth", tmp_path / "checkpoint_step_5.pth"
    save_torch(whole, content)
    parts = save_in_parts(path, content, ranks)
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) == ranks and path.stat().st_size < whole.stat().st_size / 2
    assert max(sizes) < whole.stat().st_size / ranks + 30_000  # each writes about as much as the others
    found, expected = in_dicts(load_checkpoint(path)), load_torch(whole)
    assert found.pop("format_version") == expected.pop("format_version") + 1
    assert_equal(found, in_dicts(expected))
    assert part_names(path) == [part.name for part in parts] and part_names(whole) == []


def test_a_tensor_is_put_together_when_it_is_asked_for_and_not_kept(parted):
    model = load_parted(parted[0])["model"]
    assert isinstance(model, SlicedTensors) and "norm.weight" in model and len(model) == len([*model])
    embedding = model["tok_embeddings.weight"]
    assert model["output.weight"] is embedding  # tied: one tensor while somebody has it
    embedding.zero_()
    del embedding
    assert model["tok_embeddings.weight"].any()  # read again


def test_of_a_range_nothing_else_is_read(parted):
    content, whole = load_parted(parted[0]), checkpoint_content(5)
    name, state = "layers.0.feed_forward.w1.weight", [*whole["optimizer"]["state"]][0]
    for saved, keys in ((content["model"], [name]), (content["optimizer"]["state"], (state, "exp_avg"))):
        tensor = saved[name] if len(keys) == 1 else saved[state]["exp_avg"]
        for start, end in ((0, tensor.numel()), (1, 2), (63, 200)):
            assert torch.equal(flat_range(saved, keys, start, end), tensor.view(-1)[start:end])
            assert torch.equal(flat_range(in_dicts(saved), keys, start, end), tensor.view(-1)[start:end])


def test_weights_are_found_in_it(parted):
    path, _ = parted
    weights = load_weights(path)
    assert_equal(weights.state_dict, dict(checkpoint_content(5)["model"]))
    shared = weights.state_dict["output.weight"].data_ptr()
    assert shared == weights.state_dict["tok_embeddings.weight"].data_ptr()


MEMORY = """
import json, sys, threading, time
from pathlib import Path
from model.convert import convert
from model.storage.archive import tensor_bytes
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
source, target = map(Path, sys.argv[1:])
before, most, over = anonymous(), 0, False
def watch():
    global most
    while not over:
        most = max(most, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
size = tensor_bytes(convert(source, target, say=lambda line: None).state_dict)
over = True
watcher.join()
print(json.dumps([(most - before) / size, size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read in /proc")
def test_convert_makes_one_file_of_it_and_holds_it_once(tmp_path):
    config = LMConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=6400, max_seq_len=64)
    model = Transformer(config).state_dict()
    content = checkpoint_content() | {"config": dataclasses.asdict(config), "context": 64, "tokenizer_sha256": None}
    content |= {"model": model, "ema": model, "optimizer": {"state": {}, "param_groups": []}}
    save_in_parts(tmp_path / "checkpoint_step_5.pth", content, 4)
    arguments = [str(tmp_path / "checkpoint_step_5.pth"), str(tmp_path / "one.pth")]
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], cwd=ROOT, env=ONE_THREAD, capture_output=True, timeout=HUNG
    )
    assert result.returncode == 0, result.stderr
    times, size = json.loads(result.stdout)
    assert size > 100e6 and 0.9 < times < 1.4
    assert_equal(load_torch(tmp_path / "one.pth"), dict(model))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.long
def test_every_part_that_is_damaged_is_named(parted):
    path, parts = parted
    for part in (*parts, path):
        content = part.read_bytes()
        for offset in range(0, len(content), len(content) // 8):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << offset % 8
            part.write_bytes(damaged)
            assert part.name in refused(path)
        part.write_bytes(content[: len(content) // 2])
        assert part.name in refused(path)
        part.unlink()
        if part != path:
            assert f"{part}: missing, but checkpoint_step_5.pth needs it" in refused(path)
        part.write_bytes(content)
    assert load_checkpoint(path)["progress"]["step"] == 5


def test_a_part_under_another_ones_name_and_one_of_another_checkpoint_are_noticed(parted, tmp_path):
    path, parts = parted
    kept = [part.read_bytes() for part in parts]
    shutil.copy(parts[1], parts[0])
    assert parts[0].name in refused(path)
    parts[0].write_bytes(kept[0])

    content = checkpoint_content(5)
    content["model"]["norm.weight"].add_(1)  # of the same shapes, so also of the same length
    others = save_in_parts(tmp_path / "other" / path.name, content, 3)
    changed = [
        (part, other) for part, other in zip(parts, others, strict=True) if other.read_bytes() != part.read_bytes()
    ]
    part, other = changed[-1]
    assert other.stat().st_size == part.stat().st_size
    shutil.copy(other, part)
    assert f"{part}: damaged, or not the part that checkpoint_step_5.pth was written with" in refused(path)


def slices_of(content) -> list:
    return content["parts"][1]["slices"]


WRONG = {
    "no list": (lambda c: c.update(parts=[1]), "list of parts cannot be understood"),
    "a part without a name": (lambda c: c["parts"][0].pop("name"), "list of parts cannot be understood"),
    "a part elsewhere": (lambda c: c["parts"][0].update(name="../x.pth"), "list of parts cannot be understood"),
    "a part in another folder": (
        lambda c: c["parts"][0].update(name="../checkpoint_step_5.part-00000-of-00003.pth"),
        "list of parts cannot be understood",
    ),
    "a part too few": (lambda c: c["parts"].pop(), "do not make up '(model|optimizer|ema)/"),
    "a part twice": (lambda c: c["parts"].append(c["parts"][0]), "do not make up"),
    "a slice too few": (lambda c: slices_of(c).pop(), "its tensors are not those that"),
    "a slice of another length": (
        lambda c: slices_of(c).append((*slices_of(c).pop()[:2], 10**12)),
        "its tensors are not those that",
    ),
    "slices of each other's tensor": (
        lambda c: slices_of(c).append(("model/nobody", *slices_of(c).pop()[1:])),
        "do not make up",
    ),
    "a slice that begins below 0": (lambda c: slices_of(c).append(("model/x", -4, 0)), "cannot be understood"),
    "a larger shape": (lambda c: c["model"]["norm.weight"].update(shape=[2**40]), "make up 'model/norm.weight'"),
    "a shape of nobody": (lambda c: c["model"]["norm.weight"].update(shape="16"), "make up 'model/norm.weight'"),
    "another dtype": (lambda c: c["model"]["norm.weight"].update(dtype="float16"), "make up 'model/norm.weight'"),
    "a dtype of nobody": (lambda c: c["model"]["norm.weight"].update(dtype="load"), "make up 'model/norm.weight'"),
    "a key of nobody": (lambda c: c["model"]["norm.weight"].update(in_parts=7), "do not make up 7"),
    "a missing weight": (lambda c: c["model"].pop("norm.weight"), "norm.weight"),
    "a shape turned over": (
        lambda c: c["model"]["layers.0.attention.wk.weight"].update(shape=[16, 8]),
        r"layers.0.attention.wk.weight is \(16, 8\)",
    ),
    "dicts in dicts": (lambda c: c["model"].update(more={"more": {}}), "its tensors cannot be understood"),
    "no state of a parameter": (lambda c: c["optimizer"]["state"].pop(0), "some parameters"),
    "no parts at all": (lambda c: c.pop("parts"), "a tensor expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_index_that_does_not_fit_its_parts_is_refused(parted, case):
    change, expected = WRONG[case]
    path, _ = parted
    content = torch.load(path, weights_only=True)
    change(content)
    save_torch(path, content)
    with pytest.raises(InputError, match=expected) as raised:
        load_checkpoint(path)
    assert len(str(raised.value).splitlines()) == 1
    assert resumed_from(path.parent)[0].path.name == "checkpoint_step_4.pth"


def test_numbers_in_a_part_that_are_not_finite_are_noticed(tmp_path):
    content = checkpoint_content(5)
    content["optimizer"]["state"][0]["exp_avg"].view(-1)[-1] = torch.inf
    save_in_parts(tmp_path / "checkpoint_step_5.pth", content, 2)
    with pytest.raises(InputError, match="numbers that are not finite"):
        load_checkpoint(tmp_path / "checkpoint_step_5.pth")


def test_a_part_alone_is_no_checkpoint(parted):
    path, parts = parted
    for load in (load_checkpoint, load_weights):
        with pytest.raises(InputError, match=f"{parts[1].name}: one part of a checkpoint; give .*{path.name}$"):
            load(parts[1])


# ---------------------------------------------------------------------------------------------------- their names


def test_names_of_parts_are_told_from_those_of_checkpoints(tmp_path):
    part = tmp_path / part_name("checkpoint_step_12", 1, 4)
    assert part.name == "checkpoint_step_12.part-00001-of-00004.pth"
    assert is_part(part) and index_name(part) == "checkpoint_step_12.pth"
    assert index_name(tmp_path / part_name("checkpoint_interrupted_7_1", 0, 2)) == "checkpoint_interrupted.pth"
    for name in ("checkpoint_step_12.pth", "checkpoint_interrupted.pth", "model-00001-of-00004.safetensors"):
        assert not is_part(tmp_path / name)
