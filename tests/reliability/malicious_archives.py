"""The malicious `.pth` files: pickles that would run code, and archives that claim what is not there."""

import contextlib
import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

# ------------------------------------------------------------------------------------------------------- pickles


def text(value: str) -> bytes:
    """A text in a pickle."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """What a pickle imports."""
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    """A call."""
    return function + b"(" + b"".join(arguments) + b"tR"


def whole(value: bytes) -> bytes:
    """A pickle of {"a": value}."""
    return b"\x80\x02}" + text("a") + value + b"s."


MKDIR = "__import__('os').mkdir('CANARY')"
OS = called(named("importlib", "import_module"), text("os"))
NONE = b"N"
PICKLES = {
    "os.system": whole(called(named("posix", "system"), text("mkdir CANARY"))),
    "os.mkdir": whole(called(named("os", "mkdir"), text("CANARY"))),
    "subprocess": whole(called(named("subprocess", "check_call"), b"(" + text("mkdir") + text("CANARY") + b"l")),
    "exec": whole(called(named("builtins", "exec"), text(MKDIR))),
    "eval, by its name in Python 2": whole(called(named("__builtin__", "eval"), text(MKDIR))),
    "getattr": whole(called(called(named("builtins", "getattr"), OS, text("mkdir")), text("CANARY"))),
    "functools.partial": whole(called(called(named("functools", "partial"), named("os", "mkdir")), text("CANARY"))),
    "operator.methodcaller": whole(
        called(called(named("operator", "methodcaller"), text("mkdir"), text("CANARY")), OS)
    ),
    "codecs.open": whole(called(named("codecs", "open"), text("CANARY"), text("w"))),
    "runpy": whole(called(named("runpy", "run_path"), text("evil.py"))),
    "a module of the folder": whole(called(named("evil", "Evil"))),
    "a dotted name": b"\x80\x04\x8c\x02os\x8c\x0dpath.os.mkdir\x93\x8c\x06CANARY\x85R.",
    "INST": b"\x80\x02(" + text("CANARY") + b"ios\nmkdir\n.",
    "OBJ": b"\x80\x02(" + named("os", "mkdir") + text("CANARY") + b"o.",
    "NEWOBJ": whole(named("evil", "Evil") + b")\x81"),
    "NEWOBJ_EX": whole(named("evil", "Evil") + b")}\x92"),
    "BUILD": whole(called(named("collections", "OrderedDict")) + b"}" + text("update") + named("os", "mkdir") + b"sb"),
    "an extension's code": whole(b"\x82\x01"),
    "torch.load": whole(called(named("torch.serialization", "load"), text("evil.py"), NONE, NONE)),
    "a torch file within": whole(called(named("torch.storage", "_load_from_bytes"), b"C\x02xx")),
    "torch.hub": whole(called(named("torch.hub", "load"), text("."), text("evil"), NONE)),
    "a C++ extension": whole(called(named("torch.utils.cpp_extension", "load"), text("evil"), text("evil.py"))),
    "numpy's memmap": whole(called(named("numpy", "memmap"), text("CANARY"), text("uint8"), text("w+"), b"K\x00K\x09")),
    "a bytearray of 100 GB": whole(called(named("builtins", "bytearray"), b"\x8a\x05\x00\xe8vH\x17")),
    "a memo index of two billion": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of 2**40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a frame of 2**62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "lists in 300,000 lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a list that holds itself": b"\x80\x02}" + text("a") + b"]q\x00h\x00as.",
    "no pickle": b"not a pickle",
    "nothing": b"",
}


def save_pickle(path: Path, content: bytes, records: dict[str, bytes] | None = None) -> None:
    """Write an archive as torch does, with this for its pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, record in ({"data.pkl": content, "version": b"3\n"} | (records or {})).items():
            archive.writestr(f"bad/{name}", record)


# ------------------------------------------------------------------------------------------------------- tensors


def number(value: int) -> bytes:
    """A whole number in a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def sizes(*values: int) -> bytes:
    """A tuple of whole numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(elements: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """A storage that the pickle asks for."""
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(held: bytes, offset: int, shape: tuple, strides: tuple, hooks: bytes | None = None) -> bytes:
    """A tensor over a storage."""
    nothing = called(named("collections", "OrderedDict"))
    function = named("torch._utils", "_rebuild_tensor_v2")
    return called(function, held, number(offset), sizes(*shape), sizes(*strides), b"\x89", hooks or nothing)


def with_tensor(value: bytes, records: dict[str, bytes] | None = None) -> Callable[[Path], None]:
    """Write an archive that holds one tensor, called as a model's embedding, and 16 bytes of numbers."""
    content = b"\x80\x02}" + text("tok_embeddings.weight") + value + b"s."
    return lambda path: save_pickle(path, content, {"data/0": b"\0" * 16} | (records or {}))


GOOD = tensor(storage(4), 0, (4,), (1,))
HOOK = called(named("collections", "OrderedDict")) + number(0) + named("os", "mkdir") + b"s"
REBUILD = "torch._utils"
DENSE = tensor(storage(2, kind="LongStorage"), 0, (1, 2), (2, 1))

# ------------------------------------------------------------------------------------------------------ archives


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Nothing is said of a name that an archive holds already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compressed(name: str, size: int) -> Callable[[Path], None]:
    """A record of zeros, packed to a thousandth."""

    def make(path: Path) -> None:
        with_tensor(GOOD)(path)
        with (
            without_warnings(),
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"bad/{name}", "w", force_zip64=True) as file,
        ):
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))

    return make


def more(name: str, content: bytes) -> Callable[[Path], None]:
    """A good archive with one more record, called exactly so."""

    def make(path: Path) -> None:
        with_tensor(GOOD)(path)
        with without_warnings(), zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content)

    return make


def patched(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """A good archive of which bytes are changed."""

    def make(path: Path) -> None:
        with_tensor(GOOD)(path)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return make


def directory(record: int, offset: int, value: int) -> Callable[[Path], None]:
    """A good archive with four bytes changed in one entry of its directory."""

    def change(content: bytearray) -> None:
        place = -1
        for _ in range(record + 1):
            place = content.index(b"PK\1\2", place + 1)
        content[place + offset : place + offset + 4] = struct.pack("<I", value)

    return patched(change)


def two_directories(path: Path) -> None:
    """A good archive behind which an evil one hides, as its comment."""
    with_tensor(GOOD)(path)
    good = bytearray(path.read_bytes())
    save_pickle(path, PICKLES["os.mkdir"])
    evil = path.read_bytes()
    good[-2:] = struct.pack("<H", len(evil))
    path.write_bytes(good + evil)


def before_archive(content: bytes) -> Callable[[Path], None]:
    """Something before the archive, which a reader that starts at the front takes for the file."""

    def make(path: Path) -> None:
        with_tensor(GOOD)(path)
        path.write_bytes(content + path.read_bytes())

    return make


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "a storage that claims a million numbers": with_tensor(tensor(storage(10**6), 0, (10**6,), (1,))),
    "a storage that claims a trillion numbers": with_tensor(tensor(storage(10**12), 0, (4,), (1,))),
    "a storage of doubles in the place of floats": with_tensor(tensor(storage(4, kind="DoubleStorage"), 0, (4,), (1,))),
    "a storage of negative size": with_tensor(tensor(storage(-4), 0, (4,), (1,))),
    "a storage of 2**63 numbers": with_tensor(tensor(storage(2**63), 0, (4,), (1,))),
    "a storage without a record": with_tensor(tensor(storage(4, "7"), 0, (4,), (1,))),
    "a storage that is another record": with_tensor(tensor(storage(4, "../data.pkl"), 0, (4,), (1,))),
    "a storage of an unknown kind": with_tensor(tensor(storage(4, kind="EvilStorage"), 0, (4,), (1,))),
    "two storages that swap their sizes": with_tensor(
        tensor(storage(4000), 0, (4000,), (1,)) + b"s" + text("b") + tensor(storage(4, "1"), 0, (4,), (1,)),
        {"data/1": b"\0" * 16000},
    ),
    "a size past its storage": with_tensor(tensor(storage(4), 0, (400,), (1,))),
    "an offset past its storage": with_tensor(tensor(storage(4), 10**6, (4,), (1,))),
    "a negative offset": with_tensor(tensor(storage(4), -4, (4,), (1,))),
    "a negative size": with_tensor(tensor(storage(4), 0, (-4,), (1,))),
    "a stride past its storage": with_tensor(tensor(storage(4), 0, (4,), (10**9,))),
    "a negative stride": with_tensor(tensor(storage(4), 3, (4,), (-1,))),
    "a stride of 0 over ten billion": with_tensor(tensor(storage(4), 0, (10**5, 10**5), (0, 0))),
    "sizes that overflow": with_tensor(tensor(storage(4), 0, (2**62, 4), (1, 0))),
    "hooks": with_tensor(tensor(storage(4), 0, (4,), (1,), HOOK)),
    "a sparse tensor with indices outside": with_tensor(
        called(
            named(REBUILD, "_rebuild_sparse_tensor"),
            called(named("torch.serialization", "_get_layout"), text("torch.sparse_coo")),
            b"(" + DENSE + GOOD + sizes(10**9, 10**9) + b"\x89t",
        )
    ),
    "a quantized tensor": with_tensor(
        called(named(REBUILD, "_rebuild_qtensor"), storage(4, kind="QInt8Storage"), number(0), sizes(9), sizes(1), NONE)
    ),
    "a tensor without a storage": with_tensor(
        called(
            named(REBUILD, "_rebuild_meta_tensor_no_storage"), named("torch", "float32"), sizes(9), sizes(1), b"\x89"
        )
    ),
    "a nested tensor": with_tensor(called(named(REBUILD, "_rebuild_nested_tensor"), GOOD, GOOD, GOOD, GOOD)),
    "a tensor of NumPy": with_tensor(
        called(
            named(REBUILD, "_rebuild_device_tensor_from_numpy"), NONE, named("torch", "float32"), text("cpu"), b"\x89"
        )
    ),
    "a tensor of a subclass": with_tensor(
        called(
            named("torch._tensor", "_rebuild_from_type_v2"), named("evil", "Evil"), named("evil", "Evil"), b")", b"}"
        )
    ),
    "a tensor that is set anew": with_tensor(GOOD + b"(" + storage(4) + number(9) + sizes(9) + sizes(9) + b"tb"),
    "a record of 256 MB packed to 256 KB": compressed("data/1", 256 << 20),
    "a second pickle of 64 MB packed to 64 KB": compressed("data.pkl", 64 << 20),
    "a second pickle of the same name": more("bad/data.pkl", PICKLES["os.mkdir"]),
    "a second folder": more("evil/data.pkl", PICKLES["os.mkdir"]),
    "a record of the folder above": more("bad/../CANARY", b"x"),
    "a record of another folder": more("../CANARY", b"x"),
    "a record of the root": more("/tmp/CANARY", b"x"),
    "code of TorchScript": more("bad/constants.pkl", PICKLES["os.mkdir"]),
    "a record that claims 4 GB": directory(2, 24, 2**32 - 2),
    "a record that claims to be packed": directory(2, 8, 8 << 16),
    "a record of no bytes": directory(0, 20, 0),
    "a record that lies over another": directory(2, 42, 0),
    "a record past the file": directory(2, 42, 2**31),
    "a checksum of another record": directory(2, 16, 12345),
    "an end that claims 60,000 records": patched(lambda content: content.__setitem__(slice(-14, -10), b"\x60\xea" * 2)),
    "two directories": two_directories,
    "a pickle before the archive": before_archive(PICKLES["os.mkdir"]),
    "a text before the archive": before_archive(b"#!/bin/sh\nmkdir CANARY\n"),
}

# ------------------------------------------------------------------------------------------------- other formats


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        import os

        return os.mkdir, ("CANARY",)


def legacy(path: Path) -> None:
    """A payload in torch's old format, which is no zip file."""
    import torch

    torch.save({"a": Evil(), "b": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)


def legacy_good(path: Path) -> None:
    """The old format without a payload: refused all the same."""
    import torch

    torch.save({"tok_embeddings.weight": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)


def tar(path: Path) -> None:
    """A payload in the tar file that the oldest torch wrote."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors", "../CANARY"):
            entry = tarfile.TarInfo(name)
            entry.size = len(PICKLES["os.mkdir"])
            archive.addfile(entry, io.BytesIO(PICKLES["os.mkdir"]))


def numpy_objects(path: Path) -> None:
    """A payload as NumPy's array of objects, under the name of weights."""
    import numpy as np

    with open(path, "wb") as file:
        np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)


def numpy_archive(path: Path) -> None:
    """The same in NumPy's zip file, under the name of torch's pickle."""
    import numpy as np

    with open(path, "wb") as file:
        np.savez(file, **{"data.pkl": np.array([Evil()], dtype=object)})


def whole_model(path: Path) -> None:
    """A whole module, not its weights."""
    import torch

    torch.save(torch.nn.Linear(2, 2), path)


def compressed_pickle(path: Path) -> None:
    """A pickle of 64 MB, compressed to a thousandth."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bad/data.pkl", b"\x80\x02" + b"]0" * (32 << 20) + b"}.")
        archive.writestr("bad/version", b"3\n")


LOOSE: dict[str, Callable[[Path], None]] = {
    "torch's format before 1.6": legacy,
    "a good file of torch's format before 1.6": legacy_good,
    "torch's first format, a tar": tar,
    "a pickle": lambda path: path.write_bytes(PICKLES["os.mkdir"]),
    "a pickle of protocol 0": lambda path: path.write_bytes(b"cos\nmkdir\n(S'CANARY'\ntR."),
    "NumPy objects": numpy_objects,
    "an archive of NumPy objects": numpy_archive,
    "an archive whose pickle is packed": compressed_pickle,
    "a whole model": whole_model,
    "Python": lambda path: path.write_text("import evil\n"),
    "safetensors that claims 2**60 bytes": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
}

# --------------------------------------------------------------------------------------------------- checkpoints


def put(*keys: str, value=None) -> Callable[[dict], None]:
    """Change what lies at a place in a checkpoint; without a value, to what runs a command."""

    def change(content: dict) -> None:
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = Evil() if value is None else value

    return change


CHECKPOINTS: dict[str, Callable[[dict], object]] = {
    "a command as progress": put("progress"),
    "a command in progress": put("progress", "step"),
    "a command in the optimizer": put("optimizer", "state"),
    "a command in the groups": put("optimizer", "param_groups"),
    "a command in random_states": put("random_states"),
    "a command in the settings": put("settings", "training", "out_dir"),
    "a command as the average": put("ema"),
    "a command in the model": put("model", "tok_embeddings.weight"),
    "a text as progress": put("progress", value="far"),
    "a step that is text": put("progress", "step", value="5"),
    "a step of 10**30": put("progress", "step", value=10**30),
    "negative samples": put("progress", "samples", value=-(10**6)),
    "an unknown field of progress": put("progress", "evil", value=1),
    "settings that are a list": put("settings", value=[1]),
    "total_steps that are text": put("total_steps", value="all"),
    "a model that is a list": put("model", value=[1]),
    "random states of another kind": put("random_states", value=[{"python": 1}]),
    "random states that are a number": put("random_states", value=5),
    "an optimizer without groups": put("optimizer", value={"state": {}}),
    "a shape that is text": put("config", value="512"),
}
