"""What several tests share: a small tokenizer and a small model, made on the spot."""

import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; set before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only wait for each other on models this small
COMPILED = tempfile.TemporaryDirectory(prefix="mateconv_tests_")
os.environ["MATECONV_CACHE"] = COMPILED.name  # no test finds what another run compiled
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"  # what calls the kernels need not be fast here

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from model.LMConfig import LMConfig  # noqa: E402
from model.model import Transformer  # noqa: E402
from tests import forks  # noqa: E402
from utils import measure_matmul_flops as MEASURE  # noqa: E402, N812

pytest.register_assert_rewrite("tests.tiny_runs", "tests.model_shapes", "tests.bad_files", "tests.raw_gguf")
CORPUS = ROOT / "dataset" / "classics_zh.jsonl"
CHAT_TEMPLATE = (  # MiniMind v1's form
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
SENTENCES = ["中国是一个历史悠久的国家。", "长江、黄河都在中国。", "你好，好久不见！", "The quick brown fox."]


def corpus_lines(count: int) -> list[bytes]:
    """The sample corpus' first lines."""
    with open(CORPUS, "rb") as file:
        return [next(file) for _ in range(count)]


def process_data(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """optimized_data_processing.py with these arguments."""
    script = [sys.executable, str(ROOT / "optimized_data_processing.py")]
    return forks.run([*script, *map(str, arguments)], cwd=cwd, capture_output=True, encoding="utf-8")


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def pytest_configure():
    """Tests that send signals need them heard, even where a shell's `&` or a job runner started pytest deaf to them."""
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_finish():
    """The collector need not look again and again at what was imported: that took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_time_for_what_is_not_tested(request, monkeypatch):
    """In this process no picture is drawn, unless the test is marked `pictures`, and the machine is measured once."""
    import utils

    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("model.runs.metrics.draw_curves", lambda events, path: None)
        monkeypatch.setattr("model.corpus.picture.draw_summary", lambda path, summary: None)
    monkeypatch.setattr(utils, "measure_matmul_flops", measured_once)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    return MEASURE(device, dtype)


def measured_once(device: torch.device, dtype: torch.dtype, weights: Iterable[tuple[int, int]] = ()) -> float:
    """FLOP/s of a matrix product, as it was when the first test asked."""
    return _measured(device, dtype)


@contextlib.contextmanager
def signals_kept():
    """Give back what train.py's main, called in this process, keeps until its process ends: blocked signals would be
    inherited by every program that a later test starts."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@pytest.fixture(autouse=True)
def signals_as_before():
    """Each test leaves the signals as it found them."""
    with signals_kept():
        yield


def pytest_collection_modifyitems(items):
    """`fast` is what is neither `long` nor `slow`; the files with most long tests begin."""
    long_tests = Counter()
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("long", "slow")):
            item.add_marker("fast")
        long_tests[item.path] += item.get_closest_marker("long") is not None
    items.sort(key=lambda item: -long_tests[item.path])


def read_rejects(output: Path) -> list[dict]:
    """The lines of the rejects file beside an output."""
    path = output.with_name(f"{output.stem}.rejects.jsonl")
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def read_pieces(output: Path) -> list[list[int]]:
    """The ids of each document in a token file, cut where its .ends says; bos and eos stand there and nowhere else."""
    ids, ends = np.fromfile(output, "<u2"), np.fromfile(output.with_suffix(".ends"), "<u8").astype(np.int64)
    pieces = np.split(ids, ends[:-1])
    assert ends[-1] == len(ids)
    assert all(piece[0] == 1 and piece[-1] == 2 and piece[1:-1].min() > 2 for piece in pieces)
    return [piece[1:-1].tolist() for piece in pieces]


def read_documents(output: Path, tokenizer_folder: Path | None) -> list[str]:
    """The texts in a token file."""
    from model.text.tokenization import load_tokenizer

    backend = load_tokenizer(tokenizer_folder).backend_tokenizer
    return [backend.decode(ids) for ids in read_pieces(output)]


@pytest.fixture
def process_data_here(monkeypatch, capsys):
    """optimized_data_processing.py with these arguments, without a process of its own: (exit code, what it said)."""
    import optimized_data_processing
    from utils import run_command

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["optimized_data_processing.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_command(optimized_data_processing.main)
        return exit_.value.code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE of 300 tokens: nearly every Chinese character is spread over two or three of them."""
    from tests.reliability.harness import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, SENTENCES, CHAT_TEMPLATE)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    from model.text.tokenization import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory, tokenizer_folder):
    """The first 60 texts of the sample corpus as a token file: some 650 samples of 32 tokens."""
    from model.text.tokenization import encode_texts, load_tokenizer, tokenizer_sha256
    from model.token_file.manifest import Manifest, file_sha256, write_manifest

    tokenizer, ids, lines = load_tokenizer(tokenizer_folder), [], corpus_lines(60)
    for encoded in encode_texts(tokenizer, [json.loads(line)["text"] for line in lines]):
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    path = tmp_path_factory.mktemp("data") / "train.bin"
    np.array(ids, dtype="<u2").tofile(path)
    sha256 = tokenizer_sha256(tokenizer_folder)
    write_manifest(path, Manifest("uint16", 300, 1, 2, len(ids), len(lines), sha256, "test", file_sha256(path)))
    return path


@pytest.fixture
def flags(tmp_path, token_file, tokenizer_folder):
    """Builds the flags of a tiny run (tests/tiny_runs.py) into `tmp_path/out`, with those given on top."""
    from tests.tiny_runs import TINY

    def build(**changes):
        paths = {"train_data_path": token_file, "tokenizer_path": tokenizer_folder, "out_dir": tmp_path / "out"}
        given = {name: value for name, value in (TINY | paths | changes).items() if value is not None}
        return {name: [*map(str, v)] if isinstance(v, list) else str(v) for name, v in given.items()}

    return build


@pytest.fixture
def tiny_config():
    return LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128)


@pytest.fixture
def tiny_model(tiny_config):
    return random_model(tiny_config)


def random_model(config: LMConfig, seed: int = 0) -> Transformer:
    """A model whose logits differ enough between tokens (deviation about 2) that rounding decides nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()
