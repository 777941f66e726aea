"""Train a model: settings from a config file and flags, then `optimized_pretrain.Trainer`.

python train.py --config config_demo.yaml
python train.py --config config.yaml --learning_rate 1e-3 --use_ema
python train.py --resume
python train.py --config config.yaml --restarts 10 --nproc_per_node 2
python train.py --config config.yaml --dry_run
python train.py --config config.yaml --dry_run --on 8xH100
python train.py --config config.yaml --init_from model.gguf
python train.py --config config_demo.yaml --config config_demo_chat.yaml
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model.corpus.job_folder import job_path
from model.errors import InputError, ProcessLost, command_line, counted
from model.interrupts import interrupt
from model.token_file.manifest import read_manifest
from model.training.config_file import read_config
from model.training.devices import parse_cluster
from model.training.settings import (
    FIELDS,
    SECTIONS,
    DataSettings,
    Settings,
    build_settings,
)
from model.training.token_files import find_token_files, is_one_file
from utils import (
    CommandParser,
    Processes,
    add_option,
    heavy_imports,
    path_flag,
    pick_device,
    print_error,
    print_message,
    run_command,
    say,
)

if TYPE_CHECKING:
    from model.runs.beginning import Beginning  # imports torch
    from model.training.data import TrainingData

DATA_SECONDS = 24 * 3600.0  # that making the token file may take before the other processes give up
PREVIEW_PROMPTS = ("春风", "中国", "天下大势")
JUDGED_CHATS = 64  # at each evaluation
PREVIEW_QUESTIONS = ("你好", "你是谁？", "1加1等于几？")


def read_settings(arguments: list[str]) -> Settings:
    """Turn the command line into settings: flags beat the config file, the file beats the defaults."""
    return _read_command(arguments)[0]


def read_beginning(arguments: list[str]) -> tuple[Settings, "Beginning | None"]:
    """The settings, and the checkpoint or weights that the run begins with, read once; None: random weights.

    With --resume and no --config the checkpoint's own settings count, and flags beat them.

    Raises:
        InputError: a file cannot be read, or there is nothing to resume.
    """
    settings, flags, has_config = _read_command(arguments)
    training = settings.training
    if not training.resumes and training.init_from is None:
        return settings, None
    with heavy_imports():
        from model.runs.beginning import Beginning, find_beginning, take_shape_of_checkpoint
        from model.runs.folder import is_in
        from model.runs.resume import find_checkpoint

    if has_config or not training.resumes:
        return settings, find_beginning(settings, say)
    if (checkpoint := find_checkpoint(training, say)) is None:
        where = " or ".join(filter(None, (training.out_dir, training.copy_to)))
        raise InputError(f"--resume: no checkpoint in {where}; start the run again without --resume")
    path, content = checkpoint
    saved = content["settings"]
    out_dir = training.out_dir if is_in(path, training.copy_to) else str(path.parent)
    place = {"out_dir": out_dir, "resume_from": None, "resume": True}
    settings = build_settings(saved | {"training": saved["training"] | place}, flags, str(path))
    say(f"settings: those saved in {path}" + (f", and {', '.join(f'--{name}' for name in flags)}" if flags else ""))
    if settings.training.init_from is not None:
        _refuse_shape(flags)
        take_shape_of_checkpoint(settings, path, content)
    return settings, Beginning(checkpoint)


def _read_command(arguments: list[str]) -> tuple[Settings, dict[str, str], bool]:
    """The settings that the command line gives, its flags for settings, and whether it names a config file."""
    usage = "%(prog)s [--config FILE ...] [--SETTING VALUE ...] [--dry_run] [--restarts N] [--nproc_per_node N]"
    parser = CommandParser("--config", prog="train.py", usage=usage, description=__doc__.split("\n")[0], add_help=True)
    about = "config file (YAML); config.yaml explains every setting; several, each after --config, are trained in turn"
    parser.add_argument("--config", type=path_flag, metavar="FILE", help=about)
    parser.add_argument("--local-rank", "--local_rank", metavar="N", help="set by torch.distributed.launch")
    add_launcher_flags(parser)
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section)
        for field in dataclasses.fields(cls):
            add_option(group, field, as_text=True)
    known, unknown = parser.parse_known_args(arguments)
    problems = parser.describe_unknown(unknown) if unknown else []
    flags = {name: value for name, value in vars(known).items() if name in FIELDS and value is not None}
    values = {} if known.config is None else read_config(known.config)
    has_config = known.config is not None
    settings = build_settings(values, flags, known.config or "config", problems, checkpoint_follows=not has_config)
    training = settings.training
    if training.init_from is not None:
        _refuse_shape(flags)
    if not has_config and training.resume_from is not None and "out_dir" not in flags:
        training.out_dir = str(Path(training.resume_from).parent)  # where the run resumes
    return settings, flags, has_config


def _refuse_shape(flags: dict[str, str]) -> None:
    """Refuse flags that contradict the weights of init_from."""
    with heavy_imports():
        from model.runs.beginning import refuse_shape

    refuse_shape(list(flags))


def prepare_data_if_missing(settings: Settings) -> None:
    """Make a missing token file from raw_data_path, or for the default path from what lies in dataset/.

    Raises:
        InputError: there is nothing to make it from, or the path is no token file's.
    """
    from model.training.data import FORMAT_OF_KIND, data_command, refuse_text  # imports torch

    data = settings.data
    if not is_one_file(data.train_data_path):
        _refuse_to_make_several(data)
        return
    target = Path(data.train_data_path)
    refuse_text("train_data_path", data.train_data_path)
    if target.is_dir():
        raise InputError(f"train_data_path: {target} is a folder, a token file (.bin) expected")
    if target.exists() and not job_path(target).exists():
        _say_what_it_holds(target, data.raw_data_path)
        return
    from optimized_data_processing import OptimizedDataProcessor, default_input_path

    source = data.raw_data_path
    if source is None and os.path.realpath(target) == os.path.realpath(DataSettings.train_data_path):
        source = default_input_path()
    if source is None:
        command = data_command(data.train_data_kind, output_path=target)
        raise InputError(f"train_data_path: no file {target}; make it with: {command}")
    say(f"{target} is missing: making it from {source}")
    try:
        kind = {} if data.train_data_kind is None else {"format": FORMAT_OF_KIND[data.train_data_kind]}
        OptimizedDataProcessor(tokenizer_path=data.tokenizer_path, **kind).process_dataset(str(source), str(target))
    except InputError as error:  # name the settings that the user gave
        names = {"input_path:": "raw_data_path:", "output_path:": "train_data_path:"}
        problems = [str(problem) for problem in error.args]
        for name, setting in names.items():
            problems = [setting + text.removeprefix(name) if text.startswith(name) else text for text in problems]
        raise InputError(*problems) from error


def _refuse_to_make_several(data: DataSettings) -> None:
    """Of several token files, make none: all of them must be there."""
    paths = sum(find_token_files(data.train_data_path, leave_out=(data.val_data_path, data.mix_data_path)), [])
    if data.raw_data_path is not None:
        raise InputError(
            f"raw_data_path: it makes one token file, but train_data_path names {len(paths)}; omit raw_data_path"
        )
    say(f"train_data_path: {counted(len(paths), 'token file')}, from {paths[0]} to {paths[-1]}")


def _say_what_it_holds(target: Path, raw_data_path: str | None) -> None:
    """Print what an existing token file was made from, and warn where raw_data_path is another file."""
    manifest = read_manifest(target)
    if manifest is None:
        say(f"train_data_path: {target}, which has no manifest to say what it was made from")
        return
    names = [source["name"] for source in manifest.sources]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    say(f"train_data_path: {target}, {manifest.tokens:,} tokens of {', '.join(names[:3])}{more}")
    of_many = (
        raw_data_path is None
        or raw_data_path.startswith(("datasets:", "ms:"))
        or any(c in raw_data_path for c in "*?[")
    )
    if of_many or Path(raw_data_path).is_dir():
        return
    raw = Path(raw_data_path)
    sizes = {source.get("size") for source in manifest.sources if source["name"] == raw.name}
    if not sizes or (raw.is_file() and None not in sizes and raw.stat().st_size not in sizes):
        made = "before that was changed" if sizes else "from other data"
        say(
            f"warning: raw_data_path {raw_data_path} is not read, since {target} exists and was made {made};"
            " give another train_data_path to make a new one"
        )


def make_preview(settings: Settings):
    """A function that continues a few prompts with the model in training, or answers a few questions if it learns
    chats, to show what it has learned."""
    from model.text.tokenization import end_ids, open_tokenizer
    from optimized_inference import GenerationConfig, TextGenerator

    end_ids(open_tokenizer(settings.data.tokenizer_path))  # a bad generation_config.json is reported now
    prompts: list[str] = []

    def preview(model, data: "TrainingData") -> list[str]:
        if not prompts:
            prompts.extend(PREVIEW_QUESTIONS if data.is_chat else preview_prompts(data))
        generator, lines = TextGenerator(model, data.tokenizer, compile=False, chat=data.chat or None), []
        for number, prompt in enumerate(prompts):
            # One seed each: equal seeds give similar texts.
            config = GenerationConfig(max_new_tokens=40, seed=settings.training.seed + number)
            try:
                if data.is_chat:
                    config = GenerationConfig(max_new_tokens=40, do_sample=False, repetition_penalty=1)
                    text = generator.chat([{"role": "user", "content": prompt}], config)
                else:
                    text = generator.generate(prompt, config)
            except InputError as error:  # a context too short for the prompt: no reason to end the training
                text = f" ({error})"
            lines.append(f"{prompt}▸{text}".replace("\n", " "))
        return lines

    return preview


def preview_prompts(data: "TrainingData") -> list[str]:
    """What the model in training continues: PREVIEW_PROMPTS where the texts are like the sample corpus, otherwise how
    some of them begin."""
    own = [] if data.contains(PREVIEW_PROMPTS[0]) else data.openings(len(PREVIEW_PROMPTS))
    return own or list(PREVIEW_PROMPTS)


def judge(model, data: "TrainingData") -> tuple[dict, str]:
    """Let the model in training answer questions of held-out chats, greedily; returns metrics, and a line on them."""
    from model.generation.judging import judge_answers, judged_text
    from optimized_inference import GenerationConfig, TextGenerator

    generator = TextGenerator(model, data.tokenizer, compile=False, chat=data.chat)
    context = model.config.max_seq_len
    turns = [turn for turn in data.validation_turns(JUDGED_CHATS) if len(turn[0]) < context]
    config = GenerationConfig(max_new_tokens=128, do_sample=False, repetition_penalty=1)
    written = generator.continued([prompt for prompt, _ in turns], config) if turns else []
    expected = [data.decoded(ids) for _, ids in turns]
    judged = judge_answers([sample.text for sample in written], [sample.end for sample in written], expected)
    return judged, judged_text(judged)


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for how processes are started, and whether to train at all. They don't change a run, so they are not
    settings."""

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
        help="restart the training with --resume when it dies, up to N times; not when it has diverged, its input is"
        " bad, or it was interrupted [0]",
    )
    group.add_argument(
        "--nproc_per_node",
        metavar="N",
        type=whole_number,
        default=None,
        help="train in N processes on this machine, as torchrun --standalone does, and exit with the code of the one"
        " that failed; without it: in this process",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="do not train: measure a few steps and print the memory, FLOPs and time that the run will take; out_dir"
        " stays as it is",
    )
    group.add_argument(
        "--on",
        metavar="GPUS",
        help="with --dry_run: measure nothing; compute what the run would take on GPUs that need not be here, such as"
        " 8xH100 or, nodes x GPUs, 2x8xH100",
    )


def start_processes(restarts: int, nproc_per_node: int | None, arguments: list[str]) -> int:
    """Train in other processes than this one, as the launcher flags say; returns the exit code."""
    if nproc_per_node == 0:
        raise InputError("--nproc_per_node: 0 found, at least 1 expected")
    if "WORLD_SIZE" in os.environ:
        raise InputError("--restarts and --nproc_per_node start the processes themselves; omit torchrun")
    training = read_settings(arguments).training  # bad input is reported before anything starts
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


def train_in_turn(configs: list[str], arguments: list[str]) -> int:
    """Train with each config file in turn, each in a separate process, until one fails or its max_hours are over;
    returns its exit code."""
    if "WORLD_SIZE" in os.environ:
        raise InputError("--config: several found, one expected under torchrun; omit it, and use --nproc_per_node")
    from model.runs.status import read_status
    from model.runs.supervisor import Supervisor

    runs = [[*arguments, f"--config={path}"] for path in configs]
    # Bad input is reported before anything starts.
    folders = [Path(read_settings(run).training.out_dir) for run in runs]
    for number, (path, run, out_dir) in enumerate(zip(configs, runs, folders, strict=True), 1):
        say(f"--config {path}")
        command = [sys.executable, str(Path(__file__).resolve()), *run]
        if (code := Supervisor(command, command, out_dir, 0, say).run()) != 0:
            return code
        if (read_status(out_dir) or {}).get("state") == "time_limit" and configs[number:]:
            rest = ", ".join(configs[number:])
            say(f"--config {rest}: not trained yet; give the same command again, with --resume")
            return 0
    return 0


def main() -> int:
    """Run one training, or one for each --config; returns the exit code."""
    signal.signal(signal.SIGTERM, interrupt)  # until training itself listens; also as process 1
    parser = CommandParser("--config", prog="train.py", add_help=False)
    parser.add_argument("--config", action="append", default=[])
    several, arguments = parser.parse_known_args(sys.argv[1:])
    if len(several.config) > 1:
        return train_in_turn(several.config, arguments)
    parser = CommandParser("--config", prog="train.py", add_help=False)
    add_launcher_flags(parser)
    launcher, arguments = parser.parse_known_args(sys.argv[1:])
    if launcher.on is not None:
        return print_forecast(launcher, arguments)
    if launcher.dry_run and launcher.nproc_per_node is not None:
        return start_processes(0, launcher.nproc_per_node, [*arguments, "--dry_run"])
    if not launcher.dry_run and (launcher.restarts or launcher.nproc_per_node is not None):
        return start_processes(launcher.restarts, launcher.nproc_per_node, arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from model.runs.launch import end_with_parent

        end_with_parent()
    settings, beginning = read_beginning(arguments)
    processes = Processes()
    several = processes.world_size > 1
    if settings.training.ddp and not several:
        say("ddp: this is a single process; several are started by: torchrun --nproc_per_node=N train.py … --ddp")
    elif several and not settings.training.ddp:
        say(f"ddp: torchrun started {processes.world_size} processes, so they train together")
    return train(settings, beginning, processes, launcher.dry_run)


def train(settings: Settings, beginning: "Beginning | None", processes: Processes, dry_run: bool) -> int:
    """Train, or only report what that would take; returns the exit code."""
    with heavy_imports():  # after everything that can fail early
        import torch._dynamo  # noqa: F401 (optimizers import it when they are built)

        from model.runs.folder import refuse_closed
        from model.training.memory import is_out_of_memory
        from optimized_pretrain import Trainer

    trainer = None
    try:
        if processes.is_main:
            refuse_closed(Path(settings.training.out_dir))
        prepare_data_for_all(settings, processes)
        trainer = Trainer(settings, processes, make_preview(settings), beginning, judge)
        if dry_run:
            return print_dry_run(trainer, processes)
        trainer.stop_signal.install()  # until the process ends: torchrun sends its signal twice
        outcome = trainer.train()
    except BaseException as error:
        if is_out_of_memory(error):
            text = "out of memory: lower batch_size and raise accumulation_steps, or lower max_seq_len"
            error = InputError(text).with_traceback(error.__traceback__)
        processes.announce(error)
        if trainer is not None:
            trainer.tell_failure(error)
        raise error
    finally:
        processes.close()
    step, out_dir = trainer.progress.step, Path(settings.training.out_dir)
    if outcome in ("interrupted", "time_limit"):
        copy_to = settings.training.copy_to
        copy = [] if copy_to is None else ["--copy_to", copy_to]
        command = command_line(*_as_started(processes, ["train.py", "--resume", "--out_dir", out_dir, *copy]))
        why = f", since max_hours {settings.training.max_hours:g} are over" if outcome == "time_limit" else ""
        say(f"stopped after step {step:,}{why}; resume with: {command}")
        return trainer.exit_code(outcome)
    best = out_dir / "best_model.pth"
    say(f"{outcome.replace('_', ' ')} after step {step:,}; metrics and curves are in {out_dir}")
    is_measured = math.isfinite(trainer.progress.best_val_loss)
    what = "weights of the lowest loss" if is_measured else "the same, since nothing was evaluated"
    say(f"final weights: {out_dir / trainer.final_name}; {what}: {best}")
    inference = ["python", "inference.py", "--model_path", best]
    if trainer.data.is_chat:
        say(f"chat with it: {command_line(*inference, '--interactive')}")
    else:
        say(f"let it continue a text: {command_line(*inference, '--prompt', preview_prompts(trainer.data)[0])}")
    return trainer.exit_code(outcome)


def _as_started(processes: Processes, script: list) -> list:
    """The words that run a script in as many processes as this run has on each machine, started as these were."""
    from model.runs.launch import is_ours

    if processes.world_size == 1:
        return ["python", *script]
    of_a_machine = f"--nproc_per_node={processes.local_world_size}"
    return ["python", *script, of_a_machine] if is_ours() else ["torchrun", of_a_machine, *script]


def prepare_data_for_all(settings: Settings, processes: Processes) -> None:
    """Rank 0 makes missing data; the others wait for it, and end if it fails or dies.

    Raises:
        InputError: as `prepare_data_if_missing`, or this process's machine has no such file.
        ProcessLost: rank 0 has failed.
    """
    given = settings.data.train_data_path
    target = Path(given) if is_one_file(given) else None  # several are not made
    if processes.world_size > 1:
        device, _ = pick_device(settings.training.device, processes.local_rank)
        processes.start(device, settings.training.ddp_timeout, _end_process)
    timeouts = DATA_SECONDS / settings.training.ddp_timeout
    if not processes.is_main and target is not None and not target.exists():
        print_message(f"[rank {processes.rank}] waiting for rank 0, which makes {target}")
    with processes.main_first(f"making {given}", timeouts):
        if processes.is_main:
            prepare_data_if_missing(settings)
        elif target is None:
            find_token_files(given)
        elif not target.exists():
            raise InputError(
                f"train_data_path: rank 0 has {target}, rank {processes.rank} on another machine does not; use a folder"
                " that all machines share, or copy the file and its .json"
            )


def print_forecast(launcher: argparse.Namespace, arguments: list[str]) -> int:
    """Print what the run would take on GPUs that need not be here; returns the exit code."""
    cluster = parse_cluster(launcher.on)
    if not launcher.dry_run:
        raise InputError(f"--on {launcher.on}: it trains nothing, and goes with --dry_run only; add that, or omit --on")
    if "WORLD_SIZE" in os.environ or launcher.nproc_per_node is not None:
        raise InputError("--on: one process computes it for any number of GPUs; omit torchrun and --nproc_per_node")
    settings, _, has_config = _read_command(arguments)
    if settings.training.init_from is not None or (settings.training.resumes and not has_config):
        raise InputError(
            "--on: it reads the model's shape from the settings, not from weights or checkpoints; omit --init_from and"
            " --resume, and give the shape (dim, n_layers …)"
        )
    with heavy_imports():
        from model.training.forecast_report import forecast_lines
        from model.training.run_forecast import forecast_run

    lines = forecast_lines(forecast_run(settings, cluster, say), settings.data.train_data_path)
    print("\n".join(["", *lines]))
    return 0


def _end_process(message: str) -> None:
    """End this process from the watchdog's thread; the main thread waits for a process that is gone."""
    print_error(message)
    os._exit(ProcessLost.exit_code)


def print_dry_run(trainer, processes: Processes) -> int:
    """Print, on rank 0, what the run would take; returns the exit code."""
    from model.training.report import dry_run

    lines = dry_run(trainer.plan, trainer.measure_steps)
    if processes.is_main:
        print("\n".join(["", *lines, "", "this was a dry run: nothing was trained, and nothing written to out_dir"]))
    processes.barrier()
    return 0


if __name__ == "__main__":
    run_command(main)
