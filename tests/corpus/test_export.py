"""The token file as Megatron and nanotron read it. The readers here are written from the formats' descriptions."""

import json
import os
import struct

import numpy as np
import pytest

from model.corpus import export
from model.corpus.export import ends_path, export_megatron, export_nanotron
from model.errors import InputError
from model.text.tokenization import EMBEDDED_TOKENIZER, tokenizer_sha256
from model.token_file.manifest import Manifest, file_sha256, manifest_path, write_manifest

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, 300, 301, 302, 2]]


def write_token_file(path, documents, dtype="uint16", **changes):
    """X.bin, X.json and X.ends, as data processing leaves them."""
    np.concatenate([np.asarray(document, dtype=dtype) for document in documents]).tofile(path)
    ends = np.cumsum([len(document) for document in documents])
    ends.astype("<u8").tofile(ends_path(path))
    values = {
        "dtype": dtype, "vocab_size": 6400, "bos_id": 1, "eos_id": 2, "tokens": int(ends[-1]),
        "documents": len(documents), "tokenizer_sha256": tokenizer_sha256(), "encoder": "test",
        "sha256": file_sha256(path),
    }  # fmt: skip
    write_manifest(path, Manifest(**(values | changes)))
    return path


def read_megatron(prefix):
    """Every document of X.idx and X.bin: a small reader of MMapIndexedDataset."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, starts = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and len(index) == 34 + 12 * sequences + 8 * starts
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    offsets = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    document_starts = np.frombuffer(index, "<i8", starts, 34 + 12 * sequences)
    assert document_starts.tolist() == list(range(sequences + 1))
    tokens, dtype = prefix.with_suffix(".bin").read_bytes(), {8: "<u2", 4: "<i4"}[code]
    return [
        np.frombuffer(tokens, dtype, length, offset).tolist() for length, offset in zip(lengths, offsets, strict=True)
    ]


def read_datatrove(path):
    """Every document of X.ds and X.ds.index, with the token size of X.ds.metadata."""
    name, count, _ = path.with_name(path.name + ".metadata").read_text(encoding="utf-8").split("\n")
    tokens = np.fromfile(path, {"2": "<u2", "4": "<u4"}[name.split("|")[1]])
    ends = np.fromfile(path.with_name(path.name + ".index"), "<u8").tolist()
    assert len(tokens) == int(count) == ends[-1]
    return [tokens[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]


def test_megatron_reads_every_document_back(tmp_path):
    said = []
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    assert export_megatron(path, said.append) == [tmp_path / "a.idx"]
    assert read_megatron(tmp_path / "a") == DOCUMENTS
    assert len(said) == 1 and str(tmp_path / "a.idx") in said[0] and "3 documents" in said[0]


def test_the_megatron_index_is_these_bytes(tmp_path):
    export_megatron(write_token_file(tmp_path / "a.bin", [[1, 7, 2], [1, 2]]), print)
    assert (tmp_path / "a.idx").read_bytes().hex(" ", 1) == (
        "4d 4d 49 44 49 44 58 00 00 "  # MMIDIDX
        "01 00 00 00 00 00 00 00 08 "  # version 1, uint16
        "02 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00 "  # 2 sequences, 3 document starts
        "03 00 00 00 02 00 00 00 "  # lengths in tokens
        "00 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00 "  # offsets in bytes
        "00 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00"  # document starts
    )


def test_uint32_tokens_are_int32_to_megatron(tmp_path):
    documents = [[1, 70_000, 2], [1, (1 << 31) - 1, 2]]
    path = write_token_file(tmp_path / "a.bin", documents, "uint32", vocab_size=1 << 31)
    export_megatron(path, print)
    assert (tmp_path / "a.idx").read_bytes()[17] == 4
    assert read_megatron(tmp_path / "a") == documents


def test_ids_that_int32_cannot_hold_are_refused(tmp_path):
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS, "uint32", vocab_size=(1 << 31) + 1)
    with pytest.raises(InputError, match="2,147,483,648 .*int32"):
        export_megatron(path, print)
    assert not (tmp_path / "a.idx").exists()


def test_nanotron_reads_every_document_back(tmp_path):
    for dtype in ("uint16", "uint32"):
        path = write_token_file(tmp_path / f"{dtype}.bin", DOCUMENTS, dtype)
        written = export_nanotron(path, print)
        assert [file.name for file in written] == [f"{dtype}.ds", f"{dtype}.ds.index", f"{dtype}.ds.metadata"]
        assert read_datatrove(written[0]) == DOCUMENTS
        assert written[2].read_bytes().decode("utf-8") == f"{EMBEDDED_TOKENIZER}|{np.dtype(dtype).itemsize}\n11\n11.0 T"


@pytest.mark.parametrize(
    ("count", "text"),  # what humanize.metric(count, unit="T") of humanize 4.17 gives
    [(2, "2.00 T"), (999, "999 T"), (1000, "1.00 kT"), (1015, "1.01 kT"), (24_900_000, "24.9 MT"),
     (999_999, "1.00 MT"), (3_000_000_000, "3.00 GT"), (123_456_789_012, "123 GT")],
)  # fmt: skip
def test_the_count_is_in_datatroves_words(count, text):
    assert export._in_words(count) == text


def test_tokens_are_not_stored_twice_where_links_are(tmp_path, monkeypatch):
    said = []
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    export_nanotron(path, said.append)
    assert os.path.samefile(path, tmp_path / "a.ds") and "a hard link of a.bin" in said[0]

    os.link(path, tmp_path / "a.ds.tmp")  # what a crash can leave behind: writing to it would be writing to a.bin

    def no_links(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    export_nanotron(path, said.append)
    assert not os.path.samefile(path, tmp_path / "a.ds") and "a copy of a.bin" in said[1]
    assert read_datatrove(tmp_path / "a.ds") == DOCUMENTS
    assert file_sha256(path) == file_sha256(tmp_path / "a.ds")


def test_a_token_file_that_is_a_link_is_exported_with_its_tokens(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = write_token_file(tmp_path / "elsewhere" / "a.bin", DOCUMENTS)
    here = tmp_path / "here"
    here.mkdir()
    for suffix in (".bin", ".json", ".ends"):
        try:
            (here / f"a{suffix}").symlink_to(path.with_suffix(suffix))
        except OSError:
            pytest.skip("no symbolic links")
    export_nanotron(here / "a.bin", print)
    assert not (here / "a.ds").is_symlink()
    path.unlink()
    assert read_datatrove(here / "a.ds") == DOCUMENTS


def test_exporting_again_gives_the_same_and_leaves_no_temporary_file(tmp_path):
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    for _ in range(2):
        export_megatron(path, print)
        export_nanotron(path, print)
    names = ["a.bin", "a.ds", "a.ds.index", "a.ds.metadata", "a.ends", "a.idx", "a.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert read_megatron(tmp_path / "a") == read_datatrove(tmp_path / "a.ds") == DOCUMENTS


def test_a_remade_token_file_leaves_the_earlier_export_whole(tmp_path):
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    export_nanotron(path, print)
    write_token_file(tmp_path / "new.bin", [[1, 9, 2]])
    os.replace(tmp_path / "new.bin", path)  # as data processing does it
    assert read_datatrove(tmp_path / "a.ds") == DOCUMENTS


def test_blocks_of_documents_fit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "BLOCK", 7)
    random = np.random.default_rng(0)
    documents = [[1, *random.integers(3, 6400, random.integers(0, 9)).tolist(), 2] for _ in range(50)]
    path = write_token_file(tmp_path / "a.bin", documents)
    export_megatron(path, print)
    export_nanotron(path, print)
    assert read_megatron(tmp_path / "a") == read_datatrove(tmp_path / "a.ds") == documents


def test_nanotron_gets_the_path_of_the_tokenizer(tmp_path, tokenizer_folder):
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS, tokenizer_sha256=tokenizer_sha256(tokenizer_folder))
    said = []
    export_nanotron(path, said.append, tokenizer_folder)
    assert (tmp_path / "a.ds.metadata").read_text(encoding="utf-8").startswith(f"{tokenizer_folder.resolve()}|2\n")
    export_nanotron(path, said.append)  # made with another than the embedded one, and no word where that is
    assert (tmp_path / "a.ds.metadata").read_text(encoding="utf-8").startswith("Unknown Tokenizer|2\n")
    assert "a.ds.metadata" in said[-1] and "tokenizer's folder" in said[-1]
    with pytest.raises(InputError, match="did not make"):
        export_nanotron(path, print, EMBEDDED_TOKENIZER)


@pytest.mark.parametrize("exporter", [export_megatron, export_nanotron])
@pytest.mark.parametrize("missing", ["a.bin", "a.json", "a.ends"])
def test_a_missing_file_is_named(tmp_path, exporter, missing):
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=f"{missing}: no such file") as error:
        exporter(path, print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ends", "message"),
    [([4, 6, 10], "ends at token 10 of 11"), ([4, 6, 12], "ends at token 12 of 11"), ([4, 4, 11], "document 2 goes"),
     ([6, 4, 11], "from token 6 to 4"), ([0, 4, 11], "document 1 goes"), ([4, 11], "16 bytes"),
     ([4, 1 << 63, 11], "document 2 goes")],
)  # fmt: skip
def test_ends_that_do_not_belong_to_the_tokens_are_refused(tmp_path, monkeypatch, ends, message):
    monkeypatch.setattr(export, "BLOCK", 2)
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    np.array(ends, dtype="<u8").tofile(ends_path(path))
    for exporter in (export_megatron, export_nanotron):
        with pytest.raises(InputError, match=message) as error:
            exporter(path, print)
        assert "a.ends" in str(error.value) and "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.ends", "a.json"]


def test_other_files_are_refused(tmp_path):
    path = write_token_file(tmp_path / "a.bin", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="20 bytes, but its manifest's tokens take 22"):
        export_megatron(path, print)
    write_token_file(path, DOCUMENTS, dtype="uint32")
    values = json.loads(manifest_path(path).read_text(encoding="utf-8")) | {"dtype": "int64"}
    manifest_path(path).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match="dtype is 'int64'"):
        export_nanotron(path, print)
    with pytest.raises(InputError, match="named .bin"):  # a.ds would be its own hard link
        export_nanotron(path.rename(tmp_path / "a.ds"), print)
