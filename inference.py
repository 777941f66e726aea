"""Generate text with trained weights: one prompt, a file of prompts, or a chat.

python inference.py --model_path out/pretrain_512.pth --prompt "中国" --stream
python inference.py --interactive
python inference.py --batch_file prompts.txt
python inference.py --serve
"""

import argparse
import contextlib
import dataclasses
import os
import select
import socket
import stat
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from model.command import (
    CommandParser,
    add_option,
    heavy_imports,
    path_flag,
    print_text,
    run_command,
    say,
    true_or_false,
)
from model.corpus.inputs import read_prompts, read_questions, read_texts
from model.errors import InputError, counted
from model.generation.batch_results import open_results, write_result
from model.generation.chat_loop import ANSWERS, CONTINUES, run_interactive, say_speed, show
from model.generation.generation_config import DTYPE_NAMES, GenerationConfig
from model.generation.judging import is_exact, judge_answers, judged_text
from model.options import options_of, text_flag
from model.serving.address import bound_socket, checked_origins, names_of, read_key
from model.storage.files import refuse_overwriting, refuse_overwriting_inputs
from model.storage.newest_weights import refuse_missing
from model.text.tokenization import tokenizer_file

if TYPE_CHECKING:
    from optimized_inference import TextGenerator  # imports torch

STDIN_SECONDS = 1.0  # without a byte, after which a line says what is waited for
DEFAULT_PROMPT = "中国"
MODES = ("prompt", "batch_file", "score_file", "judge")
WRONG_SHOWN = 10  # answers
# The options of GenerationConfig that are flags by the same name.
SAMPLING = [
    name for name in options_of(GenerationConfig) if name not in ("do_sample", "logit_bias", "logprobs", "top_logprobs")
]


def main() -> int:
    """Run the mode that the flags ask for; returns the exit code, 2 if prompts of a batch failed."""
    arguments = parse_arguments(sys.argv[1:])
    chosen = {name: getattr(arguments, name) for name in SAMPLING}
    if chosen["max_new_tokens"] is None:  # not asked for: a request to the server may then get more
        del chosen["max_new_tokens"]
    config = GenerationConfig(do_sample=not arguments.greedy, **chosen)
    prompts = read_prompts(Path(arguments.batch_file)) if arguments.batch_file is not None else []
    texts = read_texts(Path(arguments.score_file)) if arguments.score_file is not None else []
    questions = read_questions(Path(arguments.judge)) if arguments.judge is not None else []
    if arguments.output_file is not None:
        folder = Path(arguments.output_file).parent
        if not folder.is_dir():
            raise InputError(
                f"output_file: {arguments.output_file} cannot be written (no folder {folder}); make it first"
            )
        inputs = [arguments.batch_file, arguments.model_path, arguments.tokenizer_path]
        refuse_overwriting_inputs({"output_file": arguments.output_file}, [path for path in inputs if path])
        if not arguments.resume:
            refuse_overwriting("output_file", arguments.output_file, "--resume continues it; or give another path")
    refuse_missing(arguments.model_path)
    if arguments.tokenizer_path is not None:
        tokenizer_file(arguments.tokenizer_path)
    key, listening = None, None
    if arguments.serve:
        key = read_key(arguments.api_key_file)
        arguments.cors_origin = checked_origins(arguments.cors_origin)
        listening = bound_socket(arguments.host, arguments.port, key, arguments.no_key)
    with heavy_imports():  # after everything that can fail early
        from optimized_inference import load_generator

    generator = load_generator(
        arguments.model_path,
        arguments.tokenizer_path,
        arguments.device,
        arguments.dtype,
        arguments.compile,
        arguments.max_seq_len,
    )
    if arguments.judge is not None and generator.chat_format == {}:
        say(CONTINUES)
    if generator.chat_format and (arguments.prompt is not None or arguments.batch_file is not None):
        say(ANSWERS)
    if arguments.serve:
        return run_server(generator, config, arguments, listening, key)
    if arguments.batch_file is not None:
        return 2 if run_batch(generator, config, prompts, arguments) else 0
    if arguments.score_file is not None:
        run_score(generator, texts)
    elif arguments.judge is not None:
        run_judge(generator, dataclasses.replace(config, do_sample=False, repetition_penalty=1.0), questions)
    elif arguments.interactive:
        run_interactive(generator, config, arguments.show_speed)
    else:
        run_single(generator, config, arguments.prompt, arguments.stream)
        if arguments.show_speed:
            say_speed(generator)
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, with the mode settled.

    Raises:
        InputError: an unknown flag, an unusable value, or flags that exclude each other.
    """
    arguments = build_parser().parse_args(argv)
    given = {f"--{name}": getattr(arguments, name) is not None for name in MODES}
    given |= {"--interactive": arguments.interactive, "--serve": arguments.serve}
    modes = [flag for flag, used in given.items() if used]
    if len(modes) > 1:
        raise InputError(f"{' and '.join(modes)} exclude each other: one mode at a time")
    if arguments.output_file is not None and arguments.batch_file is None:
        raise InputError("--output_file is for the results of --batch_file")
    if arguments.resume and arguments.output_file is None:
        raise InputError("--resume continues the --output_file of a batch that was interrupted; give that file too")
    if arguments.serve and (missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]):
        raise InputError(f"--serve needs {' and '.join(missing)}: python -m pip install {' '.join(missing)}")
    if not modes and sys.stdin is not None and sys.stdin.isatty():
        arguments.interactive = True
    elif not modes and (text := piped_text()):
        arguments.prompt = text
        say("prompt: the text on stdin")
    elif not modes:
        arguments.prompt = DEFAULT_PROMPT
        say(f"prompt {DEFAULT_PROMPT}: the default, since no --prompt was given and stdin holds no text")
    return arguments


def piped_text() -> str:
    """The text that a pipe or a file gives on stdin, without the line end that `echo` adds; '' where stdin is neither.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):  # no stdin, or a closed one
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    if os.name == "posix" and not select.select([descriptor], [], [], STDIN_SECONDS)[0]:
        say("waiting for the prompt on stdin; --prompt gives it as a flag")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError("stdin: the prompt is not UTF-8; convert it, or give it with --prompt") from error


def at_least_one(text: str) -> int:
    """A flag's whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} found, a whole number of at least 1 expected")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag, its default and its help."""
    parser = CommandParser(
        "--prompt", description="Generate text with trained weights. Without a mode: a chat in a terminal."
    )
    _add_modes(parser.add_argument_group("what to do (one of)"))
    _add_files(parser.add_argument_group("files and machine"))
    _add_server(parser.add_argument_group("the server (--serve)"))
    _add_sampling(parser.add_argument_group("how to generate"))
    return parser


def _add_modes(mode) -> None:
    """What to do."""
    mode.add_argument("--prompt", type=text_flag, metavar="TEXT", help="continue this text once")
    mode.add_argument("--interactive", action="store_true", help="chat; exit, quit or q ends it, clear forgets it")
    mode.add_argument(
        "--serve", action="store_true", help="serve a web page and OpenAI's API until Ctrl-C (docs/serving.md)"
    )
    mode.add_argument("--batch_file", type=path_flag, metavar="FILE", help="continue each line of a UTF-8 file")
    mode.add_argument(
        "--score_file",
        type=path_flag,
        metavar="FILE",
        help="print how well the model predicts a UTF-8 text, or the texts of a JSONL",
    )
    mode.add_argument(
        "--judge",
        type=path_flag,
        metavar="FILE",
        help="answer each chat's last question in this JSONL, greedily and without a penalty, and count what is right",
    )


def _add_files(files) -> None:
    """What to read and write, and the machine."""
    files.add_argument(
        "--model_path",
        type=path_flag,
        metavar="PATH",
        help="weights or a checkpoint; a run's folder, one of transformers, a .gguf … (default: the newest in out/)",
    )
    files.add_argument(
        "--tokenizer_path", type=path_flag, metavar="FOLDER", help="default: the one the weights were trained with"
    )
    files.add_argument(
        "--output_file", type=path_flag, metavar="FILE", help="write the results of --batch_file here too, as JSONL"
    )
    files.add_argument("--resume", action="store_true", help="keep the results in --output_file and append to them")
    files.add_argument("--device", help="cpu, cuda, cuda:1, npu, xpu, musa, mlu, mps (default: the fastest there is)")
    files.add_argument("--dtype", choices=DTYPE_NAMES, help="of the weights in memory (default: float32)")
    files.add_argument(
        "--max_seq_len", type=int, metavar="N", help="context in tokens (default: the model's, within reason)"
    )
    files.add_argument(
        "--compile",
        type=true_or_false,
        nargs="?",
        const=True,
        metavar="true|false",
        help="on a CPU, generate with a compiled step: true waits until it is compiled (default: as soon as it exists;"
        " a chat compiles it in the background; not with a seed). On a CUDA GPU, true compiles what is captured as a"
        " graph; false captures none",
    )


def _add_server(server) -> None:
    """Where it listens, and who may call."""
    server.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0: any that is free)")
    server.add_argument(
        "--model_name", type=text_flag, metavar="NAME", help="the model's id (default: its file's name)"
    )
    server.add_argument("--rows", type=at_least_one, default=16, metavar="N", help="texts written together [16]")
    server.add_argument("--queue", type=at_least_one, default=64, metavar="N", help="texts that may wait [64]")
    server.add_argument(
        "--api_key_file",
        type=path_flag,
        metavar="FILE",
        help="holds the key that clients must send (or MATECONV_API_KEY)",
    )
    server.add_argument(
        "--no_key", action="store_true", help="let others call without a key at an address like 0.0.0.0"
    )
    server.add_argument("--allowed_host", nargs="+", default=[], metavar="NAME", help="more names it may be called by")
    server.add_argument("--cors_origin", nargs="+", default=[], metavar="URL", help="sites whose pages may call it")
    server.add_argument("--any_model", action="store_true", help="answer whatever model a request names")
    server.add_argument(
        "--reproducible", action="store_true", help="one text at a time: the same seed gives the same text, always"
    )


def _add_sampling(text) -> None:
    """How to generate."""
    options = options_of(GenerationConfig)
    text.add_argument("--stream", action="store_true", help="show the text while it is generated")
    text.add_argument("--show_speed", action="store_true", help="say on stderr how fast each text was generated")
    text.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    for name in (name for name in SAMPLING if name not in ("stop_strings", "use_cache")):
        add_option(text, options[name], metavar="N")
    text.set_defaults(max_new_tokens=None)
    add_option(text, options["stop_strings"], metavar="TEXT", nargs="+")
    cache = text.add_mutually_exclusive_group()
    add_option(cache, options["use_cache"])
    cache.add_argument("--no_cache", dest="use_cache", action="store_false", help="the same as --use_cache false")


def run_single(generator: "TextGenerator", config: GenerationConfig, prompt: str, stream: bool) -> None:
    """Print the prompt and its continuation; with `stream`, as it comes."""
    generator.encode_prompt(prompt)  # an unusable prompt is refused before it is shown
    if stream:
        show(prompt)
        generator.generate(prompt, config, stream=True, callback=show)
        print()
    else:
        print_text(prompt + generator.generate(prompt, config))


def run_server(
    generator: "TextGenerator",
    config: GenerationConfig,
    arguments: argparse.Namespace,
    listening: socket.socket,
    key: str | None,
) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    from model.serving.app import Limits  # imports starlette
    from model.serving.requests import Defaults
    from model.serving.run import serve
    from model.weights.find import find_weights

    path = find_weights(arguments.model_path)[0].resolve()
    name = arguments.model_name or (path.name if path.is_dir() else path.stem)
    hosts = names_of(arguments.host, arguments.allowed_host, has_key=key is not None)
    limits = Limits(hosts, key, arguments.cors_origin, arguments.any_model)
    defaults, rows, queue = Defaults(config, arguments.max_new_tokens), arguments.rows, arguments.queue
    return serve(generator, name, defaults, listening, rows, queue, limits, arguments.reproducible)


def run_score(generator: "TextGenerator", texts: list[str]) -> None:
    """Print the loss of all texts together."""
    from model.generation.scoring import Score  # imports torch

    score = sum((generator.score(text) for text in texts), Score())
    print(
        f"{counted(len(texts), 'text')}, {counted(score.tokens, 'token')}, {counted(score.bytes, 'byte')}:"
        f" loss {score.loss:.4f} nats per token,"
        f" perplexity {score.perplexity:,.2f}, {score.bits_per_byte:.4f} bits per byte"
    )


def run_judge(
    generator: "TextGenerator", config: GenerationConfig, questions: list[tuple[list[dict[str, str]], str, str]]
) -> None:
    """Answer each question, then print some wrong answers and the counts of each group and of all."""
    encoded, fitting = [], []
    for question in questions:
        with contextlib.suppress(InputError):  # too long for the context: counted below
            encoded.append(generator.encode_chat(generator.fit_history(question[0], config)))
            fitting.append(question)
    if len(fitting) < len(questions):
        say(f"{counted(len(questions) - len(fitting), 'question')} left out: too long for the model's context")
    if not fitting:
        raise InputError("judge: no question fits the model's context")
    judged = [
        (group, answer.text, answer.end, expected, history[-1]["content"])
        for (history, expected, group), answer in zip(fitting, generator.continued(encoded, config), strict=True)
    ]
    wrong = [one for one in judged if not is_exact(one[1], one[3])]
    for _, text, _, expected, question in wrong[:WRONG_SHOWN]:
        print_text(" ".join(f"{question}▸{text}  ({expected})".split()))
    groups = sorted({group for group, *_ in judged} - {""})
    for name in [*groups, None]:
        _, texts, ends, expected, _ = zip(*(one for one in judged if name in (None, one[0])), strict=True)
        print_text((f"{name}: " if name is not None else "") + judged_text(judge_answers(texts, ends, expected)))


def run_batch(
    generator: "TextGenerator", config: GenerationConfig, prompts: list[tuple[int, str]], arguments: argparse.Namespace
) -> int:
    """Print each prompt and its continuation, and write them to the output file, as soon as they are done.

    A prompt that cannot be used, such as one longer than the context, gets an "error" instead of a "text".

    Returns:
        how many prompts failed, those of the part that was resumed included.
    """
    done, failed, file = 0, 0, None
    if arguments.output_file is not None:
        done, failed, file = open_results(Path(arguments.output_file), prompts, arguments.resume)
        if done:
            say(f"{done} of {len(prompts)} results are in {arguments.output_file} already")
    with file or contextlib.nullcontext():
        try:
            for number, (prompt, result) in enumerate(
                batch_results(generator, config, prompts[done:], arguments), done
            ):
                if "text" in result:
                    print_result(number, prompt, result["text"])
                failed += "error" in result
                if file is not None:
                    write_result(file, {"prompt": prompt, **result})
                done += 1
        except (InputError, KeyboardInterrupt):
            if file is not None:
                say(f"{done} of {len(prompts)} results are in {arguments.output_file}; --resume continues there")
            raise
    if failed:
        say(f"error: {failed:,} of {counted(len(prompts), 'prompt')} failed")
    return failed


def batch_results(
    generator: "TextGenerator", config: GenerationConfig, prompts: list[tuple[int, str]], arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each prompt with {"text": its continuation}, or {"error": why it cannot be used}, in their order."""
    encoded: list[list[int]] = []
    errors: dict[int, str] = {}
    for index, (number, prompt) in enumerate(prompts):  # all of them before the first is generated
        try:
            encoded.append(generator.encode_prompt(prompt))
        except InputError as error:
            errors[index] = str(error)
            say(f"{arguments.batch_file}, line {number}: {error}")
    texts = generator.completions(encoded, config) if encoded else iter(())
    for index, (_, prompt) in enumerate(prompts):
        yield prompt, {"error": errors[index]} if index in errors else {"text": next(texts)}


def print_result(number: int, prompt: str, text: str) -> None:
    """Print a prompt and its continuation."""
    print_text(f"[{number + 1}] {prompt}\n{prompt}{text}\n")


if __name__ == "__main__":
    run_command(main)
