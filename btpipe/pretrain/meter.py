"""When a checkpoint is due, and the rates between two logged steps."""

import contextlib
import time
from collections.abc import Iterator

from btpipe import events
from btpipe.pretrain import loss
from btpipe.pretrain.run import TrainingRun
from btpipe.pretrain.step import Outcome


class SaveClock:
    """When the next checkpoint is due, by steps and by minutes."""

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._seconds = run, time.monotonic()

    def is_step(self) -> bool:
        """Whether this very step is one to save: no rank needs another's word for it."""
        settings, step = self._run.recipe.run, self._run.state.step
        intervals = (settings.checkpoint_steps, settings.keep_every)
        return step == self._run.steps or any(n and step % n == 0 for n in intervals)

    def is_overdue(self) -> bool:
        """Whether this rank wants a checkpoint soon: the first one, by the minutes."""
        elapsed = time.monotonic() - self._seconds
        return self._run.runtime.is_first and elapsed > self._run.recipe.run.checkpoint_minutes * 60

    def restart(self) -> None:
        """Starts the minutes anew, after a checkpoint."""
        self._seconds = time.monotonic()


class Meter:
    """Rates between two logged steps; the first compiled step is reported apart and not counted."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._first = True
        self._restart()

    def _restart(self) -> None:
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context whose time counts for nothing."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def stepped(self, outcome: Outcome) -> events.StepDone | None:
        """Counts a step; reports every `run.log_steps` and the last one, and only then syncs."""
        run = self._run
        self._steps += 1
        if self._first:
            self._first = False
            if run.core.compiled:
                float(outcome.terms.on_diagonal)
                run.on_event(events.Compiled(time.perf_counter() - self._started))
                self._restart()
                return None
        done = run.state.step
        if done % run.recipe.run.log_steps and done != run.steps:
            return None
        logged = self._measure(outcome.terms)
        run.on_event(logged)
        self._restart()
        return logged

    def _measure(self, terms: loss.Terms) -> events.StepDone:
        run, seconds = self._run, time.perf_counter() - self._started
        lambd, batch_size = run.recipe.loss.lambd, run.recipe.data.batch_size
        lr, bias_lr = run.rates(run.state.step - 1)
        scale = run.core.scale
        return events.StepDone(
            step=run.state.step,
            epoch=run.state.step / run.steps_per_epoch,
            loss=float(terms.total(lambd)),
            on_diagonal=float(terms.on_diagonal),
            off_diagonal=float(terms.off_diagonal),
            mean_diagonal=float(terms.mean_diagonal),
            off_diagonal_rms=loss.off_diagonal_rms(terms, run.recipe.network.projector[-1]),
            dead_dimensions=int(terms.dead),
            overflows=int(scale.overflows) if scale else 0,
            lr=lr,
            bias_lr=bias_lr,
            images_per_second=events.per_second(self._steps * batch_size, seconds),
            data_wait=min(1.0, self._waited / seconds),
            eta_seconds=(run.steps - run.state.step) * seconds / self._steps,
        )
