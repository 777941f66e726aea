"""Generation: one decode loop for a single prompt, a stream, a batch and a chat.

From top to bottom: what can be set (GenerationConfig), the loop (`decode`: token ids in, ids out), text around it
(TextGenerator), and a model with its tokenizer from files (`load_generator`).
"""

import contextlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.chat_template import render_template
from model.checkpoint import load_weights
from model.detokenize import Text, new_detokenizer
from model.errors import InputError
from model.kv_cache import KVCache
from model.model import Transformer
from model.sampling import (
    PADDING,
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    OutputPenalties,
    Processor,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    sample,
)
from model.tokenization import EMBEDDED_TOKENIZER, encode_texts, load_tokenizer, tokenizer_sha256, vocabulary_size
from utils import pick_device, pick_dtype, say

BATCH_SIZE = 16  # prompts that `batch_generate` holds in memory at once
GREEDY_BELOW = 1e-4  # a temperature under this means greedy: dividing by it could overflow
OUT_DIR = Path("out")
DTYPES = ("float32", "bfloat16", "float16")


# ---------------------------------------------------------------------------------------------------------- settings


@dataclass
class GenerationConfig:
    """How to choose tokens, and how many.

    Raises:
        InputError: values that cannot be used; all of them are named at once.
    """

    do_sample: bool = True  # False: greedy, the likeliest token each time
    temperature: float = 0.8  # 0 means greedy
    top_k: int = 50  # 0: off
    top_p: float = 0.9  # 1: off
    min_p: float = 0.0  # 0: off
    max_new_tokens: int = 100
    min_new_tokens: int = 0  # the text does not end before
    repetition_penalty: float = 1.1  # 1: off; small models repeat themselves without one
    presence_penalty: float = 0.0  # 0: off; of what the output holds, not the prompt
    frequency_penalty: float = 0.0  # 0: off; times the tokens' number in the output
    no_repeat_ngram_size: int = 0  # 0: off
    stop_strings: Sequence[str] = ()  # the text ends before any of these
    max_repeats: int = 0  # 0: off; the text ends once its last tokens are one passage so many times
    logit_bias: dict[int, float] | None = None  # added to the logits of these ids; -inf bans one
    use_cache: bool = True  # False recomputes the whole sequence for each token: slow, to compare with
    seed: int | None = None  # equal seeds give equal text; None: different each time

    def __post_init__(self) -> None:
        problems = generation_problems(self)
        if problems:
            raise InputError("; ".join(problems))

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < GREEDY_BELOW

    def processors(self, eos_ids: Sequence[int]) -> list[Processor]:
        """What changes the logits, in transformers' order. Greedy knows the bias and the penalties only."""
        processors: list[Processor] = []
        if self.logit_bias:
            processors.append(LogitBias(self.logit_bias))
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenalty(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            processors.append(NoRepeatNgram(self.no_repeat_ngram_size))
        if self.min_new_tokens:
            processors.append(MinNewTokens(self.min_new_tokens, eos_ids))
        if self.presence_penalty or self.frequency_penalty:
            processors.append(OutputPenalties(self.presence_penalty, self.frequency_penalty))
        if self.greedy:
            return processors
        if self.temperature != 1:
            processors.append(Temperature(self.temperature))
        if self.top_k:
            processors.append(TopK(self.top_k))
        if self.top_p < 1:
            processors.append(TopP(self.top_p))
        if self.min_p:
            processors.append(MinP(self.min_p))
        return processors


def generation_problems(config: GenerationConfig) -> list[str]:
    """Every value that cannot be used: one text each, naming the setting, the value and what is accepted."""

    def whole(value, least: int) -> bool:
        return type(value) is int and value >= least

    def number(value) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def usable_bias(bias) -> bool:
        return isinstance(bias, dict) and all(
            whole(index, 0) and (number(value) or value == -math.inf) for index, value in bias.items()
        )

    seed, penalty, bias, most = config.seed, config.repetition_penalty, config.logit_bias, config.max_new_tokens
    stops = config.stop_strings
    accepted = {  # setting: (is it usable, what would be)
        "do_sample": (type(config.do_sample) is bool, "true or false"),
        "temperature": (number(config.temperature) and config.temperature >= 0, "a number from 0 (greedy) up"),
        "top_k": (whole(config.top_k, 0), "a whole number from 0 (off) up"),
        "top_p": (number(config.top_p) and 0 <= config.top_p <= 1, "a number from 0 to 1 (off)"),
        "min_p": (number(config.min_p) and 0 <= config.min_p <= 1, "a number from 0 (off) to 1"),
        "max_new_tokens": (whole(most, 1), "a whole number from 1 up"),
        "repetition_penalty": (number(penalty) and penalty > 0, "a number above 0 (1: off)"),
        "min_new_tokens": (
            whole(config.min_new_tokens, 0) and (not whole(most, 1) or config.min_new_tokens <= most),
            "a whole number from 0 to max_new_tokens",
        ),
        "presence_penalty": (number(config.presence_penalty), "a number (0: off)"),
        "frequency_penalty": (number(config.frequency_penalty), "a number (0: off)"),
        "stop_strings": (
            type(stops) in (list, tuple) and all(type(stop) is str and stop for stop in stops),
            "a list of texts",
        ),
        "max_repeats": (
            whole(config.max_repeats, 0) and config.max_repeats != 1,
            "0 (off) or a whole number from 2 up",
        ),
        "logit_bias": (bias is None or usable_bias(bias), "None or numbers by token id, -inf to ban one"),
        "no_repeat_ngram_size": (whole(config.no_repeat_ngram_size, 0), "a whole number from 0 (off) up"),
        "use_cache": (type(config.use_cache) is bool, "true or false"),
        "seed": (seed is None or (whole(seed, 0) and seed < 2**63), "None or a whole number from 0 to 2**63 - 1"),
    }
    return [
        f"{name}: {getattr(config, name)!r} is not {expected}"
        for name, (usable, expected) in accepted.items()
        if not usable
    ]


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(slots=True)
class Row:
    """A text in the making: one of the rows that a step of the model continues."""

    number: int  # of its prompt
    length: int  # tokens that it has, and
    start: int  # those of its prompt
    limit: int  # at which it ends
    generator: torch.Generator | None  # None: greedy
    end: str | None = None  # why it ended: "eos", "length" or "stopped"


class Event(NamedTuple):
    """What happened to the text of prompt `number`: a token was chosen, or it ended, or both."""

    number: int
    token: int | None  # None: the end, which is no part of the text
    end: str | None  # as in Row; None: it goes on


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    eos_ids: Sequence[int],
    rows_at_once: int = 1,
    stopped: Container[int] = (),
) -> Iterator[Event]:
    """Continue any number of prompts (ids, each of 1 to max_seq_len - 1 tokens); one that ends makes room for the next.

    A text ends at an eos, after `max_new_tokens`, where it fills the context, or once the caller has put its number
    into `stopped`. It is the text that its prompt gets alone, up to float rounding.

    Args:
        rows_at_once: texts that are continued together.
    """
    device, context = model.tok_embeddings.weight.device, model.config.max_seq_len
    processors = config.processors(eos_ids)
    cache = KVCache(model.config, rows_at_once, context, device=device, dtype=model.tok_embeddings.weight.dtype)
    texts = torch.full((rows_at_once, context), PADDING, device=device)  # prompts and outputs, as far as they are
    waiting, rows = enumerate(prompts), []
    while True:
        going_on = len(rows)
        for number, prompt in itertools.islice(waiting, rows_at_once - going_on):
            generator = None if config.greedy else new_generator(config.seed, device)
            limit = min(context, len(prompt) + config.max_new_tokens)
            texts[len(rows)] = PADDING
            texts[len(rows), : len(prompt)] = torch.tensor(prompt, device=device)
            rows.append(Row(number, len(prompt), len(prompt), limit, generator))
        if not rows:
            return

        if not config.use_cache:
            going_on = 0  # all of them are read anew
        logits = [read_last(model, cache, rows[:going_on], texts)] if going_on else []
        if going_on < len(rows):
            logits.append(read_texts(model, cache, rows, going_on, texts))
        logits = torch.cat(logits)  # float32 [rows, V]
        if not logits.isfinite().all():
            raise InputError(
                "the weights give logits that are not finite: the training diverged, or the file is damaged"
            )
        if processors:
            tokens, output = written(rows, texts)
            for process in processors:
                logits = process(logits, tokens, output)
        chosen = sample(logits, None if config.greedy else [row.generator for row in rows])  # [rows]

        texts[list(range(len(rows))), [row.length for row in rows]] = chosen
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.length += 1
            if token in eos_ids:
                row.end = "eos"
            elif row.length == row.limit:
                row.end = "length"
            yield Event(row.number, None if row.end == "eos" else token, row.end)
            if row.end is None and row.number in stopped:
                row.end = "stopped"
        drop_ended(rows, cache, texts)


def read_texts(model: Transformer, cache: KVCache, rows: list[Row], begin: int, texts: Tensor) -> Tensor:
    """Read the texts of rows from `begin` on into their part of the cache -> next-token logits, float32 [rows, V].

    Shorter ones are padded on the right, where causal attention keeps what is read from being seen.
    """
    new = rows[begin:]
    lengths = [row.length for row in new]
    part = cache.part(begin, len(rows))
    part.lengths = [0] * len(new)
    hidden = model.hidden_states(texts[begin : len(rows), : max(lengths)].clamp(min=0), part)  # [rows, T, dim]
    cache.lengths[begin : len(rows)] = lengths
    last = hidden[list(range(len(new))), [length - 1 for length in lengths]]
    return model.output(last).float()  # the output layer is the widest: only where it is needed


def read_last(model: Transformer, cache: KVCache, rows: list[Row], texts: Tensor) -> Tensor:
    """Read the newest token of the first rows -> next-token logits, float32 [rows, V]."""
    part = cache.part(0, len(rows))
    tokens = texts[list(range(len(rows))), [row.length - 1 for row in rows]]
    hidden = model.hidden_states(tokens[:, None], part)  # [rows, 1, dim]
    cache.lengths[: len(rows)] = part.lengths
    return model.output(hidden[:, 0]).float()


def written(rows: list[Row], texts: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' texts and their output alone, int64 [rows, T] each: the newest token last, PADDING before the first."""
    lengths = torch.tensor([row.length for row in rows], device=texts.device)[:, None]
    starts = torch.tensor([row.start for row in rows], device=texts.device)[:, None]
    longest = max(row.length for row in rows)
    positions = torch.arange(longest, device=texts.device) + (lengths - longest)  # [rows, T], below 0: no token
    tokens = texts[: len(rows)].gather(1, positions.clamp(min=0)).where(positions >= 0, PADDING)
    return tokens, tokens.where(positions >= starts, PADDING)


def drop_ended(rows: list[Row], cache: KVCache, texts: Tensor) -> None:
    """Take the rows that ended out of the list; the last ones move into their places, in all three."""
    for place in reversed(range(len(rows))):
        if rows[place].end is not None:
            last = rows.pop()
            if place < len(rows):
                rows[place] = last
                cache.move(len(rows), place)
                texts[place] = texts[len(rows)]


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A private random generator, so that torch's global one is never touched; without a seed, from fresh entropy."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


# -------------------------------------------------------------------------------------------------------------- text


class TextGenerator:
    """A model and its tokenizer: text in, text out.

    Args:
        model: moved to `device`; None leaves it where it is.
        tokenizer: a `transformers` fast tokenizer with a bos and an eos token.

    Raises:
        InputError: the tokenizer has ids that the model has no embedding for.
    """

    def __init__(self, model: Transformer, tokenizer, device: torch.device | str | None = None) -> None:
        needed, rows = vocabulary_size(tokenizer), model.config.vocab_size
        if needed > rows:
            raise InputError(f"the tokenizer has {needed} tokens, the model's embedding {rows} rows: they do not fit")
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self._said_no_template = False

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
        for number, piece, end in self.pieces(prompts, config, max(1, min(batch_size, len(prompts)))):
            texts[number] += piece
            if end is not None:
                done.add(number)
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
        return self._generate(ids, config, _emitter(stream, callback))

    def stream(self, prompt: str, config: GenerationConfig | None = None) -> Iterator[str]:
        """The pieces of `generate`'s text, one after another: `for piece in generator.stream("春风")`."""
        ids = self.encode_prompt(prompt)  # what is wrong with the prompt is said now, not at the first piece
        return (piece for _, piece, _ in self.pieces([ids], config) if piece)

    def _generate(self, ids: list[int], config: GenerationConfig | None, emit: Callable[[str], None] | None) -> str:
        whole = []
        for _, piece, _ in self.pieces([ids], config):
            if piece:
                whole.append(piece)
                if emit is not None:
                    emit(piece)
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
        """`<bos> ids`, as documents begin in training. A control token that the prompt spells out stays text."""
        ids = [self.tokenizer.bos_token_id, *encode_texts(self.tokenizer, [valid_text("the prompt", prompt)])[0]]
        return self._fitting("prompt", ids)

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
            ids = [self.tokenizer.bos_token_id, *encode_texts(self.tokenizer, ["\n".join(contents)])[0]]
        elif any(token.content in text for token in self._special_tokens() for text in contents):
            ids = self._encode_apart(history)
        else:
            ids = self._encode_template(self._render(history))
        return self._fitting("chat", ids) if check else ids

    def pieces(
        self, prompts: Iterable[Sequence[int]], config: GenerationConfig | None, rows_at_once: int = 1
    ) -> Iterator[tuple[int, str, str | None]]:
        """Continue prompts' ids, as `decode` does, in text.

        Yields:
            a prompt's number, the next piece of its text, which can be "", and with the last piece why it ended: "eos",
            "length", "stop_string" or "repeats". The pieces of a text follow each other; those of different texts mix.
        """
        config, started, stopped = config or GenerationConfig(), {}, set()

        def known() -> Iterator[Sequence[int]]:
            for number, prompt in enumerate(prompts):
                started[number] = Text(new_detokenizer(self.tokenizer, prompt), config.stop_strings, config.max_repeats)
                yield prompt

        with evaluation_mode(self.model):
            for event in decode(self.model, known(), config, [self.tokenizer.eos_token_id], rows_at_once, stopped):
                text = started[event.number]
                piece, end = text.add(event.token, event.end)
                yield event.number, piece, end
                if end is not None:
                    stopped.add(event.number)
                    del started[event.number]

    def _fitting(self, what: str, ids: list[int]) -> list[int]:
        context = self.model.config.max_seq_len
        if len(ids) > context - 1:
            most = f"the model's context of {context} takes at most {context - 1}"
            raise InputError(f"the {what} has {len(ids)} tokens, {most}; shorten it")
        return ids

    def _special_tokens(self) -> list:
        return [token for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def _render(self, history: Sequence[dict[str, str]]) -> str:
        return render_template(self.tokenizer, history)

    def _encode_template(self, text: str) -> list[int]:
        """Ids of text in which control tokens are control tokens."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_apart(self, history: Sequence[dict[str, str]]) -> list[int]:
        """The template's own parts with control tokens, the contents without.

        Placeholders of private-use characters stand for the contents while the template is filled in.
        """
        placeholders = [{**message, "content": f"\ue000{n}\ue001"} for n, message in enumerate(history)]
        parts = re.split("\ue000(\\d+)\ue001", self._render(placeholders))  # part, number, part, number, ... part
        ids = self._encode_template(parts[0])
        for number, part in zip(parts[1::2], parts[2::2], strict=True):
            ids += encode_texts(self.tokenizer, [history[int(number)]["content"]])[0] + self._encode_template(part)
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


def check_history(history: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A copy of a chat's messages.

    Raises:
        InputError: there is none, or one is not `{"role": text, "content": text}`.
    """
    if not history:
        raise InputError("the chat history is empty: it needs at least one message")
    for n, message in enumerate(history):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f'message {n} of the chat is {message!r}; expected {{"role": "user", "content": "..."}}')
        valid_text(f"message {n} of the chat", message["content"])
    return list(history)


def valid_text(what: str, text: str) -> str:
    """The text itself.

    Raises:
        InputError: it is no text, or holds half of a surrogate pair (what bytes that are not UTF-8 turn into).
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{what} is not valid Unicode text: {ascii(text)[:60]}")
    return text


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
) -> TextGenerator:
    """A generator from files; one line on stderr for each choice that was made.

    Args:
        model_path: weights or a checkpoint; None takes the newest final weights under out/.
        tokenizer_path: a tokenizer's folder; None takes the one that the weights were trained with.
        device: None (or "auto") takes the fastest kind there is.
        dtype: of the weights in memory, a torch.dtype or its name; None is float32, in which a batch gives what
            single prompts give.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others; the device or dtype cannot be used.
    """
    chosen_device, device_reason = pick_device(str(device or "auto"))
    asked = str(dtype or "float32").removeprefix("torch.")
    if asked not in DTYPES:
        raise InputError(f"dtype: {asked!r} found, one of {', '.join(DTYPES)} expected")
    chosen_dtype, dtype_reason = pick_dtype(asked, chosen_device)
    path = Path(model_path) if model_path is not None else newest_weights()
    weights = load_weights(path)
    if weights.inferred:
        config = weights.config
        say(
            f"no {path.with_suffix('.json').name} beside the weights: read off their shapes dim {config.dim}, n_layers "
            f"{config.n_layers}, n_heads {config.n_heads}, n_kv_heads {config.n_kv_heads}, vocab_size "
            f"{config.vocab_size}; assumed max_seq_len {config.max_seq_len}, rope_theta {config.rope_theta:g}"
        )
    tokenizer = fitting_tokenizer(path, weights, tokenizer_path)
    model = Transformer(weights.config)
    model.load_state_dict(weights.state_dict)
    say(f"device {chosen_device}: {device_reason}")
    say(f"dtype {str(chosen_dtype).removeprefix('torch.')}: {dtype_reason if dtype else 'the default'}")
    return TextGenerator(model.to(chosen_device, chosen_dtype), tokenizer)


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


def fitting_tokenizer(path: Path, weights, tokenizer_path: str | Path | None):
    """The tokenizer given, else the recorded one, else the embedded one.

    Raises:
        InputError: it is not the one that the weights were trained with, or its size is not the embedding's.
    """
    folder, recorded = tokenizer_path or weights.tokenizer_path, weights.tokenizer_sha256
    if tokenizer_path is None and folder and not Path(folder).is_dir() and recorded == tokenizer_sha256():
        folder = None  # the recorded folder is gone, and the embedded tokenizer is the same
    tokenizer = load_tokenizer(folder)
    shown = folder or EMBEDDED_TOKENIZER.name
    found = tokenizer_sha256(folder)
    if recorded is not None and found != recorded:
        raise InputError(
            f"{path} was trained with another tokenizer: sha256 {recorded[:12]}… is recorded, "
            f"{shown} has {found[:12]}…; give the right one with --tokenizer_path"
        )
    tokens, rows = vocabulary_size(tokenizer), weights.config.vocab_size
    if tokens > rows or (tokens < rows and recorded is None):  # a recorded tokenizer may leave rows unused on purpose
        found = f"the tokenizer {shown} has {tokens} tokens, the embedding in {path} has {rows} rows"
        raise InputError(f"{found}; give the right one with --tokenizer_path")
    return tokenizer
