"""Does a tuned model answer the same in other programs?

    python benchmarks/answers.py --weights out/chat/best_model.pth --llama_python ../llama/bin/python

The weights are written for transformers and as GGUF, in float32. Each program answers the questions of a JSONL of chats
greedily, with the template and the ids that end an answer as it finds them in the file. A row shows how many answers
are the same as ours, character by character, and how many end by themselves, of ours too.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from worker import Worker

import utils

NEW_TOKENS = 64
Answer = tuple[str, bool]  # and whether it ended by itself


def serve(order: dict) -> None:
    """llama.cpp's process: answers the history in each line."""
    import llama_cpp

    answers, sys.stdout = sys.stdout, sys.stderr
    f32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    model = llama_cpp.Llama(order["file"], n_ctx=order["context"], verbose=False, **f32)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": NEW_TOKENS}
        [choice] = model.create_chat_completion(json.loads(line), **options)["choices"]
        answer = choice["message"]["content"], choice["finish_reason"] == "stop"
        print(json.dumps(answer), file=answers, flush=True)


def in_llama_cpp(path: Path, context: int, histories: list[list[dict]], python: str) -> list[Answer]:
    """llama.cpp's answers."""
    order = {"file": str(path), "context": context}
    worker = Worker("llama.cpp", __file__, order, python=python).wait()
    try:
        return [tuple(worker.ask(json.dumps(history))) for history in histories]
    finally:
        worker.close()


def in_transformers(path: Path, histories: list[list[dict]]) -> list[Answer]:
    """transformers' answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = model.generation_config.eos_token_id
    ends, answers = ends if isinstance(ends, list) else [ends], []
    for history in histories:
        ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False, return_tensors="pt")
        found = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS)
        new = found[0, ids.shape[1] :].tolist()
        answers.append((tokenizer.decode(new, skip_special_tokens=True), new[-1] in ends))
    return answers


def in_mateconv(path: Path, histories: list[list[dict]]) -> list[Answer]:
    """Our answers."""
    from optimized_inference import GenerationConfig, load_generator

    generator = load_generator(path, device="cpu")
    config = GenerationConfig(do_sample=False, repetition_penalty=1, max_new_tokens=NEW_TOKENS)
    return [(generator.chat(history, config), generator.end == "eos") for history in histories]


def read_histories(path: Path, count: int) -> list[list[dict]]:
    """The messages of chats, up to their last answer."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["conversations"][:-1] for line in lines[:: max(1, len(lines) // count)][:count]]


def print_row(name: str, ours: list[Answer], theirs: list[Answer]) -> None:
    """A row, and the first answer that differs."""
    same = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    stop = sum(stopped for _, stopped in theirs)
    print(f"{name:14} {same:4} of {len(ours)} the same, {stop} stop ({sum(stopped for _, stopped in ours)} of ours)")
    different = [(a[0], b[0]) for a, b in zip(ours, theirs, strict=True) if a[0] != b[0]]
    for mine, other in different[:3]:
        print(f"    ours {mine!r}, theirs {other!r}")


def main() -> None:
    """Print a row for each program."""
    parser = utils.CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="a tuned model, in any format")
    parser.add_argument(
        "--questions", type=Path, default=Path("examples/questions_zh.jsonl"), help="a JSONL of chats (%(default)s)"
    )
    parser.add_argument("--count", type=int, default=200, help="questions, spread over the file (%(default)s)")
    parser.add_argument("--llama_python", help="a Python with llama-cpp-python; omitted: without llama.cpp")
    options = parser.parse_args()
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Write the weights for each program, and let it answer."""
    from model.convert import convert
    from model.weights import load_weights

    histories = read_histories(options.questions, options.count)
    ours = in_mateconv(options.weights, histories)
    context = min(load_weights(options.weights).config.max_seq_len, 512)
    with tempfile.TemporaryDirectory() as here:
        convert(options.weights, Path(here) / "folder", say=lambda line: None)
        print_row("transformers", ours, in_transformers(Path(here) / "folder", histories))
        if options.llama_python:
            file = Path(here) / "weights.gguf"
            convert(options.weights, file, say=lambda line: None)
            print_row("llama.cpp", ours, in_llama_cpp(file, context, histories, options.llama_python))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(json.loads(sys.argv[2]))
    else:
        utils.run_command(main)
