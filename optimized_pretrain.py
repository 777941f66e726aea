"""Training, from top to bottom: `Trainer(settings).train()`.

There is one loop, on one CPU, one GPU or many nodes. A run can stop after any step and go on later with the same
weights, bit for bit, as if it had never stopped (on the same machine, versions, threads and number of processes).
"""

import contextlib
import copy
import dataclasses
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import utils
from model.checkpoint import CHECKPOINT_VERSION, Weights, save_torch, save_weights
from model.dataset import PretrainDataset, SampleOrder, hold_out
from model.evaluation import bits_per_byte, validation_sums
from model.metrics import MetricsLog
from model.model import Transformer
from model.optim import build_ema, build_optimizer, load_optimizer_state, plan_schedule
from model.resume import changed_settings, check_fits, find_checkpoint
from model.run_folder import INTERRUPTED, begin_run, prune_checkpoints, step_checkpoint, write_config
from model.settings import Settings
from model.tokenization import load_tokenizer, token_byte_lengths, tokenizer_sha256, vocabulary_size
from utils import Processes, say

MAX_SKIPPED_STEPS = 50  # float16 steps skipped in a row before training is called diverged


class TrainingDiverged(Exception):
    """The loss or the gradient is not finite; the weights are those of the last good step."""


@dataclasses.dataclass
class Progress:
    """Where a run is. Everything else about its position follows from it."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # samples read by all processes, over all epochs: the position in the data
    best_val_loss: float = math.inf
    evaluations_without_gain: int = 0
    last_evaluation: int = -1  # step of the last finished evaluation
    seconds: float = 0.0  # spent training, over all sessions


class Trainer:
    """Trains a Transformer as the settings say.

    Args:
        settings: all settings of the run.
        processes: the processes that train together.
        preview: called on rank 0 after each evaluation with the evaluated model; returns lines to print.

    Raises:
        InputError: data, tokenizer or checkpoint are missing or do not fit together.
    """

    def __init__(
        self, settings: Settings, processes: Processes, preview: Callable[[Transformer], list[str]] | None = None
    ) -> None:
        self.settings = copy.deepcopy(settings)  # as asked for; what is chosen by itself is kept elsewhere
        self.training, self.processes, self.preview = self.settings.training, processes, preview
        self.out_dir = Path(self.training.out_dir)
        self.stop = utils.StopSignal()
        self._choose_hardware()
        processes.start(self.device)
        self._load_tokenizer_and_data()
        found = self._find_checkpoint()
        checkpoint = found[1] if found else None
        self._build_model(checkpoint)
        self._plan(checkpoint)
        with processes.main_first():
            if processes.is_main:
                self._prepare_out_dir(found)
        self.metrics = MetricsLog(self.out_dir, self.progress.step, say) if processes.is_main else None
        self._describe()

    # ------------------------------------------------------------------------------------------------- setting up

    def _choose_hardware(self) -> None:
        self.device, why = utils.pick_device(self.training.device, self.processes.local_rank)
        say(f"device {self.device}: {why}")
        self.dtype, why = utils.pick_dtype(self.training.dtype, self.device)
        say(f"dtype {str(self.dtype).removeprefix('torch.')}: {why}")
        self.peak_flops = utils.measure_matmul_flops(self.device, self.dtype)

    def _load_tokenizer_and_data(self) -> None:
        data = self.settings.data
        tokenizer = load_tokenizer(data.tokenizer_path)
        self.tokenizer_sha256 = tokenizer_sha256(data.tokenizer_path)
        tokens = vocabulary_size(tokenizer)
        self.config = self.settings.lm_config(tokens)
        self.token_bytes = np.zeros(self.config.vocab_size, dtype=np.int64)
        self.token_bytes[:tokens] = token_byte_lengths(tokenizer)

        def open_dataset(path: str) -> PretrainDataset:
            dataset = PretrainDataset(path, self.config.max_seq_len, self.config.vocab_size, self.tokenizer_sha256)
            if dataset.manifest is None:
                say(f"{path}: no manifest beside it; read as MiniMind's uint16 tokens, which nothing here can check")
            return dataset

        self.train_data = open_dataset(data.train_data_path)
        if data.val_data_path is not None:
            self.val_data = open_dataset(data.val_data_path)
            self.train_samples, self.val_samples = np.arange(len(self.train_data)), np.arange(len(self.val_data))
        else:
            self.val_data = self.train_data
            self.train_samples, self.val_samples = hold_out(len(self.train_data))
            say(
                f"val_data_path is null: {len(self.val_samples):,} of {len(self.train_data):,} samples are held out"
                " for validation and not trained on"
            )
        if self.training.early_stopping and len(self.val_samples) == 0:
            say("early_stopping: there is nothing to validate on, so training will not stop early")
        self.fingerprint = self.train_data.fingerprint() | {"training_samples": len(self.train_samples)}
        self.validation = self.val_data.fingerprint() | {"validation_samples": len(self.val_samples)}

    def _find_checkpoint(self) -> tuple[Path, dict] | None:
        """The checkpoint to go on from, if any: one that belongs to this model, tokenizer and data."""
        found = find_checkpoint(self.training, say)
        if found is None:
            return None
        path, checkpoint = found
        mine = {
            "config": dataclasses.asdict(self.config),
            "data": self.fingerprint,
            "tokenizer": {"sha256": self.tokenizer_sha256},
        }
        check_fits(path, checkpoint, mine, self.training.optimizer_type)
        say(f"resuming from {path} at step {checkpoint['progress']['step']:,}")
        if changed := changed_settings(checkpoint, self.training):
            say(f"resuming with other settings than before: {', '.join(changed)}")
        return found

    def _build_model(self, checkpoint: dict | None) -> None:
        """Build model, optimizer, scaler and average, and put them where the checkpoint left them."""
        t = self.training
        utils.seed_everything(t.seed)
        self.model = Transformer(self.config).to(self.device)
        self.ema = build_ema(self.model, t.ema_decay) if t.use_ema else None
        self.optimizer = build_optimizer(self.model, t.optimizer_type, t.learning_rate, t.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        utils.seed_everything(t.seed + 1 + self.processes.rank)  # dropout differs between ranks
        if checkpoint is not None:
            self._restore(checkpoint)

        self.train_model = self.model  # what the loop calls: compiled and wrapped; self.model stays the plain one
        if t.compile:
            self.train_model = torch.compile(self.train_model)
        if self.processes.world_size > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            self.train_model = DistributedDataParallel(self.train_model, device_ids=device_ids, broadcast_buffers=False)
        self.autocast = contextlib.nullcontext()
        if self.dtype != torch.float32:
            self.autocast = torch.autocast(self.device.type, self.dtype)

    def _restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        load_optimizer_state(self.optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None:
            # A run that did not keep an average so far begins it with its present weights.
            self.ema.module.load_state_dict(checkpoint["ema"] or checkpoint["model"])
            self.ema.n_averaged.fill_(checkpoint["ema_updates"])
        self.progress = Progress(**checkpoint["progress"])
        if checkpoint["validation"] != self.validation:
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
        """How many samples a step takes, how many steps there are, and what the learning rate does in them."""
        t = self.training
        self.batch_rows = t.batch_size * self.processes.world_size  # samples of one micro-batch, over all processes
        if t.eval_steps is not None and t.eval_steps * self.batch_rows < len(self.val_samples):
            spread = np.linspace(0, len(self.val_samples) - 1, t.eval_steps * self.batch_rows).astype(np.int64)
            self.val_samples = self.val_samples[spread]
        self.order = SampleOrder(self.train_samples, t.seed, self.batch_rows * t.accumulation_steps)
        self.pace = {"rows_per_step": self.order.rows_per_step, "epochs": t.epochs, "max_steps": t.max_steps}
        if checkpoint is not None and checkpoint["pace"] == self.pace:
            total_steps = checkpoint["total_steps"]
        elif t.max_steps is not None:
            total_steps = t.max_steps
        else:
            total_steps = self.progress.step + self.order.steps_left(self.progress.samples, t.epochs)
        self.schedule = plan_schedule(t, total_steps)

    def _prepare_out_dir(self, found: tuple[Path, dict] | None) -> None:
        """Claim the folder, set aside what another run or line left in it, and write the settings as resolved."""
        resumed_from = found[0] if found else None
        self.lock, started = begin_run(self.out_dir, resumed_from, self.progress.step, say)
        self.started = started or found[1]["started"]
        resolved = self.settings.as_dict()
        resolved["model"] |= dataclasses.asdict(self.config)
        resolved["training"] |= {name: getattr(self.schedule, name) for name in ("warmup_steps", "min_lr")}
        write_config(self.out_dir, self.started, resolved)

    def _describe(self) -> None:
        t = self.training
        parameters = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = self.model.training_flops_per_token()
        say(
            f"model: {parameters:,} parameters; {self.flops_per_token / 1e6:,.0f} MFLOP a token; matrix products reach"
            f" {self.peak_flops / 1e9:,.0f} GFLOP/s here, which mfu is measured by"
        )
        rows = f"{t.batch_size} x {t.accumulation_steps} accumulated x {self.processes.world_size} processes"
        decides = f"epochs {t.epochs}" if t.max_steps is None else f"max_steps, which beats epochs {t.epochs}"
        say(
            f"data: {len(self.train_samples):,} samples of {self.config.max_seq_len} tokens; a step takes"
            f" {self.order.rows_per_step} ({rows}); {self.order.steps_per_epoch:,} steps an epoch,"
            f" {self.schedule.total_steps:,} in all ({decides})"
        )
        rise = f"{self.schedule.warmup_steps} steps up to" if self.schedule.warmup_steps else "from"
        say(
            f"schedule: {rise} {t.learning_rate:g}, then down to {self.schedule.min_lr:g} ({t.lr_scheduler});"
            f" {t.optimizer_type}{f', clipped at {t.grad_clip:g}' if t.grad_clip else ''}{', EMA' if t.use_ema else ''}"
        )

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self) -> str:
        """Train until the end; returns how it ended: "finished", "early_stopping" or "interrupted"."""
        self.stop.install()
        if self.processes.is_main and self.settings.logging.use_wandb:
            log = self.settings.logging
            self.metrics.start_wandb(log.wandb_project, log.wandb_run_name, self.settings.as_dict(), self.out_dir)
        try:
            return self._loop()
        finally:
            if self.processes.is_main:
                self.metrics.close()
                self.lock.release()

    def _loop(self) -> str:
        t, progress = self.training, self.progress
        saved_at = progress.step if step_checkpoint(self.out_dir, progress.step).exists() else -1
        self._begin_window()
        with utils.progress_bar(self.schedule.total_steps, progress.step, self.processes.is_main) as bar:
            while True:
                finished = self._finished()
                due = progress.step > 0 and (progress.step % t.eval_interval == 0 or finished)
                evaluation_cut = due and not self._evaluate_and_keep_best()
                if evaluation_cut or (not finished and self._asked_to_stop()):
                    self._save_checkpoint(self.out_dir / INTERRUPTED)
                    return "interrupted"
                stopping = t.early_stopping and progress.evaluations_without_gain >= t.patience
                save_due = progress.step > 0 and (progress.step % t.save_interval == 0 or finished or stopping)
                if save_due and saved_at != progress.step:
                    self._save_checkpoint(step_checkpoint(self.out_dir, progress.step))
                    saved_at = progress.step
                if finished or stopping:
                    self._save_final()
                    return "finished" if finished else "early_stopping"

                if self._train_step():
                    bar.update(progress.step - bar.n)
                    if progress.step % t.log_interval == 0 or self._finished():
                        self._log(bar)

    def _finished(self) -> bool:
        if self.training.max_steps is not None:
            return self.progress.step >= self.training.max_steps
        return self.progress.samples >= self.training.epochs * len(self.train_samples)

    def _train_step(self) -> bool:
        """One optimizer step: all processes' micro-batches count as one batch, whatever their number.

        Returns:
            False where float16 overflowed: the samples are spent, but the weights stay, and no step is counted.
        """
        t, progress = self.training, self.progress
        samples = self.order.next_step(progress.samples)
        tokens = len(samples) * self.config.max_seq_len  # of all processes: what the summed loss is divided by
        learning_rate = self.schedule.at(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        for micro in range(t.accumulation_steps):
            inputs, targets = self._local_batch(self.train_data, samples, micro)
            last = micro == t.accumulation_steps - 1
            wait = contextlib.nullcontext() if last or self.processes.world_size == 1 else self.train_model.no_sync()
            with wait:  # gradients are exchanged once a step
                with self.autocast:
                    loss = self.train_model(inputs, targets)
                # DistributedDataParallel averages over processes; the loss is a sum over all of them.
                self.scaler.scale(loss * (self.processes.world_size / tokens)).backward()
            self.window_loss += loss.detach()

        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip or math.inf)
        progress.samples += len(samples)
        self.window_tokens += tokens
        self.lr, self.grad_norm = learning_rate, grad_norm
        updated = self._update_weights(grad_norm)
        progress.step += updated
        return updated

    def _update_weights(self, grad_norm: Tensor) -> bool:
        """Step optimizer and average; False where float16 overflowed and the step is skipped, on all processes."""
        if not math.isfinite(grad_norm):  # the same on every process, since the gradients were exchanged
            self.skipped_in_a_row += 1
            if not self.scaler.is_enabled() or self.skipped_in_a_row > MAX_SKIPPED_STEPS:
                saved = (
                    "--resume from the last checkpoint" if any(self.out_dir.glob("checkpoint_*.pth")) else "start again"
                )
                raise TrainingDiverged(
                    f"the gradient is {float(grad_norm)} at step {self.progress.step + 1}, with learning rate"
                    f" {self.optimizer.param_groups[0]['lr']:g}; lower learning_rate or look at the data, then {saved}"
                )
        else:
            self.skipped_in_a_row = 0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row:
            return False
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return True

    def _local_batch(self, data: PretrainDataset, samples: np.ndarray, micro: int) -> tuple[Tensor, Tensor]:
        """This process's rows of micro-batch `micro`: inputs and targets, int64 [batch_size, max_seq_len]."""
        rows = self.training.batch_size
        start = micro * self.batch_rows + self.processes.rank * rows
        inputs, targets = data.batch(samples[start : start + rows], rows)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    # -------------------------------------------------------------------------------------------------- evaluation

    @property
    def evaluated_model(self) -> Transformer:
        """The weights that are evaluated, previewed and kept: the average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def evaluate(self) -> tuple[float, float] | None:
        """Validation loss (nats a token) and bits per byte; None if a stop was asked for meanwhile."""
        batches = -(-len(self.val_samples) // self.batch_rows)
        numbers = range(min(batches, self.training.eval_steps or batches))
        read = (self._local_batch(self.val_data, self.val_samples, number) for number in numbers)
        model = self.evaluated_model.eval()
        sums = validation_sums(model, read, self.token_bytes, self.autocast, self._asked_to_stop)
        self.model.train()
        if sums is None:
            return None
        loss, tokens, byte_count = self.processes.all_sum(sums)
        return loss / tokens, bits_per_byte(loss, byte_count)

    def _evaluate_and_keep_best(self) -> bool:
        """Evaluate, unless that was done at this step already; False if a stop was asked for meanwhile."""
        if len(self.val_samples) == 0 or self.progress.last_evaluation == self.progress.step:
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
        if self.processes.is_main:
            if better:
                self._save_weights("best_model.pth")
            say(
                f"step {progress.step:,}: validation loss {val_loss:.4f}, {bits:.4f} bits per byte"
                + (", the best so far" if better else f" (best: {progress.best_val_loss:.4f})")
            )
            self.metrics.write(self._event() | {"val_loss": val_loss, "bits_per_byte": bits})
            self.metrics.draw_curves()
            for line in self.preview(self.evaluated_model.eval()) if self.preview else []:
                say(f"    {line}")
            self.model.train()
        self.window_clock += time.perf_counter() - clock  # evaluation is not training time
        return True

    # ------------------------------------------------------------------------------------------------------ saving

    def _asked_to_stop(self) -> bool:
        """Whether any process was told to stop; all of them agree, so they stop after the same step."""
        return self.processes.all_max(self.stop.count) > 0

    def _save_checkpoint(self, path: Path) -> None:
        random_states = self.processes.gather(utils.random_state())
        self._count_seconds()
        if self.processes.is_main:
            content = {
                "format_version": CHECKPOINT_VERSION,
                "started": self.started,
                "settings": self.settings.as_dict(),
                "config": dataclasses.asdict(self.config),
                "tokenizer_path": self.settings.data.tokenizer_path,
                "tokenizer_sha256": self.tokenizer_sha256,
                "data": self.fingerprint,
                "validation": self.validation,
                "pace": self.pace,
                "total_steps": self.schedule.total_steps,
                "progress": dataclasses.asdict(self.progress),
                "model": self.model.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema is not None else None,
                "ema_updates": int(self.ema.n_averaged) if self.ema is not None else 0,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random_states": random_states,
                "environment": {
                    "torch": str(torch.__version__),  # plain text, not torch's own class
                    "python": platform.python_version(),
                    "world_size": self.processes.world_size,
                    "threads": torch.get_num_threads(),
                    "dtype": str(self.dtype),
                },
            }
            save_torch(path, content)
            prune_checkpoints(self.out_dir, self.training.keep_last)
            say(f"saved {path}")
        self.processes.barrier()

    def _save_weights(self, name: str) -> None:
        weights = Weights(
            self.evaluated_model.state_dict(),
            self.config,
            self.settings.data.tokenizer_path,
            self.tokenizer_sha256,
        )
        save_weights(self.out_dir / name, weights)

    def _save_final(self) -> None:
        if self.processes.is_main:
            name = f"pretrain_{self.config.dim}.pth"
            self._save_weights(name)
            if not (self.out_dir / "best_model.pth").exists():
                self._save_weights("best_model.pth")
                best = self.progress.best_val_loss
                say(
                    "best_model.pth: the final weights, since "
                    + (f"those of loss {best:.4f} are not here" if math.isfinite(best) else "nothing was evaluated")
                )
            say(f"saved {self.out_dir / name}")

    # ----------------------------------------------------------------------------------------------------- logging

    def _begin_window(self) -> None:
        """Start a new stretch between two log lines."""
        self.window_loss = torch.zeros((), device=self.device)
        self.window_tokens = 0
        self.window_clock = self.seconds_clock = time.perf_counter()
        self.skipped_in_a_row = 0

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.seconds_clock
        self.seconds_clock = now

    def _event(self) -> dict:
        progress = self.progress
        self._count_seconds()
        return {
            "step": progress.step,
            "epoch": round(progress.samples / len(self.train_samples), 4),
            "tokens": progress.samples * self.config.max_seq_len,
            "elapsed": round(progress.seconds, 2),
        }

    def _log(self, bar) -> None:
        (loss,) = self.processes.all_sum([float(self.window_loss)])
        loss /= self.window_tokens
        tokens_per_second = self.window_tokens / (time.perf_counter() - self.window_clock)
        peak = self.peak_flops * self.processes.world_size
        event = self._event() | {
            "loss": loss,
            "lr": self.lr,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": round(tokens_per_second * self.flops_per_token / peak, 4),
        }
        if self.processes.is_main:
            self.metrics.write(event)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tok/s")
            utils.progress_line(bar)
        self.window_loss.zero_()
        self.window_tokens, self.window_clock = 0, time.perf_counter()
