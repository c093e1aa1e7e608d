"""Starting a run: one process, several that btpipe starts, or ranks of torchrun or SLURM."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btpipe import events, progress, runtime
from btpipe.data.index import open_index
from btpipe.errors import RecipeError
from btpipe.pretrain import changes, checkpoint, folder, knn, train
from btpipe.recipe import Recipe
from btpipe.results import Pretrained

PREDECESSOR_SECONDS = 30.0
"""How long the first rank waits for a run folder that another process is about to leave."""


def pretrain(
    run: Path,
    recipe: Recipe,
    *,
    devices: str,
    mode: progress.Mode,
    accepted: tuple[str, ...] = (),
) -> None:
    """Trains `recipe` into the folder `run`, from where it stands; a finished run is left alone.

    `devices`: processes on this machine ("auto": one for each GPU, or one). Under torchrun and in
    a SLURM step the ranks are theirs. `accepted`: keys of `ROUNDING` whose change a resume makes.

    Raises:
        BtpipeError: whatever `folder.prepare` and `train.fit` raise.
    """
    count = 1 if runtime.is_rank() else runtime.devices(devices)
    if count == 1:
        _one_of_many(run, recipe, mode, accepted)
        return
    require_divisible(recipe, count)
    with progress.show(mode) as on_event, _open(run, recipe, on_event, 0, accepted) as finished:
        pass  # refuses what is wrong before any rank starts; the first rank takes the folder again
    if not finished:
        runtime.launch(count, _one_of_many, (run, recipe, mode, accepted))


def _one_of_many(run: Path, recipe: Recipe, mode: progress.Mode, accepted: tuple[str, ...]) -> None:
    """One rank's part: the first one holds the folder, shows progress and writes the log."""
    with runtime.start() as process:
        require_divisible(recipe, process.world_size)
        if not process.is_first:
            if not runtime.any_rank(False):
                train.fit(run, recipe, process, events.ignore)
            return
        # Alone, a second start is told at once that the folder is taken.
        wait_seconds = PREDECESSOR_SECONDS if process.world_size > 1 else 0
        with (
            progress.show(mode) as on_event,
            _open(run, recipe, on_event, wait_seconds, accepted) as finished,
        ):
            if not runtime.any_rank(finished):
                with folder.log(run, on_event) as logged:
                    train.fit(run, recipe, process, logged)


@contextmanager
def _open(
    run: Path,
    recipe: Recipe,
    on_event: events.Report,
    wait_seconds: float,
    accepted: tuple[str, ...],
) -> Iterator[bool]:
    """Holds the prepared run folder; whether the run is finished already, which is reported.

    Accepted changes are made in its recipe, unless it is finished: nothing is trained under them.
    """
    started, labelled = time.monotonic(), knn.labelled_images(recipe, on_event)
    if not run.exists():
        folder.prepare(run, recipe, on_event, accepted)
    with folder.lock(run, wait_seconds):
        # Sweeps what a killed process left: only with the lock.
        before = folder.prepare(run, recipe, on_event, accepted)
        step = _position(run)
        finished = step == recipe.steps(len(open_index(run / folder.INDEX)))
        if finished:
            seconds = time.monotonic() - started
            on_event(Pretrained(seconds, str(run), step or 0, 0, nothing_to_do=True))
        else:
            folder.require_same_images(run)
            if before:
                with folder.log(run, on_event) as logged:
                    changes.write(run, recipe, before, step or 0, logged)
            if labelled:
                labelled.save(run / knn.INDEX)
        yield finished


def require_divisible(recipe: Recipe, count: int) -> None:
    """Raises RecipeError where `count` processes cannot share a batch or a micro-batch equally."""
    sizes = {"data.batch_size": recipe.data.batch_size, "run.micro_batch": recipe.run.micro_batch}
    for key, size in sizes.items():
        if size % count:
            fix = f"set {key}, or change the number of processes"
            what = f"{key} = {size} on {count} processes"
            raise RecipeError(what, expected=f"a multiple of {count}", fix=fix)


def _position(run: Path) -> int | None:
    """Updates done at the newest whole checkpoint; None where there is none."""
    newest = checkpoint.newest(run)
    return None if newest is None else checkpoint.read_state(newest).step
