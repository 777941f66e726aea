"""Files of tensors: what torch saves comes back; anything else is refused from its first bytes or its directory."""

import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.errors import InputError
from model.storage.archive import is_finite, load_torch, save_torch, tensor_bytes
from model.storage.archive_checks import check_tensors, named_tensors
from tests.reliability.malicious_archives import GOOD, save_pickle, storage, tensor, text, with_tensor


def refusal(path) -> str:
    with pytest.raises(InputError) as raised:
        load_torch(path)
    line = str(raised.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize("save", [torch.save, lambda content, path: save_torch(path, content)], ids=["torch", "ours"])
def test_what_torch_saves_comes_back(tmp_path, tiny_model, save):
    shared = torch.arange(12.0)
    content = {
        "model": tiny_model.state_dict(), "parameter": torch.nn.Parameter(torch.zeros(3)), "h": torch.zeros(3).half(),
        "view": torch.arange(12).view(3, 4).T[1:], "empty": torch.zeros(0, 4), "scalar": torch.tensor(True),
        "brain": torch.zeros(2, dtype=torch.bfloat16), "plain": [1, 2.5, None, "text", (True, {"a": 10**30})],
        "same": [shared, shared, shared[3:]],
    }  # fmt: skip
    save(content, tmp_path / "a.pth")
    loaded = load_torch(tmp_path / "a.pth")
    assert loaded["plain"] == content["plain"] and loaded.keys() == content.keys()
    for (name, found), (_, expected) in zip(named_tensors(loaded), named_tensors(content), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
        assert found.stride() == expected.stride() and found.requires_grad == expected.requires_grad
    first, again, view = loaded["same"]
    assert first is again and view.data_ptr() == first[3:].data_ptr()
    assert tensor_bytes(loaded) == tensor_bytes(content)


def test_what_was_loaded_does_not_depend_on_the_file_any_more(tmp_path):
    path = tmp_path / "a.pth"
    save_torch(path, {"a": torch.full((5000,), 7.0)})
    loaded = load_torch(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.truncate(path, 0)
    assert torch.equal(loaded["a"], torch.full((5000,), 7.0))


# ------------------------------------------------------------------------------------------- a zip file's directory


def overlapping(path, method: int, count: int) -> None:
    """An archive whose directory lists one record `count` times: an entry of 46 bytes stands for a million."""
    save_pickle(path, b"\x80\x02}.")
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("bad/data/0", bytes(1 << 20))
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\1\2")
    entry = content[start : content.rindex(b"PK\5\6")]
    first = content.index(b"PK\1\2")
    entries = bytearray()
    for number in range(count):
        named = bytearray(entry.replace(b"bad/data/0", b"bad/data/%d" % number))
        named[28:30] = struct.pack("<H", len(b"bad/data/%d" % number))
        entries += named
    end = content[content.rindex(b"PK\5\6") :]
    end[8:20] = struct.pack("<HHII", count + 2, count + 2, start - first + len(entries), first)
    path.write_bytes(content[:start] + entries + end)


@pytest.mark.long
@pytest.mark.parametrize(
    "method, expected",
    [(zipfile.ZIP_DEFLATED, "is compressed to 1,0.. bytes"), (zipfile.ZIP_STORED, "lie over each other")],
    ids=["deflated", "stored"],
)
def test_a_zip_bomb_is_refused_from_its_directory(tmp_path, method, expected):
    path = tmp_path / "bomb.pth"
    overlapping(path, method, 20_000)
    with zipfile.ZipFile(path) as archive:  # any reader takes it for 20 GB
        assert sum(record.file_size for record in archive.infolist()) > 20_000 << 20
    begin = time.process_time()
    line = refusal(path)
    assert time.process_time() - begin < 10, "seconds of computing; 20 GB take a minute"
    assert re.search(expected, line), line


@pytest.mark.parametrize("module", [b"builtins", b"__builtin__"])
def test_a_pickle_that_makes_bytes_out_of_nothing_is_refused(tmp_path, module):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:  # {"a": bytearray(1_500_000_000)}
        made = b"c" + module + b"\nbytearray\nJ" + struct.pack("<i", 1_500_000_000) + b"\x85R"
        archive.writestr("bomb/data.pkl", b"\x80\x02}(X\x01\x00\x00\x00a" + made + b"u.")
        archive.writestr("bomb/version", b"3\n")
    assert "expected tensors and plain values only (it names bytearray)" in refusal(path)


def test_a_directory_without_end_is_not_read(tmp_path):
    path = tmp_path / "a.pth"
    entry = b"PK\1\2" + bytes(42)
    entries = entry * (20 * 2**20 // len(entry))
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, len(entries), 0, 0)
    path.write_bytes(entries + end)
    assert "its directory has 20,971," in refusal(path)


def test_an_archive_that_two_readers_would_read_differently_is_refused(tmp_path):
    with_tensor(GOOD)(tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    start = content.index(b"PK\1\2")
    for name, changed in {
        "a comment": content[:-2] + b"\5\0hello",
        "something after it": content + b"hello",
        "something before it": b"hello" + content,
        "a gap before its end": content[:-22] + b"hello" + content[-22:],
        "a directory within the directory": content[:-6] + struct.pack("<IH", start + 46, 0),
    }.items():
        (tmp_path / "b.pth").write_bytes(changed)
        assert "truncated, damaged or not a PyTorch file" in refusal(tmp_path / "b.pth"), name


def test_an_archive_past_four_gigabytes_has_its_numbers_elsewhere(tmp_path):
    """The records that such an archive ends with, around a small one."""
    with_tensor(GOOD)(tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    start, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
    more = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, end - start, start)
    more += b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    last = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 3, 3, 2**32 - 1, 2**32 - 1, 0)
    (tmp_path / "b.pth").write_bytes(content[:end] + more + last)
    assert load_torch(tmp_path / "b.pth")["tok_embeddings.weight"].tolist() == [0, 0, 0, 0]
    wrong = more[:-8] + struct.pack("<I", end - 100) + more[-4:]
    (tmp_path / "b.pth").write_bytes(content[:end] + wrong + last)
    refusal(tmp_path / "b.pth")


# ------------------------------------------------------------------------------------------------------ its tensors


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(1).expand(10**9), "1,000,000,000 numbers, its storage 1"),
        (torch.zeros(2, 2).to_sparse(), "no dense tensor"),
        (torch.zeros(2, device="meta"), "no dense tensor"),
    ],
)
def test_a_tensor_that_is_not_what_it_seems_is_refused(tensor, expected):
    with pytest.raises(InputError, match=f"a.pth: the tensor 'x.1' .*{expected}"):
        check_tensors({"x": [0, tensor]}, "a.pth")


@pytest.mark.parametrize("elements", [5, 3, 10**12, -4, 2**63])
def test_a_storage_is_as_long_as_its_record(tmp_path, elements):
    """Past a record of 16 bytes lies other memory of the process, which versions of torch before 2.10 would read."""
    with_tensor(tensor(storage(elements), 0, (3,), (1,)))(tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


def test_storages_do_not_swap_their_records(tmp_path):
    """In sum they claim what is there."""
    claims = tensor(storage(4000), 0, (4000,), (1,)) + b"s" + text("b") + tensor(storage(4, "1"), 0, (4,), (1,))
    with_tensor(claims, {"data/1": b"\0" * 16000})(tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


def test_a_list_that_holds_itself_ends(tmp_path):
    endless = [torch.zeros(2)]
    endless.append(endless)
    assert [name for name, _ in named_tensors({"a": endless})] == ["a.0"]
    assert is_finite(endless) and tensor_bytes(endless) == 8


# ------------------------------------------------------------------------------------- other files under that name


def legacy(path):
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())


def scripted(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", b"\x80\x02}.")


OTHERS = {
    "torch before 1.6": (legacy, "torch's format before version 1.6; convert it with torch.save"),
    "torch before 0.2": (tarred, "a tar archive.*save its state_dict"),
    "TorchScript": (scripted, "a TorchScript archive.*save its state_dict"),
    "safetensors": (lambda path: save_file({"a": torch.zeros(3)}, path), "a safetensors file; name it model.safe"),
    "an array": (lambda path: path.write_bytes(b"\x93NUMPY\x01\0" + bytes(99)), "an array of NumPy"),
    "arrays": (lambda path: path.write_bytes(_npz()), "there is no data.pkl in it, but 'a.npy'|not in one folder"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04}."), "a bare pickle, which could run code"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "compressed with gzip; unpack it"),
    "Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a Git LFS pointer.*git lfs pull",
    ),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>\n<html>"), "a web page"),
    "nothing": (lambda path: path.write_bytes(b""), "truncated, damaged or not a PyTorch file"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "truncated, damaged or not a PyTorch file"),
}


def _npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3), b=np.zeros(2))
    return content.getvalue()


@pytest.mark.parametrize("make, expected", OTHERS.values(), ids=OTHERS)
def test_another_file_is_named_with_what_to_do(tmp_path, make, expected):
    make(tmp_path / "weights.pth")
    line = refusal(tmp_path / "weights.pth")
    assert re.search(expected, line), line


@pytest.mark.long
def test_the_conversion_that_is_named_works(tmp_path):
    legacy(tmp_path / "OLD")
    line = refusal(tmp_path / "OLD")
    code = line.partition("convert it with ")[2].replace("OLD", "'OLD'").replace("NEW", "'NEW'")
    subprocess.run([sys.executable, "-c", f"import torch; {code}"], cwd=tmp_path, check=True)
    assert torch.equal(load_torch(tmp_path / "NEW")["a"], torch.arange(3.0))
