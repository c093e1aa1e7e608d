"""The run: what is prepared once, the training step, and the loop around it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from btpipe import events, runtime
from btpipe.data.index import Index, open_index
from btpipe.data.loader import Batch, TrainingLoader
from btpipe.errors import NumericsError, Stopped
from btpipe.events import Report
from btpipe.pretrain import checkpoint, loss, network, optim, schedule
from btpipe.pretrain.folder import Quarantine
from btpipe.recipe import Recipe
from btpipe.runtime import Precision, Runtime


@dataclasses.dataclass
class Run:
    """What the loop carries from step to step."""

    recipe: Recipe
    folder: Path
    runtime: Runtime
    report: Report
    network: network.BarlowTwins
    optimizer: torch.optim.Optimizer
    state: checkpoint.State
    steps_per_epoch: int
    precision: Precision
    form: loss.Form

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run; an epoch's last short batch is dropped."""
        return self.steps_per_epoch * self.recipe.optim.epochs

    @property
    def compiled(self) -> bool:
        on_gpu = self.runtime.device.type == "cuda"
        return self.recipe.run.compile == "on" or (self.recipe.run.compile == "auto" and on_gpu)


def fit(folder: Path, recipe: Recipe, here: Runtime, report: Report) -> None:
    """Trains a prepared run folder to its end, from its newest checkpoint.

    Raises:
        Stopped: a signal came; the state is saved.
        NumericsError: the loss is not finite.
        BudgetError: more images were unreadable than `data.max_bad` allows.
        IntegrityError: no checkpoint of the run is whole.
    """
    index = open_index(folder / "index.parquet")
    run = _open(folder, recipe, here, report, index)
    _announce(run, len(index))
    quarantine = Quarantine(folder, index)
    loader = TrainingLoader(
        index,
        recipe,
        rank=here.rank,
        world_size=here.world_size,
        start_step=run.state.step,
        device=here.device,
        report=report,
        quarantine=quarantine.known(),
    )
    with runtime.StopSignals() as signals, loader:
        try:
            _loop(run, iter(loader), signals)
        finally:
            quarantine.update(loader.quarantine)


def _open(folder: Path, recipe: Recipe, here: Runtime, report: Report, index: Index) -> Run:
    """Network, optimiser and position, as the newest checkpoint left them."""
    precision = runtime.precision(recipe.run.precision, here.device)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = network.initialise(recipe).to(here.device, dtype)
    model.to(memory_format=torch.channels_last)
    model.train()
    optimizer = optim.build(recipe.optim, model)
    state = checkpoint.State(0, recipe.digest, index.fingerprint)
    newest = checkpoint.newest(folder, report)
    if newest is not None:
        state = dataclasses.replace(state, step=checkpoint.read_state(newest).step)
        checkpoint.load(newest, model, optimizer)
    form = loss.choose_form(recipe.loss.form, recipe.data.batch_size, recipe.network.projector[-1])
    steps_per_epoch = len(index) // recipe.data.batch_size
    run = Run(
        recipe, folder, here, report, model, optimizer, state, steps_per_epoch, precision, form
    )
    if run.compiled:
        model.compile()
    return run


def _announce(run: Run, images: int) -> None:
    recipe = run.recipe
    run.report(
        events.RunStarted(
            run=str(run.folder),
            recipe=recipe.digest,
            step=run.state.step,
            steps=run.steps,
            steps_per_epoch=run.steps_per_epoch,
            images=images,
            batch_size=recipe.data.batch_size,
            world_size=run.runtime.world_size,
            device=run.runtime.device.type,
            precision=run.precision,
            parameters=sum(p.numel() for p in run.network.parameters()),
            loss_floor=loss.floor(
                recipe.data.batch_size, recipe.network.projector[-1], recipe.loss.lambd
            ),
        )
    )


def step(run: Run, batch: Batch) -> loss.Terms:
    """One update of the weights from one global batch; nothing in it waits for the device.

    The true gradient of the global loss, summed over ranks and divided by `reference_world_size`:
    the same update at any number of ranks.
    """
    recipe = run.recipe
    lr, bias_lr = _rates(run, batch.step)
    optim.set_rates(run.optimizer, lr, bias_lr)
    with torch.autocast(run.runtime.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        z1, z2 = run.network(batch.view1, batch.view2)
    terms, gradient1, gradient2 = loss.value_and_gradient(z1, z2, recipe.loss.lambd, run.form)
    factor = recipe.loss.scale / recipe.optim.reference_world_size
    run.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(
        [z1, z2], [(gradient1 * factor).to(z1.dtype), (gradient2 * factor).to(z2.dtype)]
    )
    runtime.sum_gradients(list(run.network.parameters()))
    run.optimizer.step()
    return terms


def _loop(run: Run, batches: Iterator[Batch], signals: runtime.StopSignals) -> None:
    """Steps until the end or a stop; logs, and saves what a kill must not cost."""
    agreement, meter, clock = runtime.Agreement(), Meter(run), SaveClock(run)
    started, before = time.perf_counter(), run.state.step
    while run.state.step < run.steps:
        with meter.waiting():
            batch = next(batches)
        terms = step(run, batch)
        run.state = dataclasses.replace(run.state, step=batch.step + 1)
        meter.stepped(terms)
        stop, save = agreement.exchange([bool(signals.asked), clock.is_due()])
        if stop or save or run.state.step == run.steps:
            _require_finite(run, terms)
            _save(run)
            clock.restart()
        if stop and run.state.step < run.steps:
            done = f"stopped at step {run.state.step} of {run.steps}"
            raise Stopped(f"{done}, the state is saved", fix="run the same command to go on")
    if run.steps == 0 and checkpoint.newest(run.folder) is None:
        _save(run)
    seconds = time.perf_counter() - started
    text = f"{run.state.step - before} steps, {run.folder}"
    run.report(events.Finished("pretrain", text, seconds))


def _save(run: Run) -> None:
    """The first rank writes the checkpoint, the others wait."""
    started = time.perf_counter()
    if run.runtime.is_first:
        path = checkpoint.save(
            run.folder, run.state, run.network, run.optimizer, run.recipe.run.keep_last
        )
        seconds = time.perf_counter() - started
        run.report(events.CheckpointSaved(run.state.step, str(path), seconds))
    runtime.barrier()


def _require_finite(run: Run, terms: loss.Terms) -> None:
    """No checkpoint holds weights that a non-finite loss has reached."""
    if not torch.isfinite(terms.total(run.recipe.loss.lambd)):
        raise NumericsError(
            f"the loss is not finite at step {run.state.step}",
            where=run.folder,
            fix="the checkpoints before it are good: lower optim.lr, or set run.precision"
            ' = "fp32", under another --name',
        )


def _rates(run: Run, step: int) -> tuple[float, float]:
    return schedule.rates(
        run.recipe.optim,
        step,
        steps_per_epoch=run.steps_per_epoch,
        batch_size=run.recipe.data.batch_size,
    )


class SaveClock:
    """When the next checkpoint is due, by minutes and by steps."""

    def __init__(self, run: Run) -> None:
        self._run, self._seconds = run, time.monotonic()

    def is_due(self) -> bool:
        """Whether this rank wants a checkpoint of this state (minutes: the first rank)."""
        settings, step = self._run.recipe.run, self._run.state.step
        if settings.checkpoint_steps and step % settings.checkpoint_steps == 0:
            return True
        elapsed = time.monotonic() - self._seconds
        return self._run.runtime.is_first and elapsed > settings.checkpoint_minutes * 60

    def restart(self) -> None:
        """Starts the minutes anew, after a checkpoint."""
        self._seconds = time.monotonic()


class Meter:
    """Rates between two logged steps; the first compiled step is reported apart and not counted."""

    def __init__(self, run: Run) -> None:
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

    def stepped(self, terms: loss.Terms) -> None:
        """Counts a step; reports every `run.log_steps` and the last one, and only then syncs."""
        run = self._run
        self._steps += 1
        if self._first:
            self._first = False
            if run.compiled:
                float(terms.on_diagonal)
                run.report(events.Compiled(time.perf_counter() - self._started))
                self._restart()
                return
        done = run.state.step
        if done % run.recipe.run.log_steps and done != run.steps:
            return
        _require_finite(run, terms)
        self._report(terms)
        self._restart()

    def _report(self, terms: loss.Terms) -> None:
        run, seconds = self._run, time.perf_counter() - self._started
        lambd, batch_size = run.recipe.loss.lambd, run.recipe.data.batch_size
        lr, bias_lr = _rates(run, run.state.step - 1)
        run.report(
            events.StepDone(
                step=run.state.step,
                epoch=run.state.step / run.steps_per_epoch,
                loss=float(terms.total(lambd)),
                on_diagonal=float(terms.on_diagonal),
                off_diagonal=float(terms.off_diagonal),
                lr=lr,
                bias_lr=bias_lr,
                images_per_second=events.per_second(self._steps * batch_size, seconds),
                data_wait=min(1.0, self._waited / seconds),
                eta_seconds=(run.steps - run.state.step) * seconds / self._steps,
            )
        )
