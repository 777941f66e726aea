"""Generation: one decode loop for a single prompt, a stream, a batch and a chat.

From top to bottom: what can be set (GenerationConfig), the loop (`decode`: token ids in, ids out), text around it
(TextGenerator), and a model with its tokenizer from files (`load_generator`).
"""

import contextlib
import dataclasses
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from model.errors import InputError
from model.generation.engine import Engine
from model.generation.generation_config import GenerationConfig
from model.generation.rows import Rows
from model.generation.sampling import sample
from model.generation.scoring import Score, token_losses
from model.generation.speed import Speed, Stopwatch
from model.kv_cache import cache_bytes
from model.LMConfig import LMConfig
from model.model import Transformer
from model.storage.files import size_text
from model.text.chat_template import check_history, encode_chat, valid_text
from model.text.detokenize import Text, new_detokenizer
from model.text.tokenization import Delimiters, delimiters, encode_texts, end_ids, vocabulary_size
from model.weights import load_weights
from model.weights.load import fitting_tokenizer
from utils import pick_device, pick_dtype, say

BATCH_BYTES = 4 << 30  # of the keys and values of all texts that are written at once
CONTEXT_BYTES = 1 << 30  # of those of one text; a longer context has to be asked for
BATCH_SIZE = 16  # prompts that `batch_generate` holds in memory at once
OUT_DIR = Path("out")
DTYPES = ("float32", "bfloat16", "float16", "int8")


# ---------------------------------------------------------------------------------------------------------- the loop


class Event(NamedTuple):
    """What happened to the text of prompt `number`: a token was chosen, or it ended, or both."""

    number: int
    token: int | None  # None: the end, which is no part of the text
    end: str | None  # as in Row; None: it goes on
    logprob: float | None  # of the token that was chosen, the end included, where it was asked for


class Piece(NamedTuple):
    """The next piece of a text."""

    number: int  # of its prompt
    text: str  # may be "": a token often ends within a character
    end: str | None  # with the last piece, why the text ended: "eos", "length", "stop_string" or "repeats"
    event: Event  # that it came with


class Sample(NamedTuple):
    """A whole text."""

    text: str
    end: str  # as in Piece
    ids: list[int]
    logprobs: list[float]  # of the ids, where they were asked for


@torch.inference_mode()
def decode(
    engine: Engine,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    eos_ids: Sequence[int],
    rows: Rows | None = None,
    stopped: Container[int] = (),
    own_seeds: bool = False,
) -> Iterator[Event]:
    """Continue any number of prompts (ids, each of 1 to max_seq_len - 1 tokens); one that ends makes room for the next.

    A text ends at an eos, after `max_new_tokens`, where it fills the context, or once the caller has put its number
    into `stopped`. It is the text that its prompt gets alone, up to float rounding.

    Args:
        rows: where they are written; None: one at a time.
        own_seeds: text n draws from the seed plus n, so that equal prompts get different texts.
    """
    rows = rows or Rows(engine, 1)
    rows.clear()
    processors, warpers = config.processors(eos_ids), config.warpers()
    waiting = enumerate(prompts)
    while True:
        for number, prompt in itertools.islice(waiting, rows.free):
            seed = config.seed if config.seed is None or not own_seeds else (config.seed + number) % 2**63
            engine.look_for_compiled(config.seed is not None)
            generator = None if config.greedy else random.Random(seed)  # noqa: S311 (None: from fresh entropy)
            rows.admit(number, prompt, config.max_new_tokens, generator)
        if not rows.rows:
            return

        logits = rows.next_logits(not config.use_cache, repeatable=config.seed is not None)  # float32 [rows, V]
        if not logits.amax(-1).isfinite().all():  # NaN counts as the largest
            problem = "the weights give logits that are not finite: the training diverged, or the file is damaged"
            raise InputError(problem)
        given = logits
        if processors:
            tokens, output = rows.written()
            for process in processors:
                logits = process(logits, tokens, output)
        generators = None if config.greedy else [row.generator for row in rows.rows]
        chosen = sample(logits, generators, warpers)

        logprobs = [None] * len(chosen)
        if config.logprobs:
            picked = torch.tensor(chosen, device=given.device)[:, None]
            logprobs = given.log_softmax(-1).gather(1, picked)[:, 0].tolist()
        rows.add(chosen, eos_ids)
        for row, token, logprob in zip(rows.rows, chosen, logprobs, strict=True):
            yield Event(row.number, None if row.end == "eos" else token, row.end, logprob)
            if row.end is None and row.number in stopped:
                row.end = "stopped"
        rows.drop_ended()


# -------------------------------------------------------------------------------------------------------------- text


class TextGenerator:
    """A model and its tokenizer: text in, text out.

    Args:
        model: moved to `device`; None leaves it where it is.
        tokenizer: a `transformers` fast tokenizer with an eos token.
        int8: hold the matrices as int8 (weight-only, a scale for each row); on a CPU.
        compile: on a CPU, whether a compiled step writes single texts. True waits until it is compiled; None uses it
            where it is there already or meanwhile, except with a seed, whose text must not depend on that.
        begins_with_bos: prompts are read behind the tokenizer's bos, as the documents that the model was trained on.

    Raises:
        InputError: the tokenizer has ids that the model has no embedding for, or a damaged generation_config.json.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer,
        device: torch.device | str | None = None,
        int8: bool = False,
        compile: bool | None = None,
        begins_with_bos: bool = True,
    ) -> None:
        needed, rows = vocabulary_size(tokenizer), model.config.vocab_size
        if needed > rows:
            raise InputError(f"the tokenizer has {needed} tokens, the model's embedding {rows} rows: they do not fit")
        self.model = model if device is None else model.to(device)
        self.tokenizer, self.eos_ids = tokenizer, end_ids(tokenizer)
        self.delimiters = delimiters(tokenizer) if begins_with_bos else Delimiters(None, tokenizer.eos_token_id)
        self.int8, self.compile = int8, compile
        self.speed: Speed | None = None  # of the last text of generate or chat
        self._said_no_template = False
        self._last_engine: Engine | None = None
        self._chat: Rows | None = None  # the row that remembers the chat so far

    def generate(
        self,
        prompt: str,
        config: GenerationConfig | None = None,
        stream: bool = False,
        callback: Callable[[str], None] | None = None,
    ) -> str:
        """Continue a prompt and return the new text, without the prompt.

        An empty prompt is allowed: the model then begins a document of its own. With a callback, each piece of text
        goes to it as soon as its characters are whole; `stream=True` without one prints the pieces to stdout.

        Raises:
            InputError: the prompt is longer than the context less one token.
        """
        return self._generate(self.encode_prompt(prompt), config, _emitter(stream, callback))

    def batch_generate(
        self, prompts: Sequence[str], config: GenerationConfig | None = None, batch_size: int = BATCH_SIZE
    ) -> list[str]:
        """Continue any number of prompts, `batch_size` at a time; results keep the prompts' order.

        A prompt's result is the one it gets alone: rows are masked from their padding, and each row draws from its
        own generator. (In float32; 16-bit arithmetic may choose differently where two tokens are nearly as likely.)
        So with a seed, equal prompts get equal results.

        Raises:
            InputError: a prompt is longer than the context less one token; nothing was generated then.
        """
        if isinstance(prompts, str):
            raise InputError("batch_generate takes a list of prompts; use generate for a single one")
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        return list(self.completions(encoded, config, batch_size))

    def completions(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig | None = None, batch_size: int = BATCH_SIZE
    ) -> Iterator[str]:
        """The texts that follow prompts' ids, in their order, each as soon as it and those before it are done."""
        texts, done, next_one = defaultdict(str), set(), 0
        for piece in self.pieces(prompts, config, self._rows(min(batch_size, len(prompts)))):
            texts[piece.number] += piece.text
            if piece.end is not None:
                done.add(piece.number)
            while next_one in done:
                done.remove(next_one)
                yield texts.pop(next_one)
                next_one += 1

    def chat(
        self,
        history: Sequence[dict[str, str]],
        config: GenerationConfig | None = None,
        stream: bool = False,
        callback: Callable[[str], None] | None = None,
    ) -> str:
        """Answer the last message of a history of `{"role": ..., "content": ...}`, in the tokenizer's chat template.

        Where the history outgrows the context, its oldest turns are left out (see `fit_history`). A tokenizer
        without a template gets plain continuation of the contents. `stream` and `callback` as in `generate`.

        Raises:
            InputError: the history is empty or malformed, the template refuses it, or its last message alone is
                longer than the context.
        """
        ids = self.encode_chat(self.fit_history(history, config))
        self.prepare_chat(config)
        return self._generate(ids, config, _emitter(stream, callback), self._chat_rows())

    def stream(self, prompt: str, config: GenerationConfig | None = None) -> Iterator[str]:
        """The pieces of `generate`'s text, one after another: `for piece in generator.stream("春风")`."""
        ids = self.encode_prompt(prompt)  # what is wrong with the prompt is said now, not at the first piece
        return (piece.text for piece in self.pieces([ids], config) if piece.text)

    def samples(self, prompt: str, n: int, config: GenerationConfig | None = None) -> list[Sample]:
        """n continuations of a prompt, with their ids and why they ended; with a seed, each draws from one of its own.

        Raises:
            InputError: as `generate`.
        """
        prompts = [self.encode_prompt(prompt)] * n
        found = [Sample("", "", [], []) for _ in prompts]
        for piece in self.pieces(prompts, config, self._rows(min(BATCH_SIZE, n)), own_seeds=True):
            sample, event = found[piece.number], piece.event
            if event.token is not None:
                sample.ids.append(event.token)
                if event.logprob is not None:
                    sample.logprobs.append(event.logprob)
            found[piece.number] = sample._replace(text=sample.text + piece.text, end=piece.end or "")
        return found

    def score(self, text: str) -> Score:
        """How well the model predicts a text of any length, as a document of its own."""
        ids = encode_texts(self.tokenizer, [valid_text("the text", text)])[0]
        with evaluation_mode(self.model):
            nats = float(token_losses(self.engine(), [self.delimiters.before_text, *ids]).double().sum())
        return Score(nats, len(ids), len(text.encode()))

    def prepare_chat(self, config: GenerationConfig | None = None) -> None:
        """Before an answer begins: have compiled what reads it, in the background, or use it if it is there."""
        repeatable = config is not None and config.seed is not None
        if not repeatable:
            self.engine().expect_more()
        self.engine().look_for_compiled(repeatable)

    def engine(self) -> Engine:
        """What reads tokens with the model's weights as they are now."""
        if self._last_engine is None or not self._last_engine.fits(self.model, self.int8, self.compile):
            self._last_engine, self._chat = Engine(self.model, self.int8, self.compile, say), None
        return self._last_engine

    def _rows(self, most: int) -> Rows:
        """Room for so many texts, or as many as the memory for keys and values allows."""
        fitting = BATCH_BYTES // (cache_bytes(self.model.config, self.model.dtype) * self.model.config.max_seq_len)
        return Rows(self.engine(), max(1, min(most, fitting)))

    def _chat_rows(self) -> Rows:
        """The row that remembers the chat so far, so that a turn reads only what is new; not if the weights changed."""
        engine = self.engine()
        if self._chat is None:
            self._chat = Rows(engine, 1, remembers=True)
        return self._chat

    def _generate(
        self,
        ids: list[int],
        config: GenerationConfig | None,
        emit: Callable[[str], None] | None,
        rows: Rows | None = None,
    ) -> str:
        rows = rows or Rows(self.engine(), 1)
        whole, stopwatch = [], Stopwatch()
        try:
            for piece in self.pieces([ids], config, rows):
                stopwatch.token()
                if piece.text:
                    whole.append(piece.text)
                    if emit is not None:
                        emit(piece.text)
        finally:
            self.speed = stopwatch.speed()
        return "".join(whole)

    def fit_history(
        self, history: Sequence[dict[str, str]], config: GenerationConfig | None = None
    ) -> list[dict[str, str]]:
        """The history without its oldest turns, where it would not leave room for an answer; a line says how many.

        A turn is a user's message with what follows it. System messages at the start and the last turn stay. The room
        is `max_new_tokens`, or half the context where that is less.

        Raises:
            InputError: as `chat`.
        """
        context = self.model.config.max_seq_len
        room = min((config or GenerationConfig()).max_new_tokens, context // 2)
        kept = check_history(history)
        system = 0
        while kept[system]["role"] == "system" and system < len(kept) - 1:
            system += 1
        while len(self.encode_chat(kept, check=False)) > context - room:
            next_turn = system + 1
            while next_turn < len(kept) and kept[next_turn]["role"] != "user":
                next_turn += 1
            if next_turn >= len(kept):
                self.encode_chat(kept)  # one turn is left: less room for the answer, or an error if there is none
                break
            del kept[system:next_turn]
        if len(kept) < len(history):
            say(f"context of {context} tokens: the {len(history) - len(kept)} oldest messages of the chat are left out")
        return kept

    def encode_prompt(self, prompt: str) -> list[int]:
        """`<bos> ids`, as documents begin in training. A control token that the prompt spells out stays text.

        Without a bos `ids`; where there are none, the eos, after which documents begin.
        """
        return self._fitting("prompt", self._encode_start(valid_text("the prompt", prompt)))

    def encode_chat(self, history: Sequence[dict[str, str]], check: bool = True) -> list[int]:
        """A history's ids, up to where the answer begins. A control token that a content spells out stays text.

        Raises:
            InputError: as `chat`; with `check=False` any length is accepted.
        """
        contents = [message["content"] for message in history]
        if not self.tokenizer.chat_template:
            if not self._said_no_template:
                say("this tokenizer has no chat template: the chat is continued as plain text")
                self._said_no_template = True
            ids = self._encode_start("\n".join(contents))
        else:
            ids = encode_chat(self.tokenizer, history)
        return self._fitting("chat", ids) if check else ids

    def pieces(
        self,
        prompts: Iterable[Sequence[int]],
        config: GenerationConfig | None = None,
        rows: Rows | None = None,
        own_seeds: bool = False,
    ) -> Iterator[Piece]:
        """Continue prompts' ids in text, as `decode` does with the same arguments.

        The pieces of one text follow each other; those of different texts mix.
        """
        config, started, stopped = config or GenerationConfig(), {}, set()

        def known() -> Iterator[Sequence[int]]:
            for number, prompt in enumerate(prompts):
                started[number] = Text(new_detokenizer(self.tokenizer, prompt), config.stop_strings, config.max_repeats)
                yield prompt

        with evaluation_mode(self.model):
            rows = rows or Rows(self.engine(), 1)
            for event in decode(rows.engine, known(), config, self.eos_ids, rows, stopped, own_seeds):
                text, end = started[event.number].add(event.token, event.end)
                yield Piece(event.number, text, end, event)
                if end is not None:
                    stopped.add(event.number)
                    del started[event.number]

    def _encode_start(self, text: str) -> list[int]:
        """Ids of a document that begins with this text."""
        ids = [*self.delimiters.opening, *encode_texts(self.tokenizer, [text])[0]]
        return ids or [self.delimiters.before_text]

    def _fitting(self, what: str, ids: list[int]) -> list[int]:
        context = self.model.config.max_seq_len
        if len(ids) > context - 1:
            most = f"the model's context of {context} takes at most {context - 1}"
            raise InputError(f"the {what} has {len(ids)} tokens, {most}; shorten it")
        return ids


@contextlib.contextmanager
def evaluation_mode(model: Transformer) -> Iterator[None]:
    """Dropout off; afterwards the model is as it was, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _emitter(stream: bool, callback: Callable[[str], None] | None) -> Callable[[str], None] | None:
    if callback is None and stream:
        return lambda piece: print(piece, end="", flush=True)
    return callback


# ------------------------------------------------------------------------------------------------------------- files


def load_generator(
    model_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    compile: bool | None = None,
    max_seq_len: int | None = None,
) -> TextGenerator:
    """A generator from files; one line on stderr for each choice that was made.

    Args:
        model_path: weights or a checkpoint, ours, a folder of transformers, GGUF … (`model/weights`); None takes the
            newest final weights under out/.
        tokenizer_path: a tokenizer's folder; None takes the one that the weights were trained with.
        device: None (or "auto") takes the fastest kind there is.
        dtype: of the weights in memory, a torch.dtype or its name; None is float32, in which a batch gives what
            single prompts give. int8 is for CPUs: a fourth of the bytes to read for each token.
        compile: as in TextGenerator.
        max_seq_len: of the context, at most the model's own; None takes that, as far as the keys and values of a text
            then take no more than CONTEXT_BYTES.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others; the device or dtype cannot be used.
    """
    chosen_device, device_reason = pick_device(str(device or "auto"))
    asked = str(dtype or "float32").removeprefix("torch.")
    if asked not in DTYPES:
        raise InputError(f"dtype: {asked!r} found, one of {', '.join(DTYPES)} expected")
    int8 = asked == "int8"
    if int8 and chosen_device.type != "cpu":
        raise InputError(
            f"dtype: int8 is for generating on a CPU, the device is {chosen_device}; give --device cpu too"
        )
    if compile and chosen_device.type != "cpu":
        raise InputError(f"compile: the compiled step is for CPUs, the device is {chosen_device}; leave --compile away")
    chosen_dtype, dtype_reason = pick_dtype("float32" if int8 else asked, chosen_device)
    path = Path(model_path) if model_path is not None else newest_weights()
    weights = load_weights(path)
    if weights.inferred:
        say(weights.inferred)
    tokenizer = fitting_tokenizer(path, weights, tokenizer_path)
    model = Transformer(_with_context(weights.config, max_seq_len, chosen_dtype))
    model.load_state_dict(weights.state_dict)
    say(f"device {chosen_device}: {device_reason}")
    shown = "int8" if int8 else str(chosen_dtype).removeprefix("torch.")
    say(f"dtype {shown}: {dtype_reason if dtype else 'the default'}")
    model.to(chosen_device, chosen_dtype)
    return TextGenerator(model, tokenizer, int8=int8, compile=compile, begins_with_bos=weights.begins_with_bos)


def _with_context(config: LMConfig, max_seq_len: int | None, dtype: torch.dtype) -> LMConfig:
    """The shape with the context that was asked for, or one that is not out of all proportion."""
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise InputError(f"max_seq_len: {max_seq_len} found, 1 to {config.max_seq_len} expected, the model's own")
    fitting = CONTEXT_BYTES // cache_bytes(config, dtype)
    if max_seq_len is None and config.max_seq_len > fitting:
        max_seq_len = fitting
        say(
            f"context {fitting:,} tokens of the model's {config.max_seq_len:,}: keys and values of a text take"
            f" {size_text(CONTEXT_BYTES)} then; for another: --max_seq_len"
        )
    return config if max_seq_len is None else dataclasses.replace(config, max_seq_len=max_seq_len)


def newest_weights() -> Path:
    """The newest out/pretrain_*.pth, else out/best_model.pth."""
    final = sorted(OUT_DIR.glob("pretrain_*.pth"), key=lambda path: path.stat().st_mtime)
    best = OUT_DIR / "best_model.pth"
    if final:
        say(f"weights {final[-1].as_posix()}: the newest final weights under {OUT_DIR}/")
        return final[-1]
    if best.is_file():
        say(f"weights {best.as_posix()}: no final weights (pretrain_*.pth) under {OUT_DIR}/ yet")
        return best
    raise InputError(f"no weights under {OUT_DIR}/: train first (python train.py), or give --model_path")
