"""python -m model.convert as a user runs it, and the scripts with weights in another program's format."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml

import inference
import model.convert
import train
from model.dataset import PretrainDataset, hold_out
from model.errors import InputError
from model.LMConfig import LMConfig
from model.options import setting
from model.storage.archive import load_torch
from model.text.tokenization import EMBEDDED_TOKENIZER, load_tokenizer, tokenizer_sha256
from model.weights import load_weights, save_weights
from tests.conftest import ROOT, corpus_lines
from tests.model_shapes import TEXT, assert_same, model_of, weights_of
from utils import run_command

pytest.importorskip("gguf")

PLAIN = {"max_seq_len": 256, "norm_eps": 1e-5, "rope_theta": 10000.0}  # what every format can say
FOREIGN = {"folder": "model", "gguf": "model.gguf"}
QUICK = {
    "batch_size": 4, "max_seq_len": 32, "max_steps": 4, "eval_interval": 2, "eval_steps": 2, "save_interval": 2,
    "log_interval": 1, "dtype": "float32", "device": "cpu", "compile": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tokenizer_folder):
    """A folder with a model of the embedded tokenizer (a.pth) and one with another (own.pth), each in three formats."""
    shop = tmp_path_factory.mktemp("shop")
    for name, weights in {
        "a": weights_of(PLAIN | {"vocab_size": 6400}),
        "own": weights_of(PLAIN, tokenizer_folder),
    }.items():
        save_weights(shop / f"{name}.pth", weights)
        for target in FOREIGN.values():
            model.convert.convert(shop / f"{name}.pth", shop / name / target, say=lambda line: None)
    (shop / "raw.jsonl").write_bytes(b"".join(corpus_lines(40)))
    return shop


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs a script's main in this process, as its command line does: (exit code, stdout, stderr)."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_command(script.main)
        return exit_.value.code or 0, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*arguments, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    """A Python command, in a process of its own."""
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 600, "env": environment} | options
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, **options)


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.long
def test_the_command_prints_what_it_found_and_wrote(shop, tmp_path):
    done = command("-m", "model.convert", shop / "own.pth", "my_model.gguf", "--dtype", "Q8_0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        f"{shop / 'own.pth'}: 80,960 parameters: 2 layers of 64, 4 heads of 16 (2 for keys and values), 300 tokens,"
        " context 256; tie_embeddings, RoPE 10000",
        "my_model.gguf: written for llama.cpp and what builds on it",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["my_model.gguf"]
    assert load_weights(tmp_path / "my_model.gguf").config == load_weights(shop / "own.pth").config


@pytest.mark.long
@pytest.mark.parametrize("name", ["a", "own"])
@pytest.mark.parametrize(
    "target, flags",
    [
        ("b", []), ("b.gguf", []), ("b.bin", []), ("b.pt", []), ("b.pth", []), ("c", ["--to", "meta"]),
        ("c.model", ["--to", "gguf"]),
    ],
    ids=str,
)  # fmt: skip
def test_there_and_back(shop, tmp_path, here, name, target, flags):
    weights, tokenizer = load_weights(shop / f"{name}.pth"), ["--tokenizer_path", EMBEDDED_TOKENIZER]
    if name == "own":
        tokenizer = ["--tokenizer_path", weights.tokenizer_path]
    code, _, error = here(model.convert, shop / f"{name}.pth", tmp_path / target, *flags)
    assert code == 0 and f"{tmp_path / target}: written for" in error
    told = tokenizer if target.endswith((".bin", ".pt")) or "meta" in flags else []  # these name no tokenizer
    code, _, error = here(model.convert, tmp_path / target, tmp_path / "back.pth", *told)
    assert code == 0 and ("the embedded one is used unless you give one" in error) == bool(told)
    back = load_weights(tmp_path / "back.pth")
    if "meta" in flags:
        assert f"max_seq_len {back.config.max_seq_len} is assumed" in error
        back.config.max_seq_len = weights.config.max_seq_len
    assert_same(back, weights)
    described = json.loads((tmp_path / "back.json").read_text(encoding="utf-8"))
    if name == "a":
        assert (described["tokenizer_path"], described["tokenizer_sha256"]) == (None, tokenizer_sha256())
    else:
        assert described["tokenizer_path"] == str(tmp_path / "back_tokenizer")
        there, first = load_tokenizer(tmp_path / "back_tokenizer"), load_tokenizer(weights.tokenizer_path)
        ids = (each(TEXT, add_special_tokens=False).input_ids for each in (there, first))
        assert len({*map(tuple, ids)}) == 1 and there.chat_template == first.chat_template


REFUSED = {
    "one file of safetensors": (["a.pth", "b.safetensors"], "b.safetensors: a folder's name expected"),
    "the target is there": (["own.pth", "own/model"], "own/model exists already; give another name"),
    "a file is there": (["own.pth", "a.pth"], "a.pth exists already; give another name"),
    "the description is there": (["own.pth", "taken.pth"], "taken.json exists already; give another name"),
    "the tokenizer is there": (["own.pth", "taken2.pth"], "taken2_tokenizer exists already; give another name"),
    "an unknown format": (["own.pth", "x", "--to", "onnx"], "argument --to: invalid choice: 'onnx'"),
    "an unknown dtype": (["own.pth", "x", "--dtype", "Q4_K"], "argument --dtype: invalid choice: 'Q4_K'"),
    "Q8_0 for transformers": (["own.pth", "x", "--dtype", "Q8_0"], "--dtype: 'Q8_0' found, F32, F16, BF16 expected"),
    "a dtype that .pth has not": (
        ["own.pth", "x.pth", "--dtype", "F16"],
        "--dtype: 'F16' found, F32 expected for mateconv",
    ),
    "no source": (["nothing.pth", "x"], "nothing.pth: no such file"),
    "an empty folder": (
        ["empty", "x"],
        "empty: no weights in this folder; pretrain_*.pth or best_model.pth (MateConv), config.json (transformers) or",
    ),
    "another tokenizer": (["a.pth", "x", "--tokenizer_path", "own/model"], "a.pth was trained with another tokenizer"),
    "no tokenizer": (["a.pth", "x", "--tokenizer_path", "empty"], "empty holds no tokenizer.json"),
    "a shape": (["own.pth", "x", "--n_heads", "4"], "own.pth: the model's shape comes with the file; n_heads"),
    "no number": (["own.pth", "x", "--n_heads", "four"], "argument --n_heads: invalid int value: 'four'"),
    "a misspelt flag": (["own.pth", "x", "--dtyp", "F16"], "--dtyp: unknown; did you mean --dtype?"),
    "no target": (["own.pth"], "the following arguments are required: target"),
    "a folder in a file": (["own.pth", "own.pth/x.gguf"], "own.pth/x.gguf: cannot be written"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_line(shop, here, monkeypatch, arguments, message):
    monkeypatch.chdir(shop)
    (shop / "empty").mkdir(exist_ok=True)
    (shop / "taken.json").write_text("{}")
    (shop / "taken2_tokenizer").mkdir(exist_ok=True)
    (shop / "taken2_tokenizer" / "tokenizer.json").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in shop.rglob("*")}
    code, output, error = here(model.convert, *arguments)
    errors = [line for line in error.splitlines() if not line.startswith(("own.pth: 80,", "a.pth: 4"))]
    assert (code, output, len(errors)) == (2, "", 1), error
    assert errors[0].startswith("error: ") and message.replace("/", os.sep) in errors[0].replace("/", os.sep)
    assert before == {path: path.is_file() and path.read_bytes() for path in shop.rglob("*")}


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = weights_of({"vocab_size": 6400})
    weights.state_dict["norm.weight"][3] = torch.nan
    save_weights(tmp_path / "a.pth", weights)
    with pytest.raises(InputError, match="a.pth: it holds weights that are not finite; use an older file$"):
        model.convert.convert(tmp_path / "a.pth", tmp_path / "b.pth", say=lambda line: None)
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize("fails", ["save_torch", "shutil.copyfile"])
def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(tmp_path, tokenizer_folder, monkeypatch, fails):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    weights = weights_of({}, tokenizer_folder)
    module = "model.weights.tokenizer_copy" if fails == "shutil.copyfile" else "model.weights.weights"
    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.{fails}", full)
        with pytest.raises(InputError, match=r"a.pth: cannot be written \(No space left on device\)"):
            model.convert.write("mateconv", tmp_path / "a.pth", weights)
    assert not list(tmp_path.iterdir())
    model.convert.write("mateconv", tmp_path / "a.pth", weights)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "a.json", "a_tokenizer"}


def test_a_state_dict_without_a_description_is_told_its_heads(shop, tmp_path, here):
    weights = load_weights(shop / "a.pth")
    torch.save(weights.state_dict, tmp_path / "bare.pth")
    code, _, error = here(model.convert, tmp_path / "bare.pth", tmp_path / "x", "--n_heads", "5")
    assert code == 2 and "n_heads 5 does not fit its shapes" in error and "4/2" in error
    code, _, error = here(model.convert, tmp_path / "bare.pth", tmp_path / "x", "--n_heads", "4", "--max_seq_len=256")
    assert code == 0 and "given n_heads 4, max_seq_len 256" in error
    assert_same(load_weights(tmp_path / "x"), weights)


@pytest.mark.parametrize("target", ["b", "b.gguf", "b.bin", "b.pt", "meta"])
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("rope_scaling", "yarn", "rope_scaling 'yarn'"),
        ("sandwich_norm", True, "sandwich_norm True (only False)"),
        ("n_sinks", 8, "n_sinks 8 (only 0)"),
    ],
)
def test_what_a_format_does_not_know_is_refused_by_name(shop, tmp_path, target, field, value, message):
    """As of a field that LMConfig gets tomorrow."""
    weights = load_weights(shop / "own.pth")
    if field == "rope_scaling":
        weights.config.rope_scaling = value
    else:
        kind = type(value)
        tomorrow = dataclasses.make_dataclass(
            "Tomorrow", [(field, kind, setting(kind(), "of tomorrow"))], bases=(LMConfig,)
        )
        weights.config = tomorrow(**vars(weights.config) | {field: value})
    suffix = None if target == "meta" else os.path.splitext(target)[1]
    to = next(name for name, known in model.convert.FORMATS.items() if known.suffix == suffix)
    with pytest.raises(InputError, match=f"{target}: .* cannot express {re.escape(message)}"):
        model.convert.write(to, tmp_path / target, weights)
    assert not list(tmp_path.iterdir())
    if field != "rope_scaling":
        setattr(weights.config, field, kind())  # its default changes nothing
        model.convert.write(to, tmp_path / target, weights)


@pytest.mark.parametrize("to, target", [("llama2c", "b.bin"), ("llama2c_checkpoint", "b.pt"), ("meta", "b")])
def test_formats_of_dense_models_refuse_experts(tmp_path, to, target):
    weights = weights_of(PLAIN | {"n_experts": 8, "vocab_size": 6400})
    with pytest.raises(InputError, match=r"cannot express n_experts 8 \(only 0\)"):
        model.convert.write(to, tmp_path / target, weights)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- links in its tokenizer


@pytest.fixture
def linked(shop, tmp_path):
    """A downloaded folder whose chat template is a link to a file of the user's."""
    (tmp_path / "secret").write_text("{{ 'the key' }}")
    folder = tmp_path / "download"
    shutil.copytree(shop / "own" / "model", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    try:
        (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    except OSError:
        pytest.skip("no symbolic links")
    return folder


@pytest.mark.parametrize("target", ["out", "out.gguf", "out.pth"])
def test_no_file_from_outside_is_exported(linked, tmp_path, here, target):
    code, _, error = here(model.convert, linked, tmp_path / target)
    assert code == 2 and "chat_template.jinja is a link to" in error and "outside its folder" in error
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "download"}


def test_a_run_folder_is_its_newest_weights(shop, tmp_path):
    for name in ("a.pth", "a.json"):
        shutil.copy(shop / name, tmp_path / name.replace("a.", "pretrain_64."))
    said = []
    model.convert.convert(tmp_path, tmp_path / "model.gguf", say=said.append)
    assert said[0].startswith(f"weights {tmp_path.as_posix()}/pretrain_64.pth: the newest final weights")
    assert_same(load_weights(tmp_path / "model.gguf"), load_weights(shop / "a.pth"))
    with pytest.raises(InputError, match="pretrain_512.pth: no such file; there are .*pretrain_64.pth"):
        model.convert.convert(tmp_path / "pretrain_512.pth", tmp_path / "x")


def test_links_within_a_folder_and_the_hugging_face_cache_are_followed(shop, tmp_path, here):
    cache = tmp_path / "models--own--model"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate((shop / "own" / "model").iterdir()):
        shutil.copy(file, cache / "blobs" / str(number))
        try:
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        except OSError:
            pytest.skip("no symbolic links")
    (tmp_path / "link").symlink_to(snapshot)
    for source, target in ((snapshot, "a"), (tmp_path / "link", "b")):
        code, _, error = here(model.convert, source, tmp_path / target)
        assert code == 0, error
        assert not any(path.is_symlink() for path in (tmp_path / target).iterdir())
        assert_same(load_weights(tmp_path / target), load_weights(shop / "own.pth"))


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_inference_takes_other_formats(shop, tmp_path, here, name):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    generate = ["--prompt", TEXT, "--greedy", "--max_new_tokens=20", "--compile=false"]
    for flags in (generate, ["--score_file", tmp_path / "text.txt"]):
        found = here(inference, "--model_path", shop / "own" / name, *flags)
        ours = here(inference, "--model_path", shop / "own.pth", *flags)
        assert found[0] == ours[0] == 0 and found[1] == ours[1] != ""


@pytest.mark.long
def test_a_chat_with_a_gguf_file(shop):
    chat = ["--interactive", "--greedy", "--max_new_tokens=8", "--compile=false", "--model_path"]
    done = command(ROOT / "inference.py", *chat, "own/model.gguf", input="你好\n再来\nexit\n", cwd=shop)
    assert done.returncode == 0 and done.stdout.count("🤖 助手: ") == 2 and "chat template" not in done.stderr
    ours = command(ROOT / "inference.py", *chat, "own.pth", input="你好\n再来\nexit\n", cwd=shop)
    assert done.stdout == ours.stdout


# ----------------------------------------------------------------------------------------------------------- training


def flags(**values) -> list[str]:
    return [f"--{name}={value}" for name, value in (QUICK | values).items()]


def events(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_training_begins_where_the_weights_are(shop, tmp_path, here, name):
    """The token file is made with the tokenizer that comes with the weights."""
    source, tokens = shop / "own" / name, tmp_path / "t.bin"
    paths = {"init_from": source, "raw_data_path": shop / "raw.jsonl", "train_data_path": tokens}
    still = {"learning_rate": 1e-12, "weight_decay": 0, "max_steps": 2, "eval_interval": 1, "eval_steps": "null"}
    code, _, error = here(train, *flags(**paths, **still, out_dir=tmp_path / "out"))
    assert code == 0 and error.count("the model takes its shape from these weights") == 1, error
    weights = load_weights(source)
    data = PretrainDataset(tokens, 32, 300, tokenizer_sha256(source))
    inputs, targets = data.batch(hold_out(len(data))[1], rows=len(hold_out(len(data))[1]))
    with torch.inference_mode():
        logits = model_of(weights)(inputs)
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    losses = [event["val_loss"] for event in events(tmp_path / "out") if "val_loss" in event]
    assert losses == pytest.approx([expected] * 3, rel=1e-5) and expected > 5  # before the first step, and after each
    best = load_weights(tmp_path / "out" / "best_model.pth")
    assert (best.tokenizer_path, best.tokenizer_sha256) == (str(source), tokenizer_sha256(source))
    assert best.config.max_seq_len == 32
    for key, tensor in weights.state_dict.items():
        assert torch.allclose(best.state_dict[key], tensor, atol=1e-10, rtol=0)


@pytest.mark.long
def test_training_begins_with_the_newest_weights_of_a_runs_folder(shop, tmp_path, here):
    """As --model_path and convert do; the line says which file was taken."""
    own = load_weights(shop / "a.pth")
    (run := tmp_path / "run").mkdir()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.state_dict.items()}
    save_weights(run / "best_model.pth", own.with_state(zeros))
    save_weights(run / "pretrain_64.pth", own)
    paths = {"init_from": run, "raw_data_path": shop / "raw.jsonl", "train_data_path": tmp_path / "t.bin"}
    code, _, error = here(train, *flags(**paths, learning_rate=1e-12, max_steps=1, out_dir=tmp_path / "out"))
    assert code == 0, error
    assert f"weights {(run / 'pretrain_64.pth').as_posix()}: the newest final weights under" in error
    assert f"init_from {run / 'pretrain_64.pth'}: " in error
    trained = load_weights(tmp_path / "out" / "best_model.pth")
    for key, tensor in own.state_dict.items():
        assert torch.allclose(trained.state_dict[key], tensor, atol=1e-10, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_a_training_resumes_when_the_weights_are_gone(shop, tmp_path, here, name):
    """Tokenizer and data are the embedded ones, as in the run that the weights are from."""
    source = shutil.copytree(shop / "a", tmp_path / "a") / name
    config = {
        "data": {"train_data_path": str(tmp_path / "t.bin"), "raw_data_path": str(shop / "raw.jsonl")},
        "training": {"init_from": str(source), "learning_rate": 3e-3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    of_config = ["--config", tmp_path / "config.yaml"]
    code, _, error = here(train, *of_config, *flags(out_dir=tmp_path / "whole"))
    assert code == 0, error
    whole = load_torch(tmp_path / "whole" / "checkpoint_step_4.pth")
    shutil.rmtree(tmp_path / "a")
    for number, asked in enumerate(([*of_config, *flags()], [])):
        cut = shutil.copytree(tmp_path / "whole", tmp_path / f"cut{number}")
        (cut / "checkpoint_step_4.pth").unlink()
        code, _, error = here(train, *asked, "--resume", "--out_dir", cut)
        assert code == 0 and "at step 2" in error, error
        found = load_torch(cut / "checkpoint_step_4.pth")
        for part in ("model", "optimizer"):
            assert bits(found[part]) == bits(whole[part])
    code, _, error = here(train, *of_config, *flags(out_dir=tmp_path / "new"), "--resume")
    assert code == 2 and [line for line in error.splitlines() if "error" in line] == [
        f"error: init_from: {source}: no such file"
    ]


def bits(content) -> object:
    """Something that is equal for equal bits."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {key: bits(value) for key, value in content.items()}
    return [bits(value) for value in content] if isinstance(content, list | tuple) else content


@pytest.mark.long
def test_data_of_the_same_tokenizer_are_used(shop, tmp_path, here, tokenizer_folder):
    """Data were made with the folder that the model was trained with; its exports hold it in other bytes."""
    from optimized_data_processing import OptimizedDataProcessor

    for name, given in (("a", None), ("own", tokenizer_folder)):
        tokens = tmp_path / f"{name}.bin"
        OptimizedDataProcessor(tokenizer_path=given, clean=False).process_dataset(shop / "raw.jsonl", tokens)
        for source in FOREIGN.values():
            paths = {"init_from": shop / name / source, "train_data_path": tokens, "out_dir": tmp_path / name}
            if given is not None:
                paths["tokenizer_path"] = given
            code, _, error = here(train, *flags(**paths, max_steps=1))
            assert code == 0, error
            trained = load_weights(tmp_path / name / "best_model.pth")
            assert trained.tokenizer_path == (given and str(given))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dim=64"], "--dim: init_from's weights determine the shape; omit it"),
        (["--n_layers=2", "--qk_norm"], "--n_layers, --qk_norm: init_from's weights determine the shape"),
        (["--tokenizer_path=own/model"], "was trained with another tokenizer"),
        (["--init_from=nothing.gguf"], "nothing.gguf: no such file"),
        (["--init_from=raw.jsonl"], "raw.jsonl: truncated, damaged or not a PyTorch file"),
    ],
    ids=str,
)
def test_flags_that_contradict_the_weights(shop, tmp_path, here, monkeypatch, arguments, message):
    monkeypatch.chdir(shop)
    paths = {"init_from": "a/model.gguf", "train_data_path": tmp_path / "t.bin", "raw_data_path": "raw.jsonl"}
    code, _, error = here(train, *flags(**paths, out_dir=tmp_path / "out"), *arguments)
    assert code == 2 and error.count("error: ") == 1 and message in error.splitlines()[-1], error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", "transformers"), ("my_model-1.5", "transformers"), ("Qwen2.5-0.5B", "transformers"), ("a.gguf", "gguf"),
     ("there.v2", "transformers"), ("x.onnx", None), ("x.pt2", None)],
)  # fmt: skip
def test_a_name_decides_the_format_and_an_unknown_ending_is_refused(tmp_path, name, expected):
    (tmp_path / "there.v2").mkdir()
    if expected is not None:
        assert model.convert.format_of_name(tmp_path / name) == expected
        return
    with pytest.raises(InputError, match=r"is no format that can be written; name it .*[.]gguf.*[.]pth, or without"):
        model.convert.format_of_name(tmp_path / name)
