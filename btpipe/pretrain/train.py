"""The run: what is prepared once, and the loop around the training step."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import artifact, events, runtime
from btpipe.data.index import Index, open_index
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.errors import MachineError, NumericsError, Stopped
from btpipe.events import Report
from btpipe.pretrain import checkpoint, init_from, loss, nonfinite, step
from btpipe.pretrain.batches import Supply
from btpipe.pretrain.folder import RunRejects
from btpipe.pretrain.health import HealthMonitor
from btpipe.pretrain.meter import Meter, SaveClock
from btpipe.pretrain.run import TrainingRun
from btpipe.recipe import Recipe
from btpipe.results import Pretrained
from btpipe.runtime import Runtime

NOTABLE_FLOOR = 0.05
"""Share of D (the loss of constant embeddings) above which a loss floor is worth a warning."""

PRECISION_FIX = "go on with --set run.precision=fp32 --accept-change run.precision"


def fit(folder: Path, recipe: Recipe, process: Runtime, on_event: Report) -> None:
    """Trains a prepared run folder to its end, from its newest checkpoint.

    Raises:
        MachineError: a setting outside btpipe makes float32 products TF32's.
        Stopped: a signal came; the state is saved.
        NumericsError: the loss or a gradient is not finite.
        BudgetError: more images were unreadable than `data.max_bad` allows.
        IntegrityError: no checkpoint of the run is whole.
    """
    runtime.require_float32_products(process.device)
    index = open_index(folder / "index.parquet")
    run = _open(folder, recipe, process, on_event, index)
    _announce(run)
    rejects = RunRejects(folder, index)
    loader = TrainingLoader(
        index,
        LoaderSettings.of(recipe, len(index)),
        rank=process.rank,
        world_size=process.world_size,
        start_step=run.state.step,
        device=process.device,
        on_event=on_event,
        rejected=rejects.by_row(),
    )
    with runtime.StopSignals() as signals, loader:
        try:
            _loop(run, Supply(loader, rejects), signals)
        finally:
            rejects.update(loader.rejected)


def _open(
    folder: Path, recipe: Recipe, process: Runtime, on_event: Report, index: Index
) -> TrainingRun:
    """Network, optimiser and position, as the newest checkpoint left them."""
    core = step.build(recipe, process.device)
    state = checkpoint.State(0, recipe.digest, index.fingerprint)
    newest = checkpoint.newest(folder, on_event)
    if newest is not None:
        at = checkpoint.position(newest, index.fingerprint)
        state = dataclasses.replace(state, step=at)
        checkpoint.load(newest, core)
    else:
        init_from.load(folder, recipe.network, core.network, on_event)
    if core.compiled:
        step.compile(core)
    return TrainingRun(recipe, folder, process, on_event, core, state, index)


def _announce(run: TrainingRun) -> None:
    recipe, dimension = run.recipe, run.recipe.network.projector[-1]
    floor = loss.floor(recipe.data.batch_size, dimension, recipe.loss.lambd)
    run.on_event(
        events.RunStarted(
            run=str(run.folder),
            recipe=recipe.digest,
            step=run.state.step,
            steps=run.steps,
            steps_per_epoch=run.steps_per_epoch,
            images=len(run.index),
            batch_size=recipe.data.batch_size,
            world_size=run.runtime.world_size,
            device=run.runtime.device.type,
            precision=run.core.precision,
            parameters=sum(p.numel() for p in run.core.network.parameters()),
            loss_floor=floor,
        )
    )
    if floor > NOTABLE_FLOOR * dimension:
        text = (
            f"with {recipe.data.batch_size} images and {dimension} dimensions the loss cannot go"
            f" below {floor:.0f}, however good the encoder: do not judge it by that number"
        )
        sizes = {"batch_size": recipe.data.batch_size, "dimension": dimension}
        run.on_event(events.Warned(text, {**sizes, "loss_floor": floor}))


def _loop(run: TrainingRun, supply: Supply, signals: runtime.StopSignals) -> None:
    """Steps until the end or a stop; logs, and saves what a kill must not cost."""
    agreement, meter, clock = runtime.Agreement(), Meter(run), SaveClock(run)
    watch, images_before = nonfinite.Watch(), np.zeros(0, np.int64)
    health = HealthMonitor(run, lambda: bool(signals.first))
    started, before = time.perf_counter(), run.state.step
    while run.state.step < run.steps:
        try:
            with meter.waiting():
                batch = supply.next(run.state.step)
        except (MachineError, Stopped):
            if run.runtime.world_size == 1 and run.state.step > before:
                supply.record()
                _require_finite(run, watch.last(), images_before)
                _save(run)  # the other ranks of several are within the step, and cannot
            raise
        outcome = step.update(run.core, batch.views, *run.rates(batch.step))
        run.state = dataclasses.replace(run.state, step=batch.step + 1)
        stop, save, has_rejects = agreement.exchange(
            [bool(signals.first), clock.is_overdue(), supply.has_found()]
        )
        save = save or stop or clock.is_step()
        if has_rejects or save:
            supply.require_budget()
        flags_before = watch.stepped(batch.step, outcome.flags, run.core.scale)
        _require_finite(run, flags_before, images_before)
        images_before = batch.images
        logged = meter.stepped(outcome)
        if save:
            supply.record()
            _require_finite(run, watch.last(), batch.images)
            _save(run)
            clock.restart()
        if stop and run.state.step < run.steps:
            done = f"stopped at step {run.state.step} of {run.steps}"
            raise Stopped(f"{done}, the state is saved", fix="run the same command to go on")
        with meter.aside():
            health.stepped(outcome, logged)
    if run.steps == 0 and checkpoint.newest(run.folder) is None:
        _save(run)
    seconds = time.perf_counter() - started
    run.on_event(Pretrained(seconds, str(run.folder), run.state.step, run.state.step - before))


def _save(run: TrainingRun) -> None:
    """The first rank writes the checkpoint, the others wait.

    Raises NumericsError: a forward pass overflowed into batch norm's running statistics, which no
    mask of the update can undo.
    """
    broken = nonfinite.broken(run.core.network.state_dict())
    if broken:
        raise NumericsError(
            f"{broken} is not finite at step {run.state.step}",
            where=run.folder,
            fix=f"the checkpoints before it are good: {PRECISION_FIX}, or lower optim.lr under"
            " another --name",
        )
    started = time.perf_counter()
    if run.runtime.is_first:
        path = checkpoint.save(run.folder, run.state, run.core, run.recipe.run)
        seconds = time.perf_counter() - started
        run.on_event(events.CheckpointSaved(run.state.step, str(path), seconds))
    runtime.barrier()


def _require_finite(
    run: TrainingRun, flags: nonfinite.NonfiniteFlags | None, images: NDArray[np.int64]
) -> None:
    """Ends the run when a step's update had to be left out; an fp16 overflow only lowers the scale.

    The step, the seed and this rank's `images` (rows of the index) are kept in the run folder.
    """
    if flags is None or (run.core.scale is not None and flags.scale >= 1):
        return
    paths = run.index.table["path"].take(images.tolist()).to_pylist()
    cause = {
        "step": flags.step,
        "epoch": flags.step // run.steps_per_epoch,
        "seed": run.recipe.seed,
        "ranks": flags.ranks,
        "rows": images.tolist(),
        "images": paths,
    }
    rank = run.runtime.rank
    file = run.folder / f"nonfinite-step-{flags.step:08d}-rank-{rank}.json"
    artifact.write_json(file, cause)
    raise NumericsError(
        f"the loss or a gradient is not finite at step {flags.step}"
        f" (rank {', '.join(map(str, flags.ranks))}); its update was left out",
        where=run.folder,
        fix=f"see {file.name} for its images; the checkpoints are good: {PRECISION_FIX}, or lower"
        " optim.lr under another --name",
    )
