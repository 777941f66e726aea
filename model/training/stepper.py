"""How a run takes its steps: `Stepper.advance`, called again and again.

`_launch` takes a step, of which `_gradients`, `_take` and `_update` are the arithmetic; what it minimizes is the
`objective`'s. A device that runs ahead gets the next step before this one's loss is read, so that it never waits, and,
where that is possible, as one graph (`step_graph.py`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from model import accelerator
from model.token_file.token_layout import FileShortened
from model.training.balance import Routing
from model.training.choices import Ranks
from model.training.data import TrainingData
from model.training.determinism import deterministic_kernels, random_state, restore_random_state
from model.training.divergence import fault_of_step, losses_to_compare, spike_limit
from model.training.objective import Objective
from model.training.optimizer import rates_of, rates_on_device, set_rates
from model.training.plan import RunPlan
from model.training.progress import Progress, StepResult
from model.training.step import (
    BEFORE_SUMS,
    DeviceVerdict,
    Step,
    StepDropped,
    StepNumbers,
    copied_to_host,
    read_numbers,
    runs_ahead,
)
from model.training.step_graph import StepGraph
from model.training.train_state import TrainState


class Stepper:
    """Takes the steps of a run, one after another.

    Args:
        plan: of the run.
        state: what the steps change.
        data: what they read.
        objective: what they minimize.
        routing: of experts.
        processes: that train together.
        stop_signals: how many signals to stop this rank got.
        drops_step: see `StopVote.drops_step`.
        beat: reports to the watchdog what this rank does next.
        say: prints one line for the user.

    Attributes:
        verdict: of a device that runs ahead; None: the host decides which steps count.
        graph: what captures and replays steps; None: they are launched.
        in_flight: a step that was launched ahead, and is not read yet.
    """

    def __init__(
        self,
        plan: RunPlan,
        state: TrainState,
        data: TrainingData,
        objective: Objective,
        routing: Routing,
        processes: Ranks,
        stop_signals: Callable[[], int],
        drops_step: Callable[[int, bool], bool],
        beat: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.state, self.data, self.objective, self.routing = plan, state, data, objective, routing
        self.processes, self._stop_signals, self._drops_step, self._beat = processes, stop_signals, drops_step, beat
        self.training, self.hardware = plan.training, plan.hardware
        self._objective_sums = 1 + len(objective.names)  # the loss and what is named; after them, the routers' counts
        device = self.hardware.device
        self._kernels = functools.partial(deterministic_kernels, device, self.training.deterministic)
        self.verdict = DeviceVerdict(device, processes) if runs_ahead(device, state.optimizer) else None
        self.in_flight: Step | None = None
        self.unread: FileShortened | None = None  # why a batch could not be read; all steps before it are whole
        self.graph = self._step_graph(say) if self.training.cuda_graph else None

    def _step_graph(self, say: Callable[[str], None]) -> StepGraph:
        device, take = self.hardware.device, (self._step, self._step_on_device)
        exact = accelerator.bits_may_differ(device, self.training.deterministic) is None
        return StepGraph(device, *take, self._changed_tensors, self.verdict.veto, exact, say)

    def _changed_tensors(self) -> list[Tensor]:
        return [*self.state.tensors(), self.verdict.veto]

    @property
    def is_settled(self) -> bool:
        """Whether the steps to come take as long as this one: they are captured by now, or will not be."""
        return self.graph is None or self.graph.is_settled

    def advance(self, progress: Progress, last: bool = False) -> StepResult | None:
        """Take a step, which the caller counts.

        A device that runs ahead has the next step by then, launched before this one's numbers are read. If this one
        turns out unusable, the device did not take the next one either (`DeviceVerdict`), which is then launched again,
        since its learning rate and number are this one's now. So the bits are those of reading each step at once.

        Args:
            progress: of the run, this step not counted.
            last: launch none after it.

        Returns:
            what it did; None: a signal to stop came within it, or its file was shortened (`unread`), and everything is
            as it was before.

        Raises:
            RuntimeError: gradients or numbers could not be exchanged (`Processes.lost` says whether a process is gone).
        """
        step, self.in_flight = self.in_flight or self._launch(progress), None
        if step is None:
            return None
        if self.verdict is not None and not last and not self.plan.pauses_after(step.number + 1, step.end):
            self.in_flight = self._launch(progress, step)
        return self._finished(step)

    def _launch(self, progress: Progress, after: Step | None = None) -> Step | None:
        """Compute the gradients of one step; where the device runs ahead, it also takes it if it can be used.

        The micro-batches of all ranks count as one batch, however many there are.

        None: a signal to stop came between two micro-batches, and everything is as it was before the step.

        Args:
            after: the step before, which was launched and not counted yet; None: it was counted.
        """
        t = self.training
        number = progress.step if after is None else after.number + 1
        position = progress.samples if after is None else after.end
        samples = self.plan.order.next_step(position)
        self.data.train.read_ahead(self.plan.samples_of_step(self.processes.rank, position + len(samples)))
        # Of all ranks: the divisor of the summed loss.
        terms = max(1, self.objective.count(self.data.train, samples))
        may_be_undone = t.accumulation_steps > 1 or after is not None
        before = random_state() if may_be_undone else None  # dropout's
        loss_scale = [tensor.clone() for tensor in self.state.loss_scale()]
        ema_updates = self.state.ema_updates
        recent = losses_to_compare(progress.recent_losses, is_ahead=after is not None)
        lr = self.plan.schedule.at(number)
        batches = self._micro_batches(samples, number)
        try:
            found = self._gradients(batches, self._factor(terms)) if self.graph is None else [*batches]
        except StepDropped:
            self.state.drop_gradients()
            if before is not None:
                restore_random_state(before)
            return None
        if self.verdict is None:
            read = functools.partial(read_numbers, *found, self._stop_signals(), self.processes)
        else:
            set_rates(self.state.optimizer, t.optimizer_type, lr, number)
            numbers = self._numbers(number, lr, terms, spike_limit(recent, t.spike_threshold))
            read = copied_to_host((self._take if self.graph is None else self._take_as_graph)(found, numbers))
            if self.state.ema is not None:
                self.state.ema.n_averaged += 1  # here, since a replay runs no Python
        return Step(
            number=number,
            position=position,
            samples=samples,
            terms=terms,
            lr=lr,
            recent_losses=recent,
            random_state=before,
            loss_scale=loss_scale,
            ema_updates=ema_updates,
            numbers=read,
        )

    def _factor(self, terms: int) -> float:
        """What the loss, a sum, is multiplied with before its gradient is computed."""
        return self.state.parallel.averaged_over / terms

    def _numbers(self, number: int, lr: float, terms: int, limit: float) -> StepNumbers:
        """What a step takes from the host, beside its batches."""
        return StepNumbers(
            factor=self._factor(terms),
            terms=float(terms),
            stop_signals=float(self._stop_signals()),
            limit=limit,
            average_weight=0.0 if self.state.ema is None else self.state.ema.next_weight(),
            rates=rates_of(self.state.optimizer, self.training.optimizer_type, lr, number),
        )

    def _micro_batches(self, samples: np.ndarray, number: int) -> Iterator[tuple]:
        """Read those of this rank, one after another, as they are asked for.

        Args:
            samples: of all ranks.
            number: steps taken before.

        Raises:
            StepDropped: a signal to stop came between two of them, or, of a run on one process, its file was shortened.
            FileShortened: so it was, of a run on several, whose others wait for this one's gradients.
        """
        for micro in range(self.training.accumulation_steps):
            if self._drops_step(micro, self._stop_signals() > 0):
                raise StepDropped
            self._beat(f"reading the batch of step {number + 1}")
            try:
                batch = self.objective.read(self.data.train, self.plan.samples_of(self.processes.rank, samples, micro))
            except FileShortened as error:
                if self.plan.world_size > 1:
                    raise
                self.unread = error
                raise StepDropped from error
            self._beat(f"the gradients of step {number + 1}")
            yield batch
        self._beat(f"the end of step {number + 1}")

    def _gradients(self, batches: Iterable[tuple], factor: float | Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a step, scaled to their largest norm.

        Args:
            factor: of the loss, which is a sum.

        Returns:
            the norm before, float32 scalar; and this rank's sums, float32: the loss, what the objective names, and what
            the routers counted.
        """
        sums = torch.zeros(self._objective_sums, device=self.hardware.device)
        self.routing.begin_step()
        with self.hardware.casting_once():
            for micro, batch in enumerate(batches):
                is_last = micro == self.training.accumulation_steps - 1
                with self.state.parallel.exchanging(is_last), self._kernels():
                    with self.hardware.autocast:
                        found = self.objective.loss(self.state.parallel.called, batch)
                    self.state.scaler.scale(found[0] * factor).backward()
                sums += found.detach()
        self.state.scaler.unscale_(self.state.optimizer)
        norm = self.state.parallel.clip(self.training.grad_clip)
        self.state.scaler.update()
        return norm, torch.cat((sums, self.routing.counted()))

    def _take(self, found: tuple[Tensor, Tensor], numbers: StepNumbers) -> Tensor:
        """Let the device judge a step, and take it if it can be used.

        Args:
            found: what `_gradients` returned.

        Returns:
            what `DeviceVerdict.judge` returns.
        """
        told, veto = self.verdict.judge(*found, numbers), self.verdict.veto
        self._update(told[BEFORE_SUMS + self._objective_sums :], veto)
        if self.state.ema is not None:
            self.state.ema.average(self.state.model, numbers.average_weight, veto)
        self.state.drop_gradients()
        return told

    def _take_as_graph(self, batches: list[tuple], numbers: StepNumbers) -> Tensor:
        """Take a step that is captured or will be; what `_take` returns.

        A signal to stop that comes while a graph runs is heeded after the step: between its micro-batches no host asks.
        """
        told = self.graph.step(batches, numbers)
        if self.graph.failed:
            self.state.drop_gradients()  # a capture may have left some
            self.graph = None
        return told

    def _step(self, batches: Iterable[tuple], numbers: StepNumbers) -> Tensor:
        """Compute and take a step; what `_take` returns."""
        return self._take(self._gradients(batches, numbers.factor), numbers)

    def _step_on_device(self, batches: Iterable[tuple], numbers: StepNumbers) -> Tensor:
        """The same with scalars on the device, for a graph: at a replay no Python runs."""
        with rates_on_device(self.state.optimizer, numbers.rates):
            return self._step(batches, numbers)

    def _update(self, routed: Tensor, veto: Tensor | None = None) -> None:
        """Change the weights.

        Args:
            routed: what the routers of all ranks counted.
            veto: on the device, 1 where they must stay as they are.
        """
        self.state.optimizer.found_inf = veto
        self.state.optimizer.step()
        self.routing.move_biases(routed, veto)

    def _finished(self, step: Step) -> StepResult:
        """What a step did, once it is known; takes it, if that was not done before."""
        self.processes.arrive()  # the numbers are sums over all ranks
        grad_norm, bad_gradients, stop_signals, *totals = step.numbers()
        objective, routed = totals[: self._objective_sums], totals[self._objective_sums :]
        loss, *measured = (total / step.terms for total in objective)
        measured = dict(zip(self.objective.names, measured, strict=True)) | self.routing.measure(routed)
        fault = fault_of_step(loss, bad_gradients == 0, step.recent_losses, self.training.spike_threshold)
        if self.verdict is None:
            if fault is None:
                set_rates(self.state.optimizer, self.training.optimizer_type, step.lr, step.number)
                self._update(torch.tensor(routed, device=self.hardware.device))
                if self.state.ema is not None:
                    self.state.ema.update_parameters(self.state.model)
            self.state.drop_gradients()
        elif fault is not None:
            self._take_back(step)
        return StepResult(
            samples=len(step.samples),
            read=self.data.train.count_tokens(step.samples),
            terms=step.terms,
            loss=loss,
            measured=measured,
            grad_norm=grad_norm,
            lr=step.lr,
            fault=fault,
            overflow=self.state.scaler.is_enabled() and math.isfinite(loss) and bad_gradients > 0,
            stop_asked=stop_signals > 0,
        )

    def _take_back(self, step: Step) -> None:
        """Undo what a step that the device did not take, and the one launched after it, changed beside the weights."""
        following, self.in_flight = self.in_flight, None
        if following is not None:
            restore_random_state(following.random_state)
            for now, before in zip(self.state.loss_scale(), following.loss_scale, strict=True):
                now.copy_(before)
        if self.state.ema is not None:
            self.state.ema.n_averaged.fill_(step.ema_updates)
        self.verdict.reset()
