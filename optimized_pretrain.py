"""Training, from top to bottom: `Trainer(settings).train()`.

One loop trains on one CPU, one GPU or many nodes. It can stop at any time and resume with the same weights, bit for
bit, as if it had never stopped (on the same machine, versions, threads and number of processes).

`__init__` sets up: what the run will do is its `plan`, what it changes its `state`. `_loop` decides when to evaluate,
save and end, and takes the steps, one after another: their arithmetic is the `stepper`'s (model/training/stepper.py),
and what they minimize the `objective`'s. `_count` and `_log` record, and `_beat` reports to the watchdog.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import utils
from model import accelerator
from model.errors import InputError, ProcessLost, TrainingDiverged, check_type
from model.model import Transformer
from model.runs.beginning import Beginning, find_beginning, open_data
from model.runs.checkpoint import checkpoint_content, restore_state
from model.runs.folder import step_checkpoint
from model.runs.launch import is_ours
from model.runs.part_saving import PartSaver, PartsBeingSaved
from model.runs.resume import environment
from model.runs.run_files import RunFiles
from model.runs.signals import StopVote
from model.runs.status import outcome_of
from model.runs.time_limit import TimeLimit
from model.token_file.token_layout import FileShortened
from model.training.balance import Routing
from model.training.choices import weight_shards
from model.training.clock import Clock
from model.training.config_file import load_settings  # noqa: F401 (for callers of Trainer)
from model.training.data import TrainingData
from model.training.determinism import deterministic_kernels, random_state, restore_random_states, seed_everything
from model.training.divergence import difference_of_weights, limit_reached, norm_of
from model.training.evaluation import Evaluator
from model.training.fully_sharded import FullySharded
from model.training.hints import Hints
from model.training.memory import check_memory
from model.training.objective import choose_objective
from model.training.plan import plan_run
from model.training.progress import Progress, StepResult
from model.training.replicated import Replicated
from model.training.report import (
    bar_text,
    describe,
    evaluation_lines,
    measured_lines,
    position,
    step_metrics,
)
from model.training.settings import Settings, TrainingSettings, recipe_lines
from model.training.stepper import Stepper
from model.training.train_state import TrainState
from model.training.verification import BackgroundVerification
from model.weights import Weights
from utils import Processes, say

EXIT_CODES = {"finished": 0, "early_stopping": 0, "time_limit": 0, "interrupted": 130}
FIRST_STEP_TIMEOUTS = 3  # the first step may compile kernels: it may take this many times ddp_timeout


class Trainer:
    """Trains a Transformer as the settings say: on texts; where the token file holds chats, on their answers; where it
    holds pairs of answers, to prefer the chosen ones.

    Args:
        settings: all settings of the run, as `load_settings` makes them.
        processes: the processes that train together; None: this one alone.
        preview: called on rank 0 after each evaluation with the evaluated model and the data; returns lines to print.
        beginning: the checkpoint or the weights to begin with, already read; None: read as the settings say.
        judge: called on rank 0 at each evaluation of chats with the evaluated model and the data; returns metrics of
            its answers, and a line on them.

    Raises:
        InputError: data, tokenizer or checkpoint are missing or do not fit together, or the memory is too small.
        ProcessLost: not all processes came.

    Attributes:
        model: that is trained, as it is here.
        plan: what the run will do.
        progress: where it is.
        state: the weights and all that a step changes.
        stepper: takes the steps.
    """

    def __init__(
        self,
        settings: Settings,
        processes: Processes | None = None,
        preview: Callable[[Transformer, TrainingData], list[str]] | None = None,
        beginning: Beginning | None = None,
        judge: Callable[[Transformer, TrainingData], tuple[dict, str]] | None = None,
    ) -> None:
        check_type("settings", settings, Settings, 'load_settings("config.yaml") gives them')
        # As the user gave them, with the shape of `init_from`'s weights; `self.training` has no `auto` left.
        self.settings = copy.deepcopy(settings)
        self.processes = processes = processes or Processes.alone()
        self.preview, self.judge = preview, judge
        self.stop_signal = utils.StopSignal()
        self.stop_vote = StopVote(processes.all_sum, alone=processes.world_size == 1)
        self.files: RunFiles | None = None  # on rank 0, once it trains
        self.part_saver: PartSaver | None = None  # once it trains, where all ranks write the checkpoints
        self.progress, self.clock = Progress(), Clock()
        self._start_processes()

        beginning = beginning or find_beginning(self.settings, say)
        self.resumed = beginning.checkpoint
        for line in recipe_lines(self.settings) if self.resumed is None else ():
            say(line)
        shards = weight_shards(self.settings.training, processes)
        self.environment = environment(processes.world_size, self.dtype, self.device, shards)
        self.data = open_data(self.settings, self.resumed, self.environment, processes, say)
        self.verification = BackgroundVerification(self.data.unverified, say)
        self.config = self.data.config
        # Chats shorter than what the weights know do not unlearn the rest.
        self.context = max(self.config.max_seq_len, beginning.context if self.data.is_chat else 0)
        self.model = self._build_model(beginning, shards)
        with self.kernels():  # what is measured here is measured with training's kernels
            peak = utils.measure_matmul_flops(self.device, self.dtype, self.model.layer_shapes())
            self.hardware = dataclasses.replace(self.hardware, peak_flops=peak)
            self.plan = plan_run(self.settings, self.data, self.model, self.hardware, self.resumed, processes, say)
            references = beginning.references(self.data, self.plan, processes, say)
        self.training = t = self.plan.training
        _set_ways(self.model, t)

        self.objective = choose_objective(self.data, self.plan, references)
        self.routing = Routing(self.model, t)
        self.hints = Hints(self.plan, self.data, say)
        self.evaluator = Evaluator(self.objective, self.data, self.plan, processes, self._is_stop_asked)

        self.parallel = self._parallel_model(is_whole=shards == 1)
        self.state = TrainState(self.model, self.parallel, self.plan, processes)
        self.stepper = Stepper(
            plan=self.plan,
            state=self.state,
            data=self.data,
            objective=self.objective,
            routing=self.routing,
            processes=processes,
            stop_signals=lambda: self.stop_signal.count,
            drops_step=self.stop_vote.drops_step,
            beat=self._beat,
            say=say,
        )
        seed_everything(t.seed + 1 + processes.rank)  # dropout differs between ranks
        if self.resumed is not None:
            self._restore(self.resumed.content)
        for line in describe(self.plan):
            say(line)

    def _start_processes(self) -> None:
        """Choose what this process computes on, and wait for the others."""
        asked, processes = self.settings.training, self.processes
        self.hardware = utils.choose_hardware(asked.device, asked.dtype, processes.local_rank)
        self.device, self.dtype, self.autocast = self.hardware.device, self.hardware.dtype, self.hardware.autocast
        self.kernels = functools.partial(deterministic_kernels, self.device, asked.deterministic)
        if (line := accelerator.bits_may_differ(self.device, asked.deterministic)) is not None:
            say(line)
        processes.start(self.device, asked.ddp_timeout, self._give_up)
        dtype = str(self.dtype).removeprefix("torch.")
        processes.check_same("dtype", dtype, "set dtype float32, which every machine computes")

    def _build_model(self, beginning: Beginning, shards: int) -> Transformer:
        """The model that is trained, on its device, if there is room; where ranks share the weights, on the CPU.

        Args:
            shards: ranks that share a copy of the weights; 1: each has all of them.
        """
        asked, processes = self.settings.training, self.processes
        ranks = processes.world_size if shards == 1 else shards
        memory = check_memory(self.config, asked, self.device, self.autocast, processes.local_world_size, ranks)
        if memory is not None:
            say(memory)
        seed_everything(asked.seed)
        model = beginning.build_model(self.config, asked).to(self.device if shards == 1 else "cpu")
        model.checkpointing = asked.activation_checkpointing
        return model

    def _parallel_model(self, is_whole: bool) -> Replicated | FullySharded:
        """The model as the processes have it together."""
        t, processes = self.training, self.processes
        if not is_whole:
            return FullySharded(self.model, self.plan.shards, self.hardware, processes, t.compile)
        called = torch.compile(self.model) if t.compile else self.model
        called = utils.distributed(called, processes, t.batch_size, self.config.max_seq_len, self.hardware)
        return Replicated(self.model, called, processes.world_size)

    def _restore(self, checkpoint: dict) -> None:
        """Go on where a checkpoint was saved, whose weights and optimizer are then dropped from memory."""
        state = self.state
        load_weights = self.parallel.load_weights
        self.progress = restore_state(checkpoint, load_weights, state.ema, state.optimizer, state.scaler)
        if checkpoint["validation"] != self.data.validation:
            say("the validation data has changed: best loss and patience are reset")
            self.progress.forget_evaluations()
        new_seed = self.training.seed + 1 + self.processes.rank + 1000 * self.progress.step
        restore_random_states(checkpoint["random_states"], self.processes, new_seed, say)
        for part in ("model", "ema", "optimizer"):  # of which a rank may keep only its share
            del checkpoint[part]

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self) -> str:
        """Train until the end; returns how it ended: "finished", "early_stopping", "time_limit" or "interrupted".

        Raises:
            TrainingDiverged: too many steps in a row could not be used.
            ProcessLost: another process failed or no longer answers.
            InputError: the folder cannot be used or has no room; too many saves in a row failed, or the last one did.
        """
        self.files = self.part_saver = None
        self.stop_signal.install()
        try:
            self._open_files()
            self.verification.start()
            with self._time_limit():
                outcome = self._loop()
            if self.files is not None:
                self.files.finish_copies()
            self.processes.barrier()  # rank 0 has written everything
            self._tell_status(outcome, EXIT_CODES[outcome] if is_ours() else self.exit_code(outcome))
            return outcome
        except RuntimeError as error:  # a gradient's exchange that broke, or a fault
            if (lost := self.processes.lost(error)) is not None:
                raise lost from error
            raise
        finally:
            self.verification.close()
            if self.files is not None:
                self.files.close()
            if self.part_saver is not None:
                self.part_saver.close()
            self.stop_signal.restore()

    def _open_files(self) -> None:
        """On rank 0: claim the run's folder, and start the trackers."""
        with self.processes.main_first():
            if self.processes.is_main:
                beat = functools.partial(self.processes.beat, "writing to the disk")
                self.files = RunFiles(self.settings, self.plan, self.resumed, say, beat)
        if self.processes.decided(lambda: self.files.left_best):
            say("best_model.pth was of later steps: best loss and patience are reset")
            self.progress.forget_evaluations()
        if self.files is not None:
            self.files.start_trackers(self.settings)
        if self.plan.writers > 1:
            self.part_saver = PartSaver(Path(self.training.out_dir), self.processes, say)

    def _time_limit(self) -> contextlib.AbstractContextManager:
        """On rank 0: ask to stop, as a signal would, when max_hours are over. All ranks stop at the same step."""
        if self.files is None:
            return contextlib.nullcontext()
        return TimeLimit(self.training.max_hours, self.files.seconds_to_save, self.stop_signal.expire)

    def _why_stopped(self) -> str:
        """How a run that was asked to stop has ended, the same on all ranks."""
        return "interrupted" if self.processes.any(self.stop_signal.signals) else "time_limit"

    def _loop(self) -> str:
        t, progress = self.training, self.progress
        self.clock = Clock(progress.seconds)
        is_saved = self.processes.decided(step_checkpoint(Path(t.out_dir), progress.step).exists)
        saved_step = progress.step if is_saved else 0
        done, stop_asked = self.plan.is_done(progress.step, progress.samples), False
        if progress.step == 0:
            with self.clock.evaluation():
                self._measure_before()
        show_bar = utils.progress_bar(self.plan.total_steps, progress.step, self.processes.is_main)
        with show_bar as bar, utils.garbage_left():
            while True:
                # First evaluate, save or end at the step that was reached, then take the next one: so a resumed run
                # first finishes what it was stopped in.
                interrupted = self._is_due(t.eval_interval, done) and not self._evaluate_and_keep_best()
                if interrupted or (stop_asked and not done and self.stepper.in_flight is None):
                    self._save_checkpoint(interrupted=True)
                    if self.stepper.unread is not None:
                        raise self.stepper.unread
                    return self._why_stopped()
                stops_early = t.early_stopping and progress.evaluations_without_gain >= t.patience
                if self._is_due(t.save_interval, done or stops_early) and saved_step != progress.step:
                    self._save_checkpoint()
                    saved_step = progress.step
                if done or stops_early:
                    self._save_final()
                    return "finished" if done else "early_stopping"

                with self.processes.step():
                    result = self._take_step(last=stop_asked)
                if result is None:
                    stop_asked = True
                    continue
                bar.update(progress.step - bar.n)
                done = self.plan.is_done(progress.step, progress.samples)
                stop_asked = stop_asked or result.stop_asked
                if result.fault is None and self._is_due(t.log_interval, done):
                    self._log(result, bar)
                    gc.collect()

    def _take_step(self, last: bool = False) -> StepResult | None:
        """Take a step and count it; None: a signal to stop came within it.

        Args:
            last: on a device that runs ahead, launch none after it.
        """
        result = self.stepper.advance(self.progress, last)
        if result is not None:
            self._count(result)
        return result

    def _is_due(self, interval: int, at_the_end: bool) -> bool:
        return self.progress.step > 0 and (self.progress.step % interval == 0 or at_the_end)

    def measure_steps(self, seconds: float, most: int) -> float:
        """Train without saving or evaluating; returns the tokens per second of all processes.

        Args:
            seconds: to train for.
            most: steps at most; 1 at least. If there may be several, those until one is captured are not timed.
        """
        while most > 1 and not self.stepper.is_settled:
            self._take_step()
        self.clock = Clock()
        for _ in range(most):
            self._take_step()
            if self.processes.any(self.clock.run_seconds > seconds):  # all processes stop together
                break
        return self.clock.take_rate()

    def exit_code(self, outcome: str) -> int:
        """Exit code for this outcome. torchrun takes any code but 0 for a failure, and would restart the processes."""
        return 0 if self.processes.by_torchrun else EXIT_CODES[outcome]

    def _beat(self, doing: str) -> None:
        """Report to the watchdog what this rank does next in a step."""
        self.processes.beat(doing, 1.0 if self.clock.steps else FIRST_STEP_TIMEOUTS)

    # -------------------------------------------------------------------------------------------------- evaluation

    def build_evaluated_model(self) -> Transformer | None:
        """The weights that are evaluated, previewed and kept: the moving average, if there is one. With LoRA these are
        the sums, in a new model: so all that is measured is measured of the weights that are written. Every process
        must call it: where they share them, they are put together, with shared weights on rank 0 only."""
        return self.parallel.evaluated_model(self.state.ema)

    def evaluate(self, model: Transformer | None = None) -> dict[str, float] | None:
        """Validation loss and what else is measured (`Evaluator.measure`); None if a signal to stop came meanwhile.

        Args:
            model: what `build_evaluated_model` returned; None: it is built.
        """
        with self.kernels(), self.parallel.evaluating(model, self.state.ema) as evaluated:
            return self.evaluator.measure(evaluated)

    def _measure_before(self) -> None:
        """Before the first step: the losses of the weights of `init_from`, and of the texts that may be forgotten."""
        begins_with_weights = self.settings.training.init_from is not None and len(self.plan.val_samples) > 0
        model = self.build_evaluated_model()
        measure = self.evaluator.measure if begins_with_weights else self.evaluator.measure_texts
        with self.kernels(), self.parallel.evaluating(model, self.state.ema) as evaluated:
            measured = measure(evaluated)
        if not measured or self.files is None:
            return
        for line in measured_lines("before training: ", measured, self.data.is_chat):
            say(line)
        self._write_metrics(self.files, measured)
        if begins_with_weights:
            self._show_preview(model)

    def _is_stop_asked(self) -> bool:
        """Whether any process got a signal to stop: all of them stop at the same batch of an evaluation."""
        self.processes.beat(f"an evaluation at step {self.progress.step}")
        return self.processes.any(self.stop_signal.count)

    def _evaluate_and_keep_best(self) -> bool:
        """Evaluate, unless this step was evaluated already; False if a signal to stop came meanwhile."""
        self._check_weights()
        progress = self.progress
        if len(self.plan.val_samples) == 0 or progress.last_evaluation == progress.step:
            return True
        with self.clock.evaluation():
            self._wait_until_verified()
            model = self.build_evaluated_model()  # once for all that follows: with LoRA it takes time and memory
            try:
                measured = self.evaluate(model)
            except FileShortened:  # the held-out one: this run has learned from another
                if self.plan.world_size == 1:
                    self._save_checkpoint(interrupted=True)
                raise
            if measured is None:
                return False
            is_best = progress.count_evaluation(measured["val_loss"])
            if self.files is not None:
                if is_best:
                    self.files.save_weights("best_model.pth", self._weights(model))
                self._report_evaluation(self.files, model, measured)
        return True

    def _report_evaluation(self, files: RunFiles, model: Transformer, measured: dict) -> None:
        """On rank 0: print the loss, judge answers, draw the curves, show what the model writes.

        Args:
            model: that was evaluated.
            measured: as metrics.jsonl has it.
        """
        for line in evaluation_lines(self.progress, measured, self.data.is_chat):
            say(line)
        measured = measured | self.hints.after_evaluation(self.progress, measured)
        if (line := self.routing.line()) is not None:
            say(f"    {line}")
        if self.judge is not None and self.data.is_chat:
            judged, line = self.judge(model.eval(), self.data)
            say(f"    {line}")
            measured = measured | judged
        self._write_metrics(files, measured)
        files.metrics.update_curves()
        self._show_preview(model)

    def _show_preview(self, model: Transformer) -> None:
        if self.preview is not None:
            for line in self.preview(model.eval(), self.data):
                say(f"    {line}")
        self.model.train()

    # ------------------------------------------------------------------------------------------------------ saving

    def _wait_until_verified(self) -> None:
        """Before weights or a checkpoint are saved: what they were trained on is whole. After a signal to stop the run
        does not wait, since it reads the files again when it resumes.

        Raises:
            InputError: a token file is damaged.
        """
        beat = functools.partial(self.processes.beat, "verifying the token files")
        self.verification.wait(beat, lambda: self.stop_signal.count > 0)

    def _save_checkpoint(self, interrupted: bool = False) -> None:
        """Copy the state, for a thread to write it; an interrupted run waits until it is written."""
        self._check_weights()
        if not interrupted:
            self._wait_until_verified()
        self.processes.beat(f"saving at step {self.progress.step}")
        states = self.processes.gather((random_state(), norm_of(self.parallel.own_weights())))
        state, parts = self._state_to_save(interrupted)
        self.progress.seconds = self.clock.run_seconds
        if self.files is None:
            return
        if (difference := difference_of_weights([norm for _, norm in states], self.parallel.shards)) is not None:
            raise ProcessLost(f"step {self.progress.step}: {difference}")
        content = checkpoint_content(
            started=self.files.started,
            settings=self.settings,
            plan=self.plan,
            data=self.data,
            context=self.context,
            environment=self.environment,
            progress=self.progress,
            **state,
            ema_updates=self.state.ema_updates,
            scaler=self.state.scaler,
            random_states=[state for state, _ in states],
        )
        self.files.save_checkpoint(content, parts, interrupted)
        if interrupted:
            self.files.wait()

    def _state_to_save(self, interrupted: bool) -> tuple[dict, PartsBeingSaved | None]:
        """Model, average and optimizer: on rank 0, whole; or, where all ranks write the checkpoint, described, with
        this rank's part on its way to the disk. Every process must call it."""
        state = self.state.to_save(in_pieces=self.part_saver is not None)
        if self.part_saver is None:
            return state, None
        beat = functools.partial(self.processes.beat, "writing to the disk")
        return self.part_saver.save(state, self.progress.step, interrupted, beat)

    @property
    def final_name(self) -> str:
        """The file of the final weights."""
        kind = "dpo" if self.data.is_pairs else "sft" if self.data.is_chat else "pretrain"
        return f"{kind}_{self.config.dim}.pth"

    def _weights(self, evaluated: Transformer) -> Weights:
        """The evaluated model's weights with their description; not copied."""
        tokenizer = self.settings.data.tokenizer_path, self.data.tokenizer_sha256
        config = dataclasses.replace(self.config, max_seq_len=self.context)
        return Weights(evaluated.state_dict(), config, *tokenizer, chat=self.data.chat, step=self.progress.step)

    def _check_weights(self) -> None:
        """They are those of the step that was counted last, and of none that was launched ahead."""
        if self.stepper.in_flight is not None:
            raise AssertionError(f"step {self.stepper.in_flight.number + 1} was launched too early")

    def _save_final(self) -> None:
        self._wait_until_verified()
        evaluated = self.build_evaluated_model()
        if self.files is not None:
            weights = self._weights(evaluated)
            self.files.save_final(self.final_name, weights, self.progress.best_val_loss)

    # ------------------------------------------------------------------------------------------------- recording

    def _count(self, result: StepResult) -> None:
        """Count a step, taken or skipped.

        Raises:
            TrainingDiverged: too many steps in a row were skipped, or a save's weights were not finite.
            InputError: too many saves failed, or a token file is damaged.
        """
        self.clock.count_step(result.read)
        self.progress.count_step(result)
        self.verification.check()
        if result.fault is not None:
            self._report_skip(result)
        if self.files is not None:
            self.files.check(self.progress.step)
        if self.part_saver is not None:
            self.part_saver.check()

    def _report_skip(self, result: StepResult) -> None:
        """Say why a step was skipped, and end the run if there were too many."""
        progress, most = self.progress, self.training.max_skipped_steps
        found = f"step {progress.step + 1}: {result.fault}"
        limit = limit_reached(progress.overflows_in_a_row, progress.skipped_in_a_row, most)
        if limit is not None:
            if self.files is not None:
                with contextlib.suppress(InputError):  # it was reported
                    self.files.wait()  # a checkpoint that is not finite says more: the weights were so before
            advice = "then --resume from the last checkpoint"
            raise TrainingDiverged(f"{found}, with learning rate {result.lr:g}, and {limit}, {advice}")
        if not result.overflow:  # an overflow is part of loss scaling, and not worth a line
            say(f"{found}; its samples are skipped, weights unchanged")

    def _write_metrics(self, files: RunFiles, measured: Mapping) -> None:
        """Write a line of metrics.jsonl, which begins with where the run is."""
        where = position(self.plan, self.progress, self.data.train, self.clock.run_seconds)
        files.metrics.write(where | measured)

    def _log(self, result: StepResult, bar) -> None:
        """Write a line of metrics, over the steps since the last one, and show it beside the bar."""
        loss = self.progress.take_loss()  # on every rank: checkpoints hold the window
        tokens_per_second = self.clock.take_rate()
        if self.files is None:
            return
        metrics = step_metrics(self.plan, self.progress, result, loss, tokens_per_second)
        self._write_metrics(self.files, metrics)
        self._show_progress(bar, loss, tokens_per_second)

    def _show_progress(self, bar, loss: float, tokens_per_second: float) -> None:
        """Show loss, speed and time left beside the bar."""
        progress, plan = self.progress, self.plan
        tokens, evaluations = plan.tokens_left(progress.step, progress.samples), plan.evaluations_left(progress.step)
        left = self.clock.seconds_left(tokens, evaluations, plan.tokens_per_evaluation)
        bar.set_postfix_str(bar_text(left, loss, tokens_per_second))
        utils.progress_line(bar)

    def _tell_status(self, state: str, exit_code: int, message: str | None = None) -> None:
        """Write status.json, on rank 0."""
        if self.files is not None:
            self.files.tell(state, self.progress.step, exit_code, message)

    def tell_failure(self, error: BaseException) -> None:
        """Write to status.json why this run ends."""
        self._tell_status(*outcome_of(error))

    def _give_up(self, message: str) -> None:
        """End this process from the watchdog's thread, while the main thread waits for a process that is gone."""
        utils.print_error(message)
        self._tell_status("failed", ProcessLost.exit_code, message)
        os._exit(ProcessLost.exit_code)


def _set_ways(model: Transformer, training: TrainingSettings) -> None:
    """Have a model compute as the settings say."""
    model.training_attention = training.attention
    model.join_products(training.joined_products)
    model.compute_experts(training.expert_products)
    model.balance_loss, model.router_z_loss = training.balance_loss, training.router_z_loss


if __name__ == "__main__":
    raise SystemExit('this is no script: train with "python train.py --config config_demo.yaml"')
