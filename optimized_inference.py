"""Generation: one decode loop for a single prompt, a stream, a batch, a chat and a server.

From top to bottom: the loop (`decode`: token ids in, ids and text out, a `Decoding.step` at a time), what a user calls
(`TextGenerator`), and a model with its tokenizer from files (`load_generator`). `GenerationConfig` holds the options.
"""

import contextlib
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from model.errors import InputError, check_type
from model.generation.decoding import Decoding, Event
from model.generation.engine import Engine, can_compile
from model.generation.generation_config import DTYPE_NAMES, GenerationConfig
from model.generation.inference_model import compute_dtype
from model.generation.rows import Rows, fitting_rows, text_bytes
from model.generation.scoring import Score, token_losses
from model.generation.speed import Speed, Stopwatch
from model.kv_cache import cache_bytes
from model.LMConfig import LMConfig
from model.model import Transformer
from model.storage.files import size_text
from model.text.chat_template import valid_text
from model.text.detokenize import Text, new_detokenizer
from model.text.prompts import Message, PromptEncoder
from model.text.tokenization import encode_texts, end_ids, vocabulary_size
from model.weights import load_weights
from model.weights.find import find_weights
from model.weights.load import fitting_tokenizer
from utils import pick_device, pick_dtype, print_text, say

CONTEXT_BYTES = 1 << 30  # for those of one text; a longer context needs --max_seq_len
IDLE_BYTES, IDLE_BYTES_ON_GPU = 256 << 20, 1 << 30  # of keys and values that are kept from one batch to the next
BATCH_SIZE = 64  # prompts that `batch_generate` continues at once: more gain little (benchmarks/RESULTS.md)


# ---------------------------------------------------------------------------------------------------------- the loop


class Sample(NamedTuple):
    """A whole text."""

    text: str
    end: str  # as in Event
    ids: list[int]
    logprobs: list[float]  # of the ids; empty: not requested
    likely: list[list[tuple[int, float]]]  # for each of them the likeliest ids and theirs; empty: not requested


def decode(
    rows: Rows,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    eos_ids: Sequence[int],
    new_text: Callable[[Sequence[int]], Text] | None = None,
    own_seeds: bool = False,
) -> Iterator[Event]:
    """Continue any number of prompts (ids, each of 1 to max_seq_len - 1 tokens), as `Decoding` does.

    The events of a text come in order, mixed with others'.

    Args:
        rows: where the texts are generated, with its engine; cleared first.
        prompts: the next one is taken whenever a row is free.
        new_text: from a prompt's ids, the `Text` that turns the new tokens into characters and may end the text; None:
            tokens only.
        own_seeds: text n draws from seed + n, so that equal prompts get different texts.

    Raises:
        InputError: the logits are not finite, or the settings leave no token to choose.
    """
    config.check_ids(rows.engine.config.vocab_size)
    decoding = Decoding(rows, eos_ids, config.use_cache)
    waiting = iter(enumerate(prompts))
    while True:
        for number, prompt in itertools.islice(waiting, rows.free):
            # Compiled code may be ready by now; it then continues the other rows too.
            repeatable, several = config.seed is not None, rows.capacity > 1
            rows.compiled = rows.engine.choose_decoder(repeatable, several=several)
            text = None if new_text is None else new_text(prompt)
            decoding.admit(number, prompt, config, text, number if own_seeds else 0)
        if not rows.live:
            return
        yield from decoding.step()


# -------------------------------------------------------------------------------------------------------------- text


class TextGenerator:
    """A model and its tokenizer: text in, text out.

    Args:
        model: moved to `device`; None leaves it where it is. It may be in training mode, and stays in its mode.
        tokenizer: a `transformers` fast tokenizer with an eos token, or what `open_tokenizer` gives.
        int8: hold the matrices as int8 (weight-only, a scale for each row); on a CPU.
        compile: on a CPU, whether compiled code decodes. True waits until it is compiled; None uses it as soon as it
            exists, except with a seed, whose text must not depend on that. On a CUDA GPU: see Engine.
        begins_with_bos: prompts begin with the tokenizer's bos, like the documents that the model was trained on.
        chat: as `Weights.chat` records it: the template of chats, and ids that end a text besides the tokenizer's.

    Attributes:
        speed: of the last text of generate or chat; None: nothing was generated.
        end: why that text ended, as in Event; None: it was interrupted.
        say: called with each status line; by default they go to stderr.
        chat_format: what was given as `chat`.

    Raises:
        InputError: the tokenizer has ids without a row in the model's embedding, or a damaged generation_config.json;
            or an id that ends a text has no such row.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer,
        device: torch.device | str | None = None,
        int8: bool = False,
        compile: bool | None = None,
        begins_with_bos: bool = True,
        chat: Mapping | None = None,
    ) -> None:
        check_type("model", model, Transformer, 'load_generator("out/best_model.pth") opens a file and its tokenizer')
        if not hasattr(tokenizer, "backend_tokenizer"):  # transformers' and ours share no type
            found = type(tokenizer).__name__
            raise InputError(
                f"tokenizer: {found} found, a fast tokenizer expected; AutoTokenizer.from_pretrained opens a folder"
            )
        needed, rows = vocabulary_size(tokenizer), model.config.vocab_size
        if needed > rows:
            raise InputError(f"the tokenizer has {needed} tokens, the model's embedding {rows} rows: they do not fit")
        self.model = model if device is None else model.to(device)
        self.tokenizer, self.eos_ids, self.chat_format = tokenizer, end_ids(tokenizer), chat
        if chat:
            self.eos_ids = list(dict.fromkeys([*self.eos_ids, *chat["end_ids"]]))
            tokenizer.chat_template = chat["template"]
            if max(chat["end_ids"]) >= rows:
                raise InputError(
                    f"the weights' description: id {max(chat['end_ids'])} ends an answer, but the embedding has only"
                    f" {rows} rows"
                )
        self.int8, self.compile = int8, compile
        self.say: Callable[[str], None] = say  # may be replaced at any time: pass on `_say`, not its present value
        self.prompts = PromptEncoder(tokenizer, model.config.max_seq_len, begins_with_bos, self._say)
        self.speed: Speed | None = None
        self.end: str | None = None
        self._engine: Engine | None = None
        self._chat: Rows | None = None  # the row that remembers the chat so far
        self._idle: Rows | None = None  # of the last text or batch, for the next: their memory and graphs are there

    def generate(
        self,
        prompt: str,
        config: GenerationConfig | None = None,
        stream: bool = False,
        callback: Callable[[str], None] | None = None,
    ) -> str:
        """Continue a prompt and return the new text, without the prompt.

        An empty prompt is allowed: the model then begins a new document. A callback gets each piece of text as soon as
        its characters are complete; `stream=True` without one prints the pieces to stdout.

        Raises:
            InputError: the prompt is longer than the context less one token.
        """
        ids = self.encode_prompt(prompt)
        with self._rows(1) as rows:
            return self._whole_text(ids, config, _emitter(stream, callback), rows)

    def batch_generate(
        self, prompts: Sequence[str], config: GenerationConfig | None = None, batch_size: int = BATCH_SIZE
    ) -> list[str]:
        """Continue any number of prompts, `batch_size` at a time; results keep the prompts' order.

        A prompt's result is the one it gets alone: padding is masked, and each row draws from its own generator. (In
        float32; 16-bit arithmetic may choose differently where two tokens are nearly as likely.) So with a seed, equal
        prompts get equal results.

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
        with self._rows(min(batch_size, len(prompts))) as rows:
            for event in self.events(prompts, config, rows):
                texts[event.number] += event.text
                if event.end is not None:
                    done.add(event.number)
                while next_one in done:
                    done.remove(next_one)
                    yield texts.pop(next_one)
                    next_one += 1

    def chat(
        self,
        history: Sequence[Message],
        config: GenerationConfig | None = None,
        stream: bool = False,
        callback: Callable[[str], None] | None = None,
    ) -> str:
        """Answer the last message of a history of `{"role": ..., "content": ...}`, in the tokenizer's chat template.

        Where the history outgrows the context, its oldest turns are left out (see `fit_history`). Without a template
        the contents are continued as plain text. `stream` and `callback` as in `generate`.

        Raises:
            InputError: the history is empty or malformed, the template refuses it, or its last message alone is
                longer than the context.
        """
        ids = self.encode_chat(self.fit_history(history, config))
        self.prepare_chat(config)
        return self._whole_text(ids, config, _emitter(stream, callback), self._chat)

    def stream(self, prompt: str, config: GenerationConfig | None = None) -> Iterator[str]:
        """The pieces of `generate`'s text, one after another: `for piece in generator.stream("春风")`."""
        ids = self.encode_prompt(prompt)  # a prompt that cannot be used fails here, not at the first piece

        def pieces() -> Iterator[str]:
            with self._rows(1) as rows:
                yield from (event.text for event in self.events([ids], config, rows) if event.text)

        return pieces()

    def samples(self, prompt: str, n: int, config: GenerationConfig | None = None) -> list[Sample]:
        """n continuations of a prompt, with their ids and why they ended; with a seed, sample k draws from seed + k.

        Raises:
            InputError: as `generate`.
        """
        return self.continued([self.encode_prompt(prompt)] * n, config, own_seeds=True)

    def continued(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig | None = None, own_seeds: bool = False
    ) -> list[Sample]:
        """What follows each of the prompts, which are ids.

        Args:
            own_seeds: as `decode` takes it.
        """
        samples = [Sample("", "", [], [], []) for _ in prompts]
        pieces: list[list[str]] = [[] for _ in prompts]
        with self._rows(min(BATCH_SIZE, len(prompts))) as rows:
            for event in self.events(prompts, config, rows, own_seeds):
                sample = samples[event.number]
                pieces[event.number].append(event.text)
                if event.token is not None:
                    sample.ids.append(event.token)
                    if event.logprob is not None:
                        sample.logprobs.append(event.logprob)
                    if event.likely is not None:
                        sample.likely.append(event.likely)
                if event.end is not None:
                    samples[event.number] = sample._replace(text="".join(pieces[event.number]), end=event.end)
        return samples

    def score(self, text: str) -> Score:
        """How well the model predicts a text of any length, read as one document."""
        ids = encode_texts(self.tokenizer, [valid_text("the text", text)])[0]
        nats = float(token_losses(self.engine(), [self.prompts.delimiters.before_text, *ids]).double().sum())
        return Score(nats, len(ids), len(text.encode()))

    def events(
        self, prompts: Iterable[Sequence[int]], config: GenerationConfig | None, rows: Rows, own_seeds: bool = False
    ) -> Iterator[Event]:
        """Continue prompts' ids in text, as `decode` does."""
        config = _or_default(config)

        def new_text(prompt: Sequence[int]) -> Text:
            return Text(new_detokenizer(self.tokenizer, prompt), config.stop_strings, config.max_repeats)

        return decode(rows, prompts, config, self.eos_ids, new_text, own_seeds)

    def encode_prompt(self, prompt: str) -> list[int]:
        """See PromptEncoder."""
        return self.prompts.encode_prompt(prompt)

    def encode_chat(self, history: Sequence[Message]) -> list[int]:
        """See PromptEncoder."""
        return self.prompts.encode_chat(history)

    def fit_history(self, history: Sequence[Message], config: GenerationConfig | None = None) -> list[Message]:
        """Drop the oldest turns of a history that leaves no room for an answer: see PromptEncoder.

        The room is `max_new_tokens`, or half the context where that is less.
        """
        room = _or_default(config).max_new_tokens
        return self.prompts.fit_history(history, min(room, self.model.config.max_seq_len // 2))

    def prepare_chat(self, config: GenerationConfig | None = None) -> None:
        """Load compiled code for the answers, or start compiling it in the background. `chat` does this itself."""
        engine = self.engine()
        # For what it starts: `decode` asks again for each text.
        engine.choose_decoder(repeatable=config is not None and config.seed is not None, more_to_come=True)
        if self._chat is None:
            self._chat = Rows(engine, 1, remembers=True)

    def engine(self) -> Engine:
        """The engine for the model's present weights; a new one if they changed, which also forgets the chat."""
        if self._engine is None or not self._engine.fits(self.model, self.int8, self.compile):
            self._engine, self._chat, self._idle = None, None, None  # freed before others are made
            self._engine = Engine(self.model, self.int8, self.compile, self._say)
        return self._engine

    @contextlib.contextmanager
    def _rows(self, most: int) -> Iterator[Rows]:
        """Rows for `most` texts, or for as many as BATCH_BYTES of keys and values allow."""
        engine = self.engine()
        capacity = fitting_rows(engine, most)
        rows, self._idle = self._idle, None  # who comes meanwhile gets others
        if rows is None or rows.engine is not engine or rows.capacity != capacity:
            rows = Rows(engine, capacity)
        try:
            yield rows
        finally:
            most = IDLE_BYTES if engine.device.type == "cpu" else IDLE_BYTES_ON_GPU  # where the graphs stay too
            if engine is self._engine and capacity * text_bytes(engine) <= most:
                self._idle = rows

    def _whole_text(
        self, ids: list[int], config: GenerationConfig | None, emit: Callable[[str], None] | None, rows: Rows
    ) -> str:
        pieces, stopwatch, self.end = [], Stopwatch(), None
        try:
            for event in self.events([ids], config, rows):
                if event.token is not None:
                    stopwatch.token()
                self.end = event.end
                if event.text:
                    pieces.append(event.text)
                    if emit is not None:
                        emit(event.text)
        finally:
            self.speed = stopwatch.speed()
        return "".join(pieces)

    def _say(self, line: str) -> None:
        self.say(line)


def _or_default(config: GenerationConfig | None) -> GenerationConfig:
    if config is None:
        return GenerationConfig()
    check_type("config", config, GenerationConfig, "GenerationConfig(top_k=50) makes one")
    return config


def _emitter(stream: bool, callback: Callable[[str], None] | None) -> Callable[[str], None] | None:
    if callback is None and stream:
        return lambda piece: print_text(piece, end="")
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
    """A generator from files; one line on stderr for each automatic choice.

    Args:
        model_path: weights or a checkpoint, ours, a run's folder, a folder of transformers, GGUF … (`model/weights`);
            None takes the newest weights under out/.
        tokenizer_path: a tokenizer's folder; None takes the one that the weights were trained with.
        device: None (or "auto") takes the fastest kind there is.
        dtype: of the weights in memory, a torch.dtype or its name; None is float32, in which a batch gives what
            single prompts give. int8 is for CPUs: a quarter of the bytes to read for each token.
        compile: as in TextGenerator.
        max_seq_len: context in tokens, at most the model's; None takes the model's, or less where the keys and values
            of one text would exceed CONTEXT_BYTES.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others; the device or dtype cannot be used.
    """
    chosen_device, device_reason = pick_device(str(device or "auto"))
    dtype_name = str(dtype or "float32").removeprefix("torch.")
    if dtype_name not in DTYPE_NAMES:
        raise InputError(f"dtype: {dtype_name!r} found, one of {', '.join(DTYPE_NAMES)} expected")
    int8 = dtype_name == "int8"
    if int8 and chosen_device.type != "cpu":
        raise InputError(
            f"dtype: int8 is for generating on a CPU, the device is {chosen_device}; give --device cpu too"
        )
    if compile and not can_compile(chosen_device):
        raise InputError(
            f"compile: compiled code is for CPUs and CUDA GPUs, the device is {chosen_device}; omit --compile"
        )
    chosen_dtype, dtype_reason = pick_dtype("float32" if int8 else dtype_name, chosen_device)
    path, choice = find_weights(model_path)
    if choice is not None:
        say(choice)
    weights = load_weights(path)
    if weights.inferred:
        say(weights.inferred)
    tokenizer = fitting_tokenizer(path, weights, tokenizer_path)
    model = Transformer(_with_context(weights.config, max_seq_len, compute_dtype(chosen_dtype, int8)))
    model.load_state_dict(weights.state_dict)
    say(f"device {chosen_device}: {device_reason}")
    used = "int8" if int8 else str(chosen_dtype).removeprefix("torch.")
    say(f"dtype {used}: {dtype_reason if dtype else 'the default'}")
    model.to(chosen_device, chosen_dtype)
    return TextGenerator(
        model, tokenizer, int8=int8, compile=compile, begins_with_bos=weights.begins_with_bos, chat=weights.chat
    )


def _with_context(config: LMConfig, max_seq_len: int | None, cache_dtype: torch.dtype) -> LMConfig:
    """The shape with the requested context, or with one whose keys and values take at most CONTEXT_BYTES."""
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise InputError(f"max_seq_len: {max_seq_len} found, 1 to {config.max_seq_len} expected, the model's own")
    fitting = CONTEXT_BYTES // cache_bytes(config, cache_dtype)
    if max_seq_len is None and config.max_seq_len > fitting:
        max_seq_len = fitting
        say(
            f"context {fitting:,} tokens of the model's {config.max_seq_len:,}: keys and values of a text take"
            f" {size_text(CONTEXT_BYTES)} then; --max_seq_len sets another"
        )
    return config if max_seq_len is None else dataclasses.replace(config, max_seq_len=max_seq_len)


if __name__ == "__main__":
    raise SystemExit('this is no script: generate with "python inference.py --interactive"')
