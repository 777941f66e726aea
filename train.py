"""Train a model: settings from a config file and flags, then `optimized_pretrain.Trainer`.

python train.py --config config_demo.yaml
python train.py --config config.yaml --learning_rate 1e-3 --use_ema
python train.py --resume
python train.py --config config.yaml --restarts 10 --nproc_per_node 2
python train.py --config config.yaml --dry_run
python train.py --config config.yaml --init_from model.gguf
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from model.corpus.job_folder import job_path
from model.errors import InputError, command_line
from model.training.config_file import read_config
from model.training.settings import (
    FIELDS,
    SECTIONS,
    DataSettings,
    Settings,
    build_settings,
)
from utils import CommandParser, Processes, add_option, path_flag, print_message, run_command, say

PREVIEW_PROMPTS = ("春风", "中国", "天下大势")


def read_settings(arguments: list[str], of_checkpoint: bool = True) -> Settings:
    """Turn the command line into settings: flags beat the config file or, with --resume alone, the checkpoint's.

    Args:
        of_checkpoint: False: leave the checkpoint unread; only its folder is taken from it, as out_dir.
    """
    parser = CommandParser(prog="train.py", description=__doc__.split("\n")[0], add_help=True)
    parser.add_argument("--config", type=path_flag, help="config file (YAML); config.yaml explains every setting")
    parser.add_argument("--local-rank", "--local_rank", help="set by torch.distributed.launch")
    add_launcher_flags(parser)
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section)
        for field in dataclasses.fields(cls):
            add_option(group, field, metavar="VALUE", as_text=True)
    known, unknown = parser.parse_known_args(arguments)
    problems = parser.describe_unknown(unknown) if unknown else []
    flags = {name: value for name, value in vars(known).items() if name in FIELDS and value is not None}

    if known.config is not None:
        settings = build_settings(read_config(known.config), flags, source=known.config, problems=problems)
        return _with_shape_settled(settings, flags)
    asked = build_settings({}, flags, problems=problems)
    if not (asked.training.resume or asked.training.resume_from):
        return _with_shape_settled(asked, flags)
    if not of_checkpoint:
        if asked.training.resume_from is not None and "out_dir" not in flags:
            asked.training.out_dir = str(Path(asked.training.resume_from).parent)
        return asked
    return _with_shape_settled(build_settings(*_settings_of_checkpoint(asked, flags)), flags)


def _with_shape_settled(settings: Settings, flags: dict) -> Settings:
    """The settings themselves, once it is sure that no flag contradicts the weights to begin with."""
    if settings.training.init_from is not None:
        from model.runs.initial_weights import refuse_shape  # imports torch

        refuse_shape(list(flags))
    return settings


def _settings_of_checkpoint(asked: Settings, flags: dict) -> tuple[dict, dict, str]:
    """The settings saved in the checkpoint to go on from; its folder is where the run goes on."""
    from model.runs.resume import find_checkpoint

    asked.training.resume = True  # --resume_from alone means it
    found = find_checkpoint(asked.training, lambda _: None)  # the trainer looks again, and says what it finds
    if found is None:
        raise InputError("--resume: there is nothing to go on from; start a run with --config first")
    path, content = found
    values = content["settings"]
    values["training"] |= {"out_dir": str(path.parent), "resume_from": None, "resume": True}
    say(f"settings: those saved in {path}" + (f", and {', '.join(f'--{name}' for name in flags)}" if flags else ""))
    return values, flags, str(path)


def prepare_data_if_missing(settings: Settings, processes: Processes) -> None:
    """Make a missing token file from raw_data_path, or for the default path from what lies in dataset/."""
    data = settings.data
    target = Path(data.train_data_path)
    if target.is_dir():
        raise InputError(f"train_data_path: {target} is a folder, a token file (.bin) expected")
    if target.exists() and not job_path(target).exists():
        if data.raw_data_path is not None:
            say(f"raw_data_path: {data.raw_data_path} is not read, since {target} is there")
        return
    if not processes.is_main:
        print_message(f"[rank {processes.rank}] waiting for rank 0 to make {target}")
        while not (target.exists() and target.with_suffix(".json").exists()):
            time.sleep(0.5)
        return
    from optimized_data_processing import OptimizedDataProcessor, default_input_path

    source = data.raw_data_path
    if source is None and os.path.realpath(target) == os.path.realpath(DataSettings.train_data_path):
        source = default_input_path()
    if source is None:
        command = command_line(
            "python", "optimized_data_processing.py", "--input_path", "YOUR.jsonl", "--output_path", target
        )
        raise InputError(f"train_data_path: no file {target}; make it with: {command}")
    say(f"{target} is missing: making it from {source}")
    OptimizedDataProcessor(tokenizer_path=data.tokenizer_path).process_dataset(str(source), str(target))


def make_preview(settings: Settings):
    """A function that continues a few prompts with the model in training, to see what it has learned."""
    from model.text.tokenization import end_ids, load_tokenizer
    from optimized_inference import GenerationConfig, TextGenerator

    tokenizer = load_tokenizer(settings.data.tokenizer_path)
    end_ids(tokenizer)  # what is wrong with its generation_config.json is said now, not at the first evaluation

    def preview(model) -> list[str]:
        generator, lines = TextGenerator(model, tokenizer), []
        for number, prompt in enumerate(PREVIEW_PROMPTS):  # one seed each: equal seeds give like texts
            config = GenerationConfig(max_new_tokens=40, seed=settings.training.seed + number)
            try:
                text = generator.generate(prompt, config)
            except InputError as error:  # a context too short for the prompt: no reason to end the training
                text = f" ({error})"
            lines.append(f"{prompt}▸{text}".replace("\n", " "))
        return lines

    return preview


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how processes are started, and whether to train at all. They are no settings: a run is the
    same with and without them."""

    def whole_number(text: str) -> int:
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} found, a whole number expected")
        return int(text)

    group = parser.add_argument_group("starting and restarting")
    group.add_argument(
        "--restarts",
        metavar="N",
        type=whole_number,
        default=0,
        help="start the training again with --resume when it dies, up to N times; not when it has diverged, its input"
        " is bad, or it was interrupted [0]",
    )
    group.add_argument(
        "--nproc_per_node",
        metavar="N",
        type=whole_number,
        default=None,
        help="train in N processes on this machine, started as torchrun --standalone does, with an exit code that"
        " tells; not given: in this process",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="do not train: measure a few steps, and tell memory, FLOPs and the time that the run will take; out_dir"
        " stays as it is",
    )


def start_processes(restarts: int, nproc_per_node: int | None, arguments: list[str]) -> int:
    """Train in other processes than this one, as the launcher flags say; returns the exit code."""
    if nproc_per_node == 0:
        raise InputError("--nproc_per_node: 0 found, at least 1 expected")
    if "WORLD_SIZE" in os.environ:
        raise InputError("--restarts and --nproc_per_node start the processes themselves; leave torchrun out")
    training = read_settings(arguments, of_checkpoint=False).training  # what is wrong is said before anything starts
    command, out_dir = [str(Path(__file__).resolve()), *arguments], Path(training.out_dir)
    if not restarts:
        from model.runs.launch import launch

        return launch(nproc_per_node, [*command, "--ddp=true"], out_dir)
    from model.runs.supervisor import Supervisor

    command = [sys.executable, *command, *([] if nproc_per_node is None else [f"--nproc_per_node={nproc_per_node}"])]
    resume = ["--resume=true"] + (
        ["--resume_from=null", f"--out_dir={out_dir}"] if training.resume_from is not None else []
    )
    return Supervisor(command, [*command, *resume], out_dir, restarts, say).run()


def main() -> int:
    """Run one training; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training itself listens; also as process 1
    parser = CommandParser(prog="train.py", add_help=False)
    add_launcher_flags(parser)
    launcher, arguments = parser.parse_known_args(sys.argv[1:])
    if launcher.dry_run and launcher.nproc_per_node is not None:
        return start_processes(0, launcher.nproc_per_node, [*arguments, "--dry_run"])
    if not launcher.dry_run and (launcher.restarts or launcher.nproc_per_node is not None):
        return start_processes(launcher.restarts, launcher.nproc_per_node, arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from model.runs.launch import end_with_parent

        end_with_parent()
    settings = read_settings(arguments)
    processes = Processes()
    several = processes.world_size > 1
    if settings.training.ddp and not several:
        say("ddp: this is a single process; several are started by: torchrun --nproc_per_node=N train.py … --ddp")
    elif several and not settings.training.ddp:
        say(f"ddp: torchrun started {processes.world_size} processes, so they train together")
    if settings.training.init_from is not None:
        from model.runs.initial_weights import initial_tokenizer  # imports torch

        settings.data.tokenizer_path = initial_tokenizer(settings)
    prepare_data_if_missing(settings, processes)
    return train(settings, processes, launcher.dry_run)


def train(settings: Settings, processes: Processes, dry_run: bool) -> int:
    """Train, or only tell what that would take; returns the exit code."""
    from optimized_pretrain import Trainer  # imports torch: after everything that can fail early

    trainer = None
    try:
        trainer = Trainer(settings, processes, make_preview(settings))
        if dry_run:
            return tell_dry_run(trainer, processes)
        trainer.stop.install()  # until the process ends: torchrun sends its signal twice
        outcome = trainer.train()
    except BaseException as error:
        if is_out_of_memory(error):
            text = "out of memory: lower batch_size and raise accumulation_steps, or shorten max_seq_len"
            error = InputError(text).with_traceback(error.__traceback__)
        processes.announce(error)
        if trainer is not None:
            trainer.tell_failure(error)
        raise error
    finally:
        processes.close()
    out_dir = Path(settings.training.out_dir)
    if outcome == "interrupted":
        several = processes.world_size > 1
        launcher = ["torchrun", f"--nproc_per_node={processes.world_size}"] if several else ["python"]
        command = command_line(*launcher, "train.py", "--resume", "--out_dir", out_dir)
        say(f"stopped after step {trainer.progress.step:,}; go on with: {command}")
    else:
        say(f"{outcome.replace('_', ' ')} after step {trainer.progress.step:,}; metrics and curves are in {out_dir}")
        command = command_line("python", "inference.py", "--model_path", out_dir / "best_model.pth", "--interactive")
        say(f"talk to it: {command}")
    return trainer.exit_code(outcome)


def tell_dry_run(trainer, processes: Processes) -> int:
    """Print, on rank 0, what the run would take; returns the exit code."""
    from model.training.dry_run import dry_run

    lines = dry_run(trainer)
    if processes.is_main:
        print("\n".join(["", *lines, "", "this was a dry run: nothing was trained, and nothing written to out_dir"]))
    processes.barrier()
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the GPU's memory was too small: torch has no exception of its own for the former."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


if __name__ == "__main__":
    run_command(main)
