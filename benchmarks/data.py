"""Data processing compared with what users have now: from JSONL to the token file, with the same file and cores.

    python benchmarks/data.py                                   # the sample corpus, repeated
    python benchmarks/data.py --input my.jsonl --cores 1 2 4
    python benchmarks/data.py --memory                          # peak memory at 40 MB and at 2 GB of input

Each row of the table is a separate process, bound to the given number of cores. All rates are megabytes (10^6) of the
texts' UTF-8 per second:

    one at a time      jsonlines, one call of the transformers tokenizer per document, a growing list: MiniMind v1's way
    encode_batch_fast  tokenizers, batches of 1,000 texts already in memory; no file is read or written
    encode_batch_flat  fastokens, batches of a megabyte of texts already in memory; no file is read or written
    process_dataset    the whole job, with starting workers, checks and manifest; with and without cleaning

The first two are slow and get every k-th document of the file. All of them must give the same ids.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
TOKENIZER = ROOT / "model" / "tokenizer"
BATCH_BYTES = 1 << 20


def read_texts(path: Path, every: int) -> list[str]:
    """Every k-th text of the file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"].strip() for line in itertools.islice(file, 0, None, every)]


# Each measure returns bytes of text, seconds, and the SHA-256 of the tokens of every k-th document.


def one_at_a_time(path: Path, every: int) -> tuple[float, float, str]:
    """One call of the transformers tokenizer per document, as in MiniMind v1."""
    import jsonlines
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids, size, since = [], 0, time.perf_counter()
    with jsonlines.open(path) as reader:
        for document in itertools.islice(reader, 0, None, every):
            text = document["text"].strip()
            ids += tokenizer(f"<s>{text}</s>")["input_ids"]
            size += len(text.encode("utf-8"))
    tokens = np.array(ids, dtype=np.uint16)
    tokens.tofile(path.with_suffix(".loop.bin"))
    seconds = time.perf_counter() - since
    path.with_suffix(".loop.bin").unlink()
    return size, seconds, hashlib.sha256(tokens.tobytes()).hexdigest()


def encode_batch_fast(path: Path, every: int) -> tuple[float, float, str]:
    """The bare encoder of tokenizers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts, encoded, since = read_texts(path, every), [], time.perf_counter()
    for start in range(0, len(texts), 1000):
        batch = tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
        encoded += [encoding.ids for encoding in batch]
    seconds = time.perf_counter() - since
    return _size(texts), seconds, _digest(encoded)


def encode_batch_flat(path: Path, every: int) -> tuple[float, float, str]:
    """The bare encoder of fastokens."""
    import fastokens

    tokenizer = fastokens.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    texts = read_texts(path, every)
    batches, size = [[]], 0
    for text in texts:
        batches[-1].append(text)
        size += 3 * len(text)
        if size > BATCH_BYTES:
            batches.append([])
            size = 0
    since = time.perf_counter()
    results = [tokenizer.encode_batch_flat(batch, split_special_tokens=True) for batch in batches]
    seconds = time.perf_counter() - since
    encoded = []
    for ids, offsets in results:
        encoded += np.split(np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64))
    return _size(texts), seconds, _digest(encoded[: len(texts)])


def process_dataset(path: Path, every: int, **options) -> tuple[float, float, str]:
    """The whole job, from file to file."""
    from optimized_data_processing import OptimizedDataProcessor

    output = path.with_name("ours") / "data.bin"
    shutil.rmtree(output.parent, ignore_errors=True)
    since = time.perf_counter()
    counts = OptimizedDataProcessor(**options).process_dataset(path, output)
    seconds = time.perf_counter() - since
    tokens = np.fromfile(output, dtype="<u2")
    if every > 1:
        documents = np.split(tokens, np.fromfile(output.with_suffix(".ends"), "<u8")[:-1].astype(np.int64))
        tokens = np.concatenate(documents[::every])
    shutil.rmtree(output.parent)
    return counts["utf8_bytes"], seconds, hashlib.sha256(tokens.tobytes()).hexdigest()


def _size(texts: list[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _digest(encoded: list) -> str:
    """Of the ids with bos and eos, as they stand in the token file."""
    tokens = np.concatenate([np.concatenate([[1], ids, [2]]).astype(np.uint16) for ids in encoded])
    return hashlib.sha256(tokens.tobytes()).hexdigest()


MEASURES = {
    "one at a time": (one_at_a_time, {}),
    "encode_batch_fast": (encode_batch_fast, {}),
    "encode_batch_flat": (encode_batch_flat, {}),
    "process_dataset, clean false, deduplicate false": (process_dataset, {"clean": False, "deduplicate": False}),
    "process_dataset, clean false": (process_dataset, {"clean": False}),
    "process_dataset": (process_dataset, {}),
}


def measure(name: str, path: Path, every: int, cores: int) -> dict:
    """Run one measure in a separate process, bound to the first `cores` cores."""
    command = [sys.executable, __file__, "--measure", name, "--input", str(path), "--every", str(every)]
    done = subprocess.run([*command, "--cores", str(cores)], capture_output=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def make_input(folder: Path, megabytes: float, source: Path) -> Path:
    """A file of at least this many megabytes: a corpus repeated, with the documents of each copy made different."""
    path = folder / "corpus.jsonl"
    texts = read_texts(source, 1)
    size = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for copy in itertools.count(1):
            for text in texts:
                size += len(text.encode("utf-8"))
                file.write(json.dumps({"text": f"第{copy}份 {text}"}, ensure_ascii=False) + "\n")
            if size >= megabytes * 1e6:
                return path


def compare(path: Path, core_counts: list[int], repeats: int) -> None:
    """Print the table."""
    with open(path, "rb") as file:
        lines = sum(1 for _ in file)
    size = path.stat().st_size
    every = max(1, round(size / 20e6))  # so that the slow ones take about ten seconds
    print(f"{path.name}: {size / 1e6:,.0f} MB, {lines:,} documents; the slow ones get every {every}th\n")
    print(f"{platform.platform()}, Python {platform.python_version()}; ", end="")
    print(
        ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "fastokens", "numpy")),
        end="\n\n",
    )
    print("| cores | what | MB/s (best of runs) | to encode_batch_fast | to encode_batch_flat |\n|---|---|---|---|---|")
    for cores in core_counts:
        best: dict[str, float] = {}
        for name, _ in [item for _ in range(repeats) for item in MEASURES.items()]:
            slow = name in ("one at a time", "encode_batch_fast")
            found = measure(name, path, every if slow else 1, cores)
            best[name] = max(best.get(name, 0), found["bytes"] / found["seconds"] / 1e6)
        for name, rate in best.items():
            fast, flat = rate / best["encode_batch_fast"], rate / best["encode_batch_flat"]
            print(f"| {cores} | {name} | {rate:.1f} | {fast:.1f} | {flat:.2f} |", flush=True)
    names = [name for name in MEASURES if name != "process_dataset"]  # cleaning changes texts
    digests = {measure(name, path, every, max(core_counts))["sha256"] for name in names}
    print(f"\nThe ids of every {every}th document are the same in all of them: {len(digests) == 1}")


def memory(folder: Path, source: Path) -> None:
    """Print the peak memory of the whole job, all its processes together, at two input sizes."""
    print("| input | cleaning and duplicates | peak memory of all processes |\n|---|---|---|")
    for megabytes in (40, 2000):
        path = make_input(folder, megabytes, source)
        output = folder / "ours" / "data.bin"
        command = [sys.executable, str(ROOT / "optimized_data_processing.py"), "--input_path", str(path)]
        process = subprocess.Popen([*command, "--output_path", str(output)], stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory_of(process.pid))
            time.sleep(0.05)
        print(f"| {path.stat().st_size / 1e6:,.0f} MB | default | {peak / 1e6:.0f} MB |", flush=True)
        shutil.rmtree(output.parent)
        path.unlink()


def _memory_of(pid: int) -> int:
    """Resident bytes of a process and its children; pages that they share count once for each (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident + sum(_memory_of(int(child)) for child in children)
    except (OSError, IndexError):
        return 0


def main() -> None:
    """Compare speeds, or measure memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, help="JSONL with texts that do not repeat")
    parser.add_argument(
        "--source", type=Path, default=ROOT / "dataset" / "classics_zh.jsonl", help="the corpus to repeat"
    )
    parser.add_argument("--megabytes", type=float, default=600, help="size of the file made without --input")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores[0]])
        function, options = MEASURES[arguments.measure]
        size, seconds, digest = function(arguments.input, arguments.every, **options)
        print(json.dumps({"bytes": size, "seconds": seconds, "sha256": digest}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            memory(Path(folder), arguments.source)
        else:
            path = arguments.input or make_input(Path(folder), arguments.megabytes, arguments.source)
            compare(path, arguments.cores, arguments.repeats)


if __name__ == "__main__":
    main()
