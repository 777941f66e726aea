"""Files that were made to do harm: nothing in them may run, and no number in them may exhaust the machine's memory.

Every payload that would run code makes CANARY in the folder it runs in. A case passes if nothing was made or changed
there, the script ended by itself within 20 s with one clear line that names the file and exit code 2, and held less
than 2 GB. Where a file is harmless once its attack is ignored, no line and exit code 0 are due; a chat goes on after
its line about a template, and ends with 0.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from tests.reliability.bad_input import write_good_files as write_files_of_a_run
from tests.reliability.harness import Counts
from tests.reliability.malicious_archives import ARCHIVES, CHECKPOINTS, LOOSE, PICKLES, save_pickle
from tests.reliability.scripts import ROOT, Case, run_cases

TITLE = "Malicious files: nothing in them runs"
SECONDS = 20
FAST = 10  # in the fast scale each tenth case is run
OWN_EVERY = 12
EVIL_MODULE = "import os\n\nos.mkdir('CANARY')\n\n\nclass Evil:\n    pass\n"
GENERATE = ["--prompt", "中国", "--max_new_tokens", "2", "--device", "cpu", "--model_path"]
RESUME = ["--config", "config.yaml", "--resume_from"]
BEGIN = ["--config", "config.yaml", "--init_from"]


def run(scale: str, folder: Path) -> Counts:
    """Run the cases: all of them in scale "full", some in "fast"."""
    return run_cases(all_cases(folder), folder / "runs", scale, FAST, OWN_EVERY)


def all_cases(folder: Path) -> list[Case]:
    """Every case, each with another file."""
    good = folder / "good"
    write_good_files(good)
    cases = []
    for name, content in PICKLES.items():
        make = pickle_maker(content)
        cases.append(file_case(good, f"weights: {name}", make, "bad.pth", [*GENERATE, "bad.pth"]))
        cases.append(file_case(good, f"checkpoint: {name}", make, "bad.pth", [*RESUME, "bad.pth"]))
    for name, make in ARCHIVES.items():
        cases.append(file_case(good, f"archive: {name}", make, "bad.pth", [*GENERATE, "bad.pth"]))
    for name, make in LOOSE.items():
        cases.append(file_case(good, f"no archive: {name}", make, "bad.pth", [*GENERATE, "bad.pth"]))
    for name, change in CHECKPOINTS.items():
        cases.append(checkpoint_case(good, name, change))
    cases += [sidecar_case(good, name, content) for name, content in SIDECARS.items()]
    cases += [manifest_case(good, name, content) for name, content in MANIFESTS.items()]
    cases += [config_case(good, name, text) for name, text in CONFIGS.items()]
    cases += [tokenizer_case(good, name, change) for name, change in TOKENIZERS.items()]
    cases += [template_case(good, name, *template) for name, template in TEMPLATES.items()]
    for name, make in {**GGUF_FILES, **FOLDERS}.items():
        file = "bad.gguf" if name in GGUF_FILES else "bad"
        cases.append(file_case(good, f"weights: {name}", make, file, [*GENERATE, file]))
        cases.append(file_case(good, f"init_from: {name}", make, file, [*BEGIN, file]))
    cases.append(remote_code_case(good))
    return cases


def write_good_files(good: Path) -> None:
    """A config, a token file, a model's weights and a checkpoint, with which nothing is wrong."""
    write_files_of_a_run(good)
    (good / "evil.py").write_text(EVIL_MODULE)
    for suffix in (".pth", ".json"):
        shutil.copy(good / "made" / f"pretrain_32{suffix}", good / f"good{suffix}")


def pickle_maker(content) -> Callable[[Path], None]:
    """What writes a payload: given as a pickle's bytes, or as a function that makes them."""
    return lambda path: save_pickle(path, content)


def lay_out(good: Path, here: Path, *more: str) -> None:
    """The good files that a run needs, and evil.py, which no run may import."""
    for name in ("config.yaml", "train.bin", "train.json", "evil.py", *more):
        shutil.copy(good / name, here / name)


def file_case(good: Path, name: str, make: Callable[[Path], object], file: str, arguments: list[str]) -> Case:
    """A script that reads a file which was made so."""

    def prepare(here: Path) -> None:
        lay_out(good, here)
        make(here / file)

    script = "train.py" if "--config" in arguments else "inference.py"
    return Case(name, arguments, prepare, [file], script=script, seconds=SECONDS)


def checkpoint_case(good: Path, name: str, change: Callable[[dict], object]) -> Case:
    """Training that goes on from a checkpoint in which something was changed."""
    import torch

    def prepare(here: Path) -> None:
        lay_out(good, here)
        content = torch.load(good / "checkpoint.pth", weights_only=True)
        change(content)
        torch.save(content, here / "bad.pth")

    return Case(f"checkpoint: {name}", [*RESUME, "bad.pth"], prepare, ["bad.pth"], seconds=SECONDS)


# ------------------------------------------------------------------------------------------------- JSON and YAML


def sidecar_case(good: Path, name: str, content) -> Case:
    """Good weights with this beside them."""

    def prepare(here: Path) -> None:
        lay_out(good, here, "good.pth", "good.json")
        if isinstance(content, str):
            (here / "good.json").write_text(content)
        else:
            values = json.loads((here / "good.json").read_text())
            content(values)
            (here / "good.json").write_text(json.dumps(values))

    arguments = [*GENERATE, "good.pth"]
    return Case(f"sidecar: {name}", arguments, prepare, ["good."], script="inference.py", seconds=SECONDS)


def shape(**changes) -> Callable[[dict], None]:
    """Change the model's shape."""
    return lambda values: values["config"].update(changes)


DEEP = 100_000
SIDECARS = {
    "dim 10**9": shape(dim=10**9),
    "dim 2**40": shape(dim=2**40),
    "n_layers 10**9": shape(n_layers=10**9),
    "n_layers 9,999": shape(n_layers=9_999),
    "vocab_size 10**9": shape(vocab_size=10**9),
    "vocab_size 2**23": shape(vocab_size=2**23),
    "hidden_dim 10**12": shape(hidden_dim=10**12),
    "hidden_dim 10**6": shape(hidden_dim=10**6),
    "max_seq_len 10**12": shape(max_seq_len=10**12),
    "multiple_of 10**15 with hidden_dim null": shape(multiple_of=10**15, hidden_dim=None),
    "a dim of 3,000 digits": shape(dim=10**2999),
    "text for numbers": shape(dim="512", n_layers="many"),
    "a fraction": shape(dim=32.0),
    "true": shape(n_layers=True),
    "negative": shape(n_heads=-2),
    "zero": shape(n_heads=0),
    "nan": shape(norm_eps=float("nan")),
    "infinite": shape(rope_theta=float("inf")),
    "lists": shape(dim=[32], n_layers={}),
    "unknown fields": shape(__class__="os.system", auto_map={}),
    "no config": lambda values: values.pop("config"),
    "config a list": lambda values: values.update(config=[1]),
    "config null": lambda values: values.update(config=None),
    "a tokenizer that is a number": lambda values: values.update(tokenizer_path=5),
    "a tokenizer hash that is a list": lambda values: values.update(tokenizer_sha256=[5]),
    "nested without end": "[" * DEEP,
    "nested objects": '{"config":' * DEEP,
    "a number of 5,000 digits": '{"config": {"dim": ' + "9" * 5000 + "}}",
    "a megabyte": '{"config": {"dim": "' + "9" * 2**20 + '"}}',
    "a list": "[]",
}


def manifest_case(good: Path, name: str, content) -> Case:
    """A good token file with this for its manifest."""

    def prepare(here: Path) -> None:
        lay_out(good, here)
        if isinstance(content, str):
            (here / "train.json").write_text(content)
        else:
            values = json.loads((here / "train.json").read_text())
            (here / "train.json").write_text(json.dumps(values | content))

    return Case(f"manifest: {name}", ["--config", "config.yaml"], prepare, ["train."], seconds=SECONDS)


MANIFESTS = {
    "nested without end": "[" * DEEP,
    "nested in a field": '{"format_version": 1, "sources": ' + '[{"a":' * DEEP,
    "dtype of Python objects": {"dtype": "O", "tokens": 750},
    "dtype of a structure": {"dtype": "u2,O"},
    "tokens 10**30": {"tokens": 10**30},
    "tokens 2**62 of uint32": {"tokens": 2**62, "dtype": "uint32"},
    "negative tokens": {"tokens": -1},
    "vocab_size 2**63": {"vocab_size": 2**63},
}


def config_case(good: Path, name: str, text: str) -> Case:
    """A config file that would do more than say what to train."""

    def prepare(here: Path) -> None:
        lay_out(good, here)
        (here / "config.yaml").write_text(text)

    return Case(f"config: {name}", ["--config", "config.yaml"], prepare, ["config.yaml"], seconds=SECONDS)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(f'*{old}' for _ in range(9))}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(f'*{old}' for _ in range(9))}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {
    "object/apply": "training:\n  epochs: !!python/object/apply:os.mkdir ['CANARY']\n",
    "object/apply of the whole": "!!python/object/apply:os.system ['mkdir CANARY']\n",
    "object/apply with keywords": "a: !!python/object/apply:subprocess.run {kwds: {args: mkdir CANARY, shell: true}}\n",
    "object/new": "a: !!python/object/new:os.mkdir ['CANARY']\n",
    "object with state": "a: !!python/object/new:type {args: [z, !!python/tuple [], {x: 1}], state: {y: 2}}\n",
    "name": "a: !!python/name:os.system\n",
    "module": "a: !!python/module:evil\n",
    "a tag as a key": "!!python/object/apply:os.mkdir ['CANARY']: 1\n",
    "a tag of its own prefix": "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.mkdir ['CANARY']\n",
    "a verbatim tag": "a: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ['CANARY']\n",
    "a billion laughs": LAUGHS,
    "a billion merges": MERGES,
    "an anchor that holds itself": "a: &a [*a]\n",
    "nested without end": "a: " + "[" * 60_000,
}

# ---------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_case(good: Path, name: str, change: Callable[[Path], object]) -> Case:
    """A tokenizer's folder that names code of its own. That is ignored, and it is a good tokenizer: exit code 0."""

    def prepare(here: Path) -> None:
        lay_out(good, here, "good.pth", "good.json")
        shutil.copytree(ROOT / "model" / "tokenizer", here / "tok")
        (here / "tok" / "tokenization_evil.py").write_text(EVIL_MODULE)
        change(here / "tok")

    arguments = [*GENERATE, "good.pth", "--tokenizer_path", "tok"]
    return Case(f"tokenizer: {name}", arguments, prepare, [], script="inference.py", code=0, seconds=SECONDS)


def configured(**changes) -> Callable[[Path], None]:
    """Change the tokenizer's config."""

    def change(tok: Path) -> None:
        file = tok / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


AUTO_MAP = {"AutoTokenizer": [None, "tokenization_evil.Evil"]}
TOKENIZERS = {
    "auto_map": configured(auto_map=AUTO_MAP),
    "auto_map of another repository": configured(auto_map={"AutoTokenizer": ["evil/evil--evil.Evil", None]}),
    "a class of its own": configured(tokenizer_class="tokenization_evil.Evil", auto_map=AUTO_MAP),
    "auto_map in config.json": lambda tok: (tok / "config.json").write_text(
        json.dumps({"model_type": "llama", "auto_map": {"AutoTokenizer": "tokenization_evil.Evil"}})
    ),
    "tokenizer.py": lambda tok: (tok / "tokenizer.py").write_text(EVIL_MODULE),
    "__init__.py": lambda tok: (tok / "__init__.py").write_text(EVIL_MODULE),
    "trust_remote_code": configured(auto_map=AUTO_MAP, trust_remote_code=True),
    "a pickled vocabulary": lambda tok: save_pickle(tok / "vocab.pkl", PICKLES["os.system"]),
}


def template_case(good: Path, name: str, template: str, refused: bool = True) -> Case:
    """A chat with a tokenizer of this template: one line where it is refused, and the chat ends with 0."""

    def prepare(here: Path) -> None:
        lay_out(good, here, "good.pth", "good.json")
        shutil.copytree(ROOT / "model" / "tokenizer", here / "tok")
        configured(chat_template=template)(here / "tok")
        (here / "tok" / "chat_template.jinja").write_text(template)

    arguments = ["--interactive", "--max_new_tokens", "2", "--device", "cpu", "--model_path", "good.pth"]
    arguments += ["--tokenizer_path", "tok"]
    expected = ["template"] if refused else []
    settled = {"script": "inference.py", "code": 0, "typed": "你好\n", "seconds": SECONDS}
    return Case(f"template: {name}", arguments, prepare, expected, **settled)


BILLION = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}",),
    "globals of a helper": ("{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",),
    "globals of lipsum": ("{{ lipsum.__globals__['os'].popen('mkdir CANARY').read() }}",),
    "globals of raise_exception": ("{{ raise_exception.__globals__['__builtins__']['exec']('import evil') }}",),
    "the template itself": ("{{ self.__init__.__globals__.__builtins__.__import__('evil') }}",),
    "attr filter": ("{{ (''|attr('__class__')|attr('__base__')|attr('__subclasses__'))() }}",),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(cycler).missing() }}",),
    "changing the history": ("{{ messages.append(messages) }}",),
    "another file": ("{% include '../evil.py' %}",),
    "import": ("{% import 'evil.py' as evil %}",),
    "a billion loops": (BILLION,),
    "a loop of a billion": ("{% for a in range(1000000000) %}{% endfor %}",),
    "a macro without end": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",),
    "a text of 100 GB": ("{{ 'x' * 100000000000 }}",),
    "a text of 64 MB": ("{{ 'x' * 64000000 }}",),
    "a number without end": ("{{ 10 ** (10 ** 10) }}",),
    "no template": ("{% for %}{{",),
    "nested without end": ("{% if 1 %}" * 3000,),
    "what is harmless": ("{{ messages[-1]['content'] }}{{ bos_token }}", False),
}

# ------------------------------------------------------------------------------------- other programs' weights


def gguf_with(kind: int, content: bytes, tensors: int = 0) -> Callable[[Path], object]:
    """A GGUF file with one value of this type and content, and nothing behind it."""
    header = b"GGUF" + struct.pack("<IQQQ", 3, tensors, 1, 1) + b"x" + struct.pack("<I", kind)
    return lambda path: path.write_bytes(header + content)


def folder_with(name: str, content: bytes | None = None, pickled: bytes = b"") -> Callable[[Path], object]:
    """A folder of transformers whose weights are in a file of this name and content."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | CONFIG_OF_A_FOLDER))
        if content is None:
            save_pickle(folder / name, pickled)
        else:
            (folder / name).write_bytes(content)

    return make


GGUF_LIST = 9
GGUF_FILES = {
    "GGUF, a list of 2^60 texts": gguf_with(GGUF_LIST, struct.pack("<IQ", 8, 2**60)),
    "GGUF, a list of 2^60 numbers": gguf_with(GGUF_LIST, struct.pack("<IQ", 4, 2**60)),
    "GGUF, a text of 2^60 bytes": gguf_with(8, struct.pack("<Q", 2**60)),
    "GGUF, lists in lists without end": gguf_with(GGUF_LIST, struct.pack("<IQ", GGUF_LIST, 1) * DEEP),
    "GGUF, sixteen million bytes one by one": gguf_with(GGUF_LIST, struct.pack("<IQ", 0, 2**24) + bytes(2**24)),
    "GGUF, a million empty texts": gguf_with(GGUF_LIST, struct.pack("<IQ", 8, 2**20) + bytes(2**23)),
    "GGUF, 2^60 tensors": gguf_with(4, bytes(4), tensors=2**60),
}
CONFIG_OF_A_FOLDER = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 6400,
}  # fmt: skip
INDEX = json.dumps({"weight_map": {"model.norm.weight": "../good.pth"}}).encode()
FOLDERS = {
    "a folder, os.system": folder_with("pytorch_model.bin", pickled=PICKLES["os.system"]),
    "a folder, a header of 2^40 bytes": folder_with("model.safetensors", struct.pack("<Q", 2**40) + b"{}"),
    "a folder, nested without end": folder_with("model.safetensors", struct.pack("<Q", DEEP) + b"[" * DEEP),
    "a folder, weights of elsewhere": folder_with("pytorch_model.bin.index.json", INDEX),
}


def remote_code_case(good: Path) -> Case:
    """A folder of transformers that brings code of its own, which is not asked for: it is a good model, exit code 0."""

    def prepare(here: Path) -> None:
        from model.convert import convert

        lay_out(good, here, "good.pth", "good.json")
        convert(here / "good.pth", here / "model", say=lambda line: None)
        (here / "model" / "modeling_evil.py").write_text(EVIL_MODULE)
        config = json.loads((here / "model" / "config.json").read_text())
        config |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "architectures": ["Evil"]}
        (here / "model" / "config.json").write_text(json.dumps(config))

    arguments = [*GENERATE, "model"]
    return Case("weights: remote code", arguments, prepare, [], script="inference.py", code=0, seconds=SECONDS)
