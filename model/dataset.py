"""A token file as samples.

A token file `X.bin` is headerless little-endian uint16 (uint32 when the largest id needs it), documents one after
another as `<bos> ids <eos>` (`ids <eos>` where the tokenizer has no bos). Its manifest `X.json` describes it
(`model.token_file.manifest`). A document may be a chat, of which only the answers are learned
(`model.token_file.chats`). Other programs' token files are read too (`model.token_file.token_layout`).
"""

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.errors import InputError, command_line
from model.loss import IGNORE_INDEX
from model.token_file.chats import Chats, read_chats
from model.token_file.manifest import ends_path, learn_path, manifest_path, read_manifest
from model.token_file.packing import find_documents, pack_documents
from model.token_file.token_layout import find_layout, refuse_shortened

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class SampleRange:
    """The numbers of consecutive samples, of which one is left out after each `run`; none if `run` is None.

    Of a file of any size it takes no memory.
    """

    count: int
    begin: int = 0
    run: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The samples at these places, int64 [N] as they are."""
        return self.begin + places + (0 if self.run is None else places // self.run)

    def numbers(self) -> np.ndarray:
        """All of them, int64 [count]."""
        return self[np.arange(self.count, dtype=np.int64)]


class PretrainDataset:
    """A token file cut into samples of `seq_len + 1` tokens; neighbours share one, so every token is predicted once.

    Or packed into samples that begin where documents do (`model.token_file.packing`): then every token but a document's
    first is predicted.

    Chats are always packed, each whole, and only their learned tokens are predicted. Two that are a pair stay together.

    Reads the file through a memory map: nothing is loaded ahead, and all processes share the pages.

    Args:
        path: our token file with its manifest; without one MiniMind's or nanoGPT's headerless uint16, or llm.c's.
        seq_len: tokens that the model reads of each sample.
        vocab_size: rows of the model's embedding; a larger id is an error.
        tokenizer_sha256: of the tokenizer in use, to compare with the manifest's.
        bos_id, eos_id: begin and end each document. If one is given, samples begin where documents do: at each bos, or
            after each eos if there is no bos. Chats need neither.

    Attributes:
        chats: Chats, where the file holds chats; else None.
        held_out_chats: those of them, or of their pairs, that `hold_out` has set aside, int64.

    Raises:
        InputError: the file is missing, differs from its manifest in size, dtype or tokenizer, is too short, or holds
            no document; or it holds chats that cannot be trained on.
    """

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        vocab_size: int,
        tokenizer_sha256: str | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        self.path, self.seq_len, self.vocab_size = Path(path), seq_len, vocab_size
        if not self.path.is_file():
            found = "no plain file" if self.path.exists() else "no such token file"
            command = command_line(
                "python", "optimized_data_processing.py", "--input_path", "YOUR.jsonl", "--output_path", path
            )
            raise InputError(f"{path}: {found}; make it with: {command}")
        self.manifest = read_manifest(path)
        layout = self.layout = find_layout(self.path, self.manifest)
        self._check_tokenizer(tokenizer_sha256)
        is_chat = self.manifest is not None and bool(self.manifest.chat)
        if not is_chat and learn_path(self.path).exists():
            found = "describes texts" if self.manifest else "is missing"
            raise InputError(
                f"{manifest_path(self.path)}: {found}, but {learn_path(self.path)} says that {path} holds chats; copy"
                " the manifest too, or make the file again with optimized_data_processing.py"
            )
        if self.manifest is None and (ends := ends_path(self.path)).exists():
            raise InputError(
                f"{manifest_path(self.path)}: is missing, but {ends} says that this program made {path}; copy the"
                " manifest too, or run optimized_data_processing.py again"
            )
        if layout.count < seq_len + 1 and not is_chat:
            held = f"{layout.count:,} tokens"
            raise InputError(f"{path}: {held}, fewer than one sample of max_seq_len + 1 = {seq_len + 1}")
        self.tokens = np.memmap(self.path, dtype=layout.dtype, mode="r", offset=layout.offset)  # [tokens]
        self.verified_sha256: str | None = None  # of the bytes, once they are verified
        self.packing = None  # None: sample s starts at token s * seq_len
        self.chats: Chats | None = None
        self.held_out_chats = np.arange(0)
        if is_chat:
            self.chats = read_chats(self.path, self.manifest, self.tokens, seq_len)
            self.packing = self.chats.pack(seq_len)
        elif bos_id is not None or eos_id is not None:
            begins = find_documents(self.tokens, bos_id, eos_id)
            if not len(begins):
                found = f"begins in it (bos id {bos_id})" if bos_id is not None else f"ends in it (eos id {eos_id})"
                raise InputError(f"{path}: no document {found}; use sample_start packed")
            self.packing = pack_documents(begins, len(self.tokens), seq_len)

    def _check_tokenizer(self, tokenizer_sha256: str | None) -> None:
        manifest = self.manifest
        if manifest and tokenizer_sha256 and manifest.tokenizer_sha256 != tokenizer_sha256:
            raise InputError(
                f"{self.path}: made with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}…, in use is"
                f" {tokenizer_sha256[:12]}…); set tokenizer_path to that one or make the file again"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len if self.packing is None else len(self.packing.targets)

    def refuse_shortened(self) -> None:
        """Refuse to read files that were shortened after they were opened; see `refuse_shortened`."""
        refuse_shortened(self.path, self.tokens)
        if self.chats is not None:
            refuse_shortened(learn_path(self.path), self.chats.learned)

    def token_arrays(self) -> list[np.ndarray]:
        """The ids of each file that this dataset is made of: this one's, mapped into memory.

        Raises:
            FileShortened: the file is shorter than when it was opened.
        """
        self.refuse_shortened()
        return [self.tokens]

    def count_targets(self, samples: np.ndarray) -> int:
        """Tokens that these samples predict."""
        return len(samples) * self.seq_len if self.packing is None else int(self.packing.targets[samples].sum())

    def count_tokens(self, samples: np.ndarray) -> int:
        """Tokens that the model reads of these samples, whether it predicts them or not; without padding."""
        return len(samples) * self.seq_len if self.packing is None else int(self.packing.tokens[samples].sum())

    def hold_out(self) -> tuple[SampleRange, np.ndarray]:
        """Set samples aside for validation: (for training, held out); see `hold_out`.

        Of chats whole ones, which are packed apart from the others; of fewer than 100 chats none, since a chat that is
        held out is one that the model never learns.
        """
        if self.chats is None:
            return hold_out(len(self))
        training, held_out = hold_out(len(self.chats), fewest=100)
        self.held_out_chats = held_out
        packed = self.chats.pack(self.seq_len, training.numbers())
        self.packing = packed.followed_by(self.chats.pack(self.seq_len, held_out)) if len(held_out) else packed
        return SampleRange(len(packed.targets)), np.arange(len(packed.targets), len(self))

    def _runs(self, sample: int) -> list[tuple[int, int]]:
        """Where the tokens of a sample lie: (start, length) of each run."""
        if self.packing is None:
            return [(sample * self.seq_len, self.seq_len + 1)]
        runs = slice(*self.packing.first[sample : sample + 2])
        return [*zip(self.packing.starts[runs].tolist(), self.packing.lengths[runs].tolist(), strict=True)]

    def fingerprint(self) -> dict:
        """What identifies this data: a resumed run must find the same."""
        sha256 = self.manifest.sha256 if self.manifest else self.verified_sha256
        return {
            "tokens": len(self.tokens),
            "dtype": self.tokens.dtype.name,
            "sha256": sha256,
            "seq_len": self.seq_len,
            "sample_start": self._sample_start,
        } | ({"learn_sha256": self.manifest.chat["learn_sha256"]} if self.chats else {})

    @property
    def _sample_start(self) -> str:
        if self.chats is not None:
            return "pair" if self.chats.are_pairs else "chat"
        return "packed" if self.packing is None else "document"

    def read_ahead(self, samples: np.ndarray) -> None:
        """Ask the system to read samples from the disk, all at once, and do not wait: from a network disk `batch` would
        wait milliseconds for each. Windows has no such call."""
        pages = self.tokens.base  # the map, which begins where a page of the file does
        if not hasattr(pages, "madvise"):
            return
        before, itemsize = self.layout.offset % mmap.ALLOCATIONGRANULARITY, self.tokens.itemsize
        for start, length in (run for sample in samples for run in self._runs(int(sample))):
            begin = before + start * itemsize
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, first, begin + length * itemsize - first)

    def batch(self, samples: np.ndarray, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read samples into inputs and targets, int64 [rows, seq_len] each.

        Missing rows, and what a sample leaves empty, are padded with targets that no loss counts, so that every batch
        has the same shape. The last token of a run has no target, nor has one of a chat that precedes an unlearned one.

        Raises:
            FileShortened: the file is shorter than when it was opened.
            InputError: an id that the model has no embedding for.
        """
        self.refuse_shortened()
        inputs = torch.zeros(rows, self.seq_len, dtype=torch.int64)
        targets = torch.full((rows, self.seq_len), IGNORE_INDEX, dtype=torch.int64)
        for row, sample in enumerate(samples):
            place = 0
            for start, length in self._runs(int(sample)):
                run = torch.from_numpy(self.tokens[start : start + length].astype(np.int64))
                target = run[1:]
                if self.chats is not None:
                    learned = torch.from_numpy(self.chats.learned[start + 1 : start + length] != 0)
                    target = target.where(learned, IGNORE_INDEX)
                targets[row, place : place + length - 1] = target
                read = min(length, self.seq_len - place)  # a sample's very last token is a target only
                inputs[row, place : place + read] = run[:read]
                place += length
        largest = int(max(inputs.max(), targets.max()))
        if largest >= self.vocab_size:
            raise InputError(f"{self.path}: holds id {largest}, but the model has {self.vocab_size} (vocab_size)")
        return inputs, targets

    def number_runs(self, samples: np.ndarray, rows: int) -> torch.Tensor:
        """The number of each token's run within its sample, as `batch` reads them; padding has the last number.

        Returns:
            int64 [rows, seq_len], for `documents` of the model: chats never attend to each other.
        """
        numbers = torch.zeros(rows, self.seq_len, dtype=torch.int64)
        for row, sample in enumerate(samples):
            place = 0
            for _, length in self._runs(int(sample)):
                place += length
                numbers[row, place:] += 1
        return numbers


def number_documents(
    inputs: torch.Tensor, targets: torch.Tensor, bos_id: int | None, eos_id: int | None = None
) -> torch.Tensor:
    """Number the documents in each row of a batch: int64 [B, T], rising by one where a document begins.

    A document begins with `bos_id`, or after `eos_id` if there is no bos; if both are one token, with the second of two
    in a row. It also begins after a token without a target, which nothing continues.
    """
    begins = torch.zeros_like(inputs, dtype=torch.bool)
    begins[:, 1:] = targets[:, :-1] == IGNORE_INDEX
    if bos_id is None:
        begins[:, 1:] |= inputs[:, :-1] == eos_id
    else:
        begins |= (inputs == bos_id) & (targets != eos_id if bos_id == eos_id else True)
    return begins.cumsum(1)


def verify_tokens(dataset: PretrainDataset, between_blocks: Callable[[], None] = lambda: None) -> str:
    """Read a whole token file, before hours are spent on it; returns its SHA-256 (hex).

    Args:
        between_blocks: called after each block; what it raises ends the reading.

    Raises:
        InputError: it is not the file that its manifest describes; it holds an id that the model has no embedding for,
            with the first such place; or it cannot be read to its end.
    """
    path, dtype, digest = dataset.path, dataset.tokens.dtype, hashlib.sha256()
    block, read, outside = bytearray(BLOCK_BYTES), 0, None  # outside: the first id past the vocabulary, and where
    try:
        with open(path, "rb") as file:
            digest.update(file.read(dataset.layout.offset))
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
                ids = np.frombuffer(block, dtype, count // dtype.itemsize)
                if outside is None and len(ids) and ids.max() >= dataset.vocab_size:
                    place = int(np.argmax(ids >= dataset.vocab_size))
                    outside = int(ids[place]), read // dtype.itemsize + place
                read += count
                between_blocks()
    except OSError as error:
        raise InputError(f"{path}: cannot be read past byte {read:,} ({error.strerror})") from error
    sha256 = digest.hexdigest()
    if dataset.manifest is not None and dataset.manifest.sha256 != sha256:
        found = f"sha256 {dataset.manifest.sha256[:12]}… then, {sha256[:12]}… now"
        raise InputError(f"{path}: changed since its manifest was made ({found}); make both again")
    if outside is not None:
        raise InputError(
            f"{path}: id {outside[0]} at token {outside[1]:,}, but the model has {dataset.vocab_size} (vocab_size);"
            " it was made with another tokenizer, or is no token file"
        )
    return sha256


def hold_out(samples: int, fewest: int = 2) -> tuple[SampleRange, np.ndarray]:
    """Set a fixed share of the samples aside for validation: (for training, held out), the latter int64 indices.

    One in a hundred, at most 1,000, spread evenly over the file and the same whatever the seed, so that runs compare.
    Fewer than `fewest` samples give none.
    """
    if samples < fewest:
        return SampleRange(samples), np.arange(0)
    stride = max(100, -(-samples // 1000)) if samples >= 100 else samples
    held_out = np.arange(stride - 1, samples, stride)
    return SampleRange(samples - len(held_out), run=stride - 1), held_out
