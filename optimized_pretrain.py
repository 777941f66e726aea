"""Training, from top to bottom: `Trainer(settings).train()`.

There is one loop, on one CPU, one GPU or many nodes. A run can stop after any step and go on later with the same
weights, bit for bit, as if it had never stopped (on the same machine, versions, threads and number of processes).
"""

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import utils
from model.dataset import PretrainDataset, SampleOrder, number_documents
from model.errors import ProcessLost, TrainingDiverged
from model.loss import bits_per_byte
from model.model import Transformer
from model.runs.folder import RunSpace, check_space, step_checkpoint, write_config
from model.runs.initial_weights import load_initial
from model.runs.resume import checkpoint_to_go_on_from, environment
from model.runs.run_files import RunFiles
from model.runs.state import CHECKPOINT_VERSION, Progress, restore_state, saved_state
from model.runs.status import Status
from model.storage.archive import tensor_bytes
from model.training.choices import Choices, total_steps
from model.training.data import TrainingData
from model.training.divergence import difference_of_weights, fault_of_step, remember, weights_norm
from model.training.evaluation import validation_sums
from model.training.moving_average import MovingAverage
from model.training.optimizer import build_optimizer, optimizer_bytes, set_rates
from model.training.report import describe_run
from model.training.schedule import plan_schedule
from model.training.settings import Settings, TrainingSettings
from model.weights import Weights
from utils import Processes, say

EXIT_CODES = {"finished": 0, "early_stopping": 0, "interrupted": 130}
MAX_OVERFLOWS = 50  # float16 steps in a row that may overflow: each halves the loss scale
FIRST_STEP_PATIENCE = 3  # the first step compiles kernels, and may take so many times ddp_timeout


class Trainer:
    """Trains a Transformer as the settings say.

    Args:
        settings: all settings of the run.
        processes: the processes that train together.
        preview: called on rank 0 after each evaluation with the evaluated model; returns lines to print.

    Raises:
        InputError: data, tokenizer or checkpoint are missing or do not fit together.
        ProcessLost: not all processes came.
    """

    def __init__(
        self, settings: Settings, processes: Processes, preview: Callable[[Transformer], list[str]] | None = None
    ) -> None:
        self.settings = copy.deepcopy(settings)  # as asked for; `self.training` has what `auto` came to
        self.processes, self.preview = processes, preview
        self.out_dir = Path(settings.training.out_dir)
        self.stop = utils.StopSignal()
        self.files: RunFiles | None = None  # rank 0 has them, once it trains
        self._choose_hardware(settings.training)
        processes.start(self.device, settings.training.ddp_timeout, self._give_up)
        initial = load_initial(self.settings, say)
        self.data = TrainingData(self.settings, verify=processes.local_rank == 0, say=say)
        self.data.agree(processes.decided)
        self.config = self.data.config
        self.environment = environment(self.processes.world_size, self.dtype, self.device)
        found = checkpoint_to_go_on_from(self.settings.training, self.data, self.environment, say)
        self.resumed_from, checkpoint = found or (None, None)
        processes.check_same("the step to resume from", checkpoint and checkpoint["progress"]["step"])
        self.started = checkpoint["started"] if found else None
        self.choices = Choices(self.settings, found, processes, self.device, say)
        self.training = self.choices.training
        self._build_model(checkpoint, initial)
        self._plan(checkpoint)
        self.train_model = self._wrapped_model()  # what the loop calls; self.model stays the plain one
        for line in describe_run(self):
            say(line)

    # ------------------------------------------------------------------------------------------------- setting up

    def _choose_hardware(self, asked: TrainingSettings) -> None:
        self.device, why = utils.pick_device(asked.device, self.processes.local_rank)
        say(f"device {self.device}: {why}")
        self.dtype, why = utils.pick_dtype(asked.dtype, self.device)
        say(f"dtype {str(self.dtype).removeprefix('torch.')}: {why}")
        if self.device.type == "cpu":
            utils.keep_freed_memory()
        elif self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.autocast = contextlib.nullcontext()
        if self.dtype != torch.float32:
            self.autocast = torch.autocast(self.device.type, self.dtype)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic kernels ask of cuBLAS
        self.peak_flops = utils.measure_matmul_flops(self.device, self.dtype)

    def _build_model(self, checkpoint: dict | None, initial: dict[str, Tensor] | None) -> None:
        """Build model, optimizer, scaler and average, and put them where the checkpoint left them."""
        t = self.training
        utils.seed_everything(t.seed)
        self.model = Transformer(self.config)
        if initial is not None:
            self.model.load_state_dict(initial)
        self.model.to(self.device)
        self.flops_per_token = self.model.training_flops_per_token()
        self.ema = MovingAverage(self.model, t.ema_decay) if t.use_ema else None
        with utils.deterministic_kernels(self.device):  # as training runs: others take another amount of memory
            self.choices.batch_size(self.model, self.data, self.autocast)
        self.batch_rows = t.batch_size * self.processes.world_size  # samples of one micro-batch, over all processes
        self.order = SampleOrder(self.data.train_samples, t.seed, self.batch_rows * t.accumulation_steps)
        self.tokens_per_step = self.order.rows_per_step * self.config.max_seq_len
        self.choices.learning_rate(self.model, self.tokens_per_step)
        self.optimizer = build_optimizer(self.model, t.optimizer_type, t.learning_rate, t.weight_decay, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        utils.seed_everything(t.seed + 1 + self.processes.rank)  # dropout differs between ranks
        if checkpoint is not None:
            self._restore(checkpoint)

    def _wrapped_model(self) -> torch.nn.Module:
        """The model compiled, where it should be, and so that all processes' gradients are averaged."""
        wrapped = torch.compile(self.model) if self.training.compile else self.model
        if self.processes.world_size == 1:
            return wrapped
        device_ids = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=device_ids, broadcast_buffers=False)
        # The embedding's gradient is the last one computed; what follows is waiting for the others.
        embedding = self.model.tok_embeddings.weight
        embedding.register_post_accumulate_grad_hook(lambda _: self.processes.arrive())
        if self.processes.world_size > 2:
            rows, length = self.training.batch_size, self.config.max_seq_len
            with utils.deterministic_kernels(self.device):
                utils.settle_buckets(wrapped, rows, length, self.device, self.autocast)
            self.optimizer.zero_grad(set_to_none=True)
        return wrapped

    def _restore(self, checkpoint: dict) -> None:
        self.progress = restore_state(checkpoint, self.model, self.ema, self.optimizer, self.scaler)
        if checkpoint["validation"] != self.data.validation:
            say("the validation data is not what it was: the best loss so far and the patience start anew")
            self.progress.best_val_loss, self.progress.evaluations_without_gain = math.inf, 0
        states = checkpoint["random_states"]
        if len(states) == self.processes.world_size:
            utils.restore_random_state(states[self.processes.rank])
        else:
            say(
                f"the checkpoint was written by {len(states)} processes, now there are {self.processes.world_size}:"
                " the order of samples stays, dropout is drawn anew"
            )
            utils.seed_everything(self.training.seed + 1 + self.processes.rank + 1000 * self.progress.step)

    def _plan(self, checkpoint: dict | None) -> None:
        """How many steps there are, what the learning rate does in them, and whether compiling pays."""
        t = self.training
        if t.eval_steps is not None:
            self.data.spread_validation(t.eval_steps * self.batch_rows)
        self.pace = {"rows_per_step": self.order.rows_per_step, "epochs": t.epochs, "max_steps": t.max_steps}
        steps = total_steps(t, self.order, checkpoint, self.pace)
        self.choices.warmup_steps(steps)
        self.schedule = plan_schedule(t, steps)
        left = (steps - self.progress.step) * self.tokens_per_step
        self.choices.compile(left * self.flops_per_token, self.peak_flops)

    def space(self) -> RunSpace:
        """The room on the disk that the whole run takes."""
        t = self.training
        weights = tensor_bytes(self.model.state_dict())
        state = optimizer_bytes(self.model, t.optimizer_type)
        kept = min(t.keep_last, -(-self.schedule.total_steps // t.save_interval))
        return RunSpace(weights * (2 if t.use_ema else 1) + state, weights, kept)

    def _prepare_out_dir(self) -> None:
        """Claim the folder, see that it has room, and write the settings as resolved."""
        t = self.training
        goes_on = self.resumed_from is not None and self.resumed_from.resolve().parent == self.out_dir.resolve()
        check_space(self.out_dir, self.space(), goes_on)
        status, step = Status(self.out_dir, self.processes.world_size, self.schedule.total_steps), self.progress.step
        self.files = RunFiles(self.out_dir, self.resumed_from, step, t.keep_last, status, say, self._on_disk)
        self.started = self.files.started or self.started
        resolved = self.settings.as_dict()
        resolved["model"] |= dataclasses.asdict(self.config)
        resolved["training"] |= dataclasses.asdict(t) | {"min_lr": self.schedule.min_lr}
        resolved["training"]["warmup_steps"] = self.schedule.warmup_steps
        write_config(self.out_dir, self.started, resolved)

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self) -> str:
        """Train until the end; returns how it ended: "finished", "early_stopping" or "interrupted".

        Raises:
            TrainingDiverged: too many steps in a row could not be used.
            ProcessLost: another process failed or no longer answers.
            InputError: the folder cannot be used or has no room; too many saves in a row failed, or the last one did.
        """
        with self.processes.main_first():
            if self.processes.is_main:
                self._prepare_out_dir()
        if self.files is not None and self.settings.logging.use_wandb:
            log = self.settings.logging
            self.files.metrics.start_wandb(log.wandb_project, log.wandb_run_name, self.settings.as_dict(), self.out_dir)
        self.stop.install()
        try:
            outcome = self._loop()
            self.processes.barrier()  # rank 0 has written everything
            self._tell_status(outcome, self.exit_code(outcome))
            return outcome
        except RuntimeError as error:  # a gradient's exchange that broke, or a fault
            raise self.processes.lost(error) or error from error
        finally:
            if self.files is not None:
                self.files.close()
            self.stop.restore()

    def measure_steps(self, seconds: float, most: int) -> float:
        """Train for so long, without saving or evaluating; returns the tokens a second, of all processes.

        Args:
            seconds: to go on for, at least one step and at most `most`.
        """
        self._begin_session()
        for _ in range(most):
            self._train_step()
            elapsed = time.perf_counter() - self.window_clock
            if self.processes.any(elapsed > seconds):  # all of them stop together
                break
        return self.tokens_read / elapsed

    def exit_code(self, outcome: str) -> int:
        """Of a process that ended so. To torchrun all but 0 is a failure, and a reason to start the processes again."""
        return 0 if self.processes.by_torchrun else EXIT_CODES[outcome]

    def _loop(self) -> str:
        t, progress = self.training, self.progress
        is_saved = self.processes.decided(step_checkpoint(self.out_dir, progress.step).exists)
        saved_at = progress.step if is_saved else -1
        self._begin_session()
        with utils.progress_bar(self.schedule.total_steps, progress.step, self.processes.is_main) as bar:
            while True:
                finished = self._finished()
                due = progress.step > 0 and (progress.step % t.eval_interval == 0 or finished)
                evaluation_cut = due and not self._evaluate_and_keep_best()
                if evaluation_cut or (not finished and self.stopping):
                    self._save_checkpoint(interrupted=True)
                    self._wait_for_saves()
                    return "interrupted"
                stopping = t.early_stopping and progress.evaluations_without_gain >= t.patience
                save_due = progress.step > 0 and (progress.step % t.save_interval == 0 or finished or stopping)
                if save_due and saved_at != progress.step:
                    self._save_checkpoint()
                    saved_at = progress.step
                if finished or stopping:
                    self._save_final()
                    return "finished" if finished else "early_stopping"

                if self._train_step():
                    bar.update(progress.step - bar.n)
                    if progress.step % t.log_interval == 0 or self._finished():
                        self._log(bar)
                if self.files is not None:
                    self.files.check(progress.step)

    def _finished(self) -> bool:
        if self.training.max_steps is not None:
            return self.progress.step >= self.training.max_steps
        return self.progress.samples >= self.training.epochs * len(self.data.train_samples)

    def _train_step(self) -> bool:
        """One optimizer step: all processes' micro-batches count as one batch, whatever their number.

        Returns:
            False where the step was skipped: the samples are spent, but the weights stay, and no step is counted.
        """
        t, progress = self.training, self.progress
        samples = self.order.next_step(progress.samples)
        tokens = self.data.train.count_targets(samples)  # of all processes: what the summed loss is divided by
        self.lr = self.schedule.at(progress.step)
        set_rates(self.optimizer, self.lr, progress.step)

        loss_sum = torch.zeros((), device=self.device)
        for micro in range(t.accumulation_steps):
            self.processes.beat(f"reading the batch of step {progress.step + 1}", self.patience)
            inputs, targets, documents = self._local_batch(self.data.train, samples, micro)
            last = micro == t.accumulation_steps - 1
            wait = contextlib.nullcontext() if last or self.processes.world_size == 1 else self.train_model.no_sync()
            with wait, utils.deterministic_kernels(self.device):  # gradients are exchanged once a step
                with self.autocast:
                    loss = self.train_model(inputs, targets, documents=documents)
                self.processes.beat(f"the gradients of step {progress.step + 1}", self.patience)
                # DistributedDataParallel averages over processes; the loss is a sum over all of them.
                self.scaler.scale(loss * (self.processes.world_size / tokens)).backward()
            loss_sum += loss.detach()

        self.scaler.unscale_(self.optimizer)
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip or math.inf))
        self.processes.beat(f"the end of step {progress.step + 1}", self.patience)
        self.patience = 1.0
        loss, bad_gradients, stops = self.processes.all_sum(
            [float(loss_sum), not math.isfinite(self.grad_norm), self.stop.count]
        )
        self.stopping = stops > 0  # the same on all processes, so they stop after the same step
        self.tokens_read += tokens
        progress.samples += len(samples)
        return self._update_weights(loss / tokens, bad_gradients == 0, tokens)

    def _update_weights(self, loss: float, grad_is_finite: bool, tokens: int) -> bool:
        """Step optimizer and average, unless loss (nats a token) or gradient forbid it: False, on all processes."""
        t, progress = self.training, self.progress
        fault = fault_of_step(loss, grad_is_finite, progress.recent_losses, t.spike_threshold)
        if fault is None:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if fault is not None:
            self._skip_step(fault, overflow=self.scaler.is_enabled() and math.isfinite(loss) and not grad_is_finite)
            return False
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        progress.step += 1
        progress.skipped_in_a_row = 0
        remember(progress.recent_losses, loss)
        progress.window_loss += loss * tokens
        progress.window_tokens += tokens
        return True

    def _skip_step(self, fault: str, overflow: bool) -> None:
        """Count a step that is not taken. A float16 overflow belongs to loss scaling, and is not worth a line."""
        progress = self.progress
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        limit = MAX_OVERFLOWS if overflow else self.training.max_skipped_steps
        if progress.skipped_in_a_row > limit:
            raise TrainingDiverged(
                f"step {progress.step + 1}: {fault}, with learning rate {self.lr:g}, and"
                f" {progress.skipped_in_a_row - 1} steps before it were skipped (max_skipped_steps); lower"
                " learning_rate or look at the data, then --resume from the last checkpoint"
            )
        if not overflow:
            say(f"step {progress.step + 1}: {fault}; its samples are skipped, and the weights stay")

    def _local_batch(
        self, data: PretrainDataset, samples: np.ndarray, micro: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's rows of micro-batch `micro`: inputs, targets and the numbers of their documents, where they
        are asked for; int64 [batch_size, max_seq_len] each."""
        rows = self.training.batch_size
        start = micro * self.batch_rows + self.processes.rank * rows
        inputs, targets = data.batch(samples[start : start + rows], rows)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        inputs, targets = (t.to(self.device, non_blocking=True) for t in (inputs, targets))
        return inputs, targets, self._documents(inputs, targets)

    def _documents(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        if not self.training.document_mask:
            return None
        delimiters = self.data.delimiters
        return number_documents(inputs, targets, delimiters.bos_id, delimiters.eos_id)

    # -------------------------------------------------------------------------------------------------- evaluation

    @property
    def evaluated_model(self) -> Transformer:
        """The weights that are evaluated, previewed and kept: the average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def evaluate(self) -> tuple[float, float] | None:
        """Validation loss (nats a token) and bits per byte of text; None if a stop was asked for meanwhile."""
        batches = -(-len(self.data.val_samples) // self.batch_rows)
        numbers = range(min(batches, self.training.eval_steps or batches))
        read = (self._local_batch(self.data.val, self.data.val_samples, number) for number in numbers)
        model = self.evaluated_model.eval()
        with utils.deterministic_kernels(self.device):
            sums = validation_sums(model, read, self.data.token_bytes, self.autocast, self._asked_to_stop)
        self.model.train()
        if sums is None:
            return None
        loss, tokens, text_loss, byte_count = self.processes.all_sum(sums)
        return loss / tokens, bits_per_byte(text_loss, byte_count)

    def _evaluate_and_keep_best(self) -> bool:
        """Evaluate, unless that was done at this step already; False if a stop was asked for meanwhile."""
        if len(self.data.val_samples) == 0 or self.progress.last_evaluation == self.progress.step:
            return True
        clock = time.perf_counter()
        result = self.evaluate()
        if result is None:
            return False
        val_loss, bits = result
        progress = self.progress
        better = val_loss < progress.best_val_loss
        progress.last_evaluation = progress.step
        progress.best_val_loss = val_loss if better else progress.best_val_loss
        progress.evaluations_without_gain = 0 if better else progress.evaluations_without_gain + 1
        if self.files is not None:
            if better:
                self._save_weights("best_model.pth")
            say(
                f"step {progress.step:,}: validation loss {val_loss:.4f}, {bits:.4f} bits per byte"
                + (", the best so far" if better else f" (best: {progress.best_val_loss:.4f})")
            )
            self.files.metrics.write(self._event() | {"val_loss": val_loss, "bits_per_byte": bits})
            self.files.metrics.draw_curves()
            for line in self.preview(self.evaluated_model.eval()) if self.preview else []:
                say(f"    {line}")
            self.model.train()
        self.window_clock += time.perf_counter() - clock  # evaluation is not training time
        return True

    # ------------------------------------------------------------------------------------------------------ saving

    def _asked_to_stop(self) -> bool:
        """Whether any process was told to stop; all of them agree, so they stop at the same batch of an evaluation."""
        self.processes.beat(f"an evaluation at step {self.progress.step}")
        return self.processes.any(self.stop.count)

    def _save_checkpoint(self, interrupted: bool = False) -> None:
        """Copy the state, for a thread to write it."""
        self.processes.beat(f"saving at step {self.progress.step}")
        states = self.processes.gather((utils.random_state(), weights_norm(self.model)))
        self._count_seconds()
        if self.files is None:
            return
        if (difference := difference_of_weights([norm for _, norm in states])) is not None:
            raise ProcessLost(f"step {self.progress.step}: {difference}")
        content = {
            "format_version": CHECKPOINT_VERSION,
            "started": self.started,
            "settings": self.settings.as_dict(),
            "config": dataclasses.asdict(self.config),
            "tokenizer_path": self.settings.data.tokenizer_path,
            "tokenizer_sha256": self.data.tokenizer_sha256,
            "data": self.data.fingerprint,
            "validation": self.data.validation,
            "pace": self.pace,
            "total_steps": self.schedule.total_steps,
            "chosen": self.choices.made,
            **saved_state(self.progress, self.model, self.ema, self.optimizer, self.scaler),
            "random_states": [state for state, _ in states],
            "environment": self.environment,
        }
        self.files.save_checkpoint(content, interrupted)

    def _save_weights(self, name: str) -> None:
        """Copy the evaluated weights, for a thread to write them."""
        weights = Weights(
            self.evaluated_model.state_dict(),
            self.config,
            self.settings.data.tokenizer_path,
            self.data.tokenizer_sha256,
        )
        self.files.save_weights(name, weights)

    def _save_final(self) -> None:
        if self.files is None:
            return
        self._save_weights(f"pretrain_{self.config.dim}.pth")
        self._wait_for_saves()
        if not (self.out_dir / "best_model.pth").exists():
            self._save_weights("best_model.pth")
            best = self.progress.best_val_loss
            say(
                "best_model.pth: the final weights, since "
                + (f"those of loss {best:.4f} are not here" if math.isfinite(best) else "nothing was evaluated")
            )
            self._wait_for_saves()
        say(f"saved {self.out_dir / f'pretrain_{self.config.dim}.pth'}")

    def _wait_for_saves(self) -> None:
        """Wait until all is on the disk; only rank 0 has something to wait for."""
        if self.files is not None:
            self.files.wait()

    def _on_disk(self) -> None:
        self.processes.beat("writing to the disk")

    # ----------------------------------------------------------------------------------------------------- logging

    def _begin_session(self) -> None:
        """Start the clocks, and what only this session needs to know."""
        self.stopping, self.patience = False, FIRST_STEP_PATIENCE
        self.tokens_read = 0  # since the last log line, those of skipped steps included
        self.window_clock = self.seconds_clock = time.perf_counter()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.seconds_clock
        self.seconds_clock = now

    def _event(self) -> dict:
        progress = self.progress
        self._count_seconds()
        return {
            "step": progress.step,
            "epoch": round(progress.samples / len(self.data.train_samples), 4),
            "tokens": self.order.count_targets(progress.samples, self.data.train),
            "elapsed": round(progress.seconds, 2),
        }

    def _log(self, bar) -> None:
        progress = self.progress
        loss = progress.window_loss / progress.window_tokens
        tokens_per_second = self.tokens_read / (time.perf_counter() - self.window_clock)
        peak = self.peak_flops * self.processes.world_size
        event = self._event() | {
            "loss": loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": round(tokens_per_second * self.flops_per_token / peak, 4),
            "skipped_steps": progress.skipped_steps,
        }
        if self.files is not None:
            self.files.metrics.write(event)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tok/s")
            utils.progress_line(bar)
        progress.window_loss, progress.window_tokens = 0.0, 0
        self.tokens_read, self.window_clock = 0, time.perf_counter()

    def _tell_status(self, state: str, exit_code: int, message: str | None = None) -> None:
        """Write status.json, on rank 0."""
        if self.files is not None:
            self.files.tell(state, self.progress.step, exit_code, message)

    def tell_failure(self, error: BaseException) -> None:
        """Say in status.json why this run ends."""
        if isinstance(error, KeyboardInterrupt):
            checkpoint = "what came after the last checkpoint is lost"
            self._tell_status(
                "interrupted", EXIT_CODES["interrupted"], f"stopped at once, without saving; {checkpoint}"
            )
            return
        state = "diverged" if isinstance(error, TrainingDiverged) else "failed"
        self._tell_status(state, getattr(error, "exit_code", 1), str(error) or type(error).__name__)

    def _give_up(self, message: str) -> None:
        """End this process from the watching thread, while the main thread waits for a process that is gone."""
        utils.print_error(message)
        self._tell_status("failed", ProcessLost.exit_code, message)
        os._exit(ProcessLost.exit_code)
