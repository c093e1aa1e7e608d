"""Starting a run: prepared once, then trained by one process, or by several that btpipe starts."""

from pathlib import Path

from btpipe import artifact, events, progress, runtime
from btpipe.data.index import open_index
from btpipe.errors import RecipeError
from btpipe.pretrain import checkpoint, folder, train
from btpipe.recipe import Recipe


def pretrain(run: Path, recipe: Recipe, *, devices: str, mode: progress.Mode) -> None:
    """Trains `recipe` into the folder `run`, from where it stands; a finished run is left alone.

    `devices`: processes on this machine ("auto": one for each GPU, or one). Under torchrun the
    ranks are its own, and the first one prepares the folder.

    Raises:
        BtpipeError: whatever `folder.prepare` and `train.fit` raise.
    """
    if runtime.under_torchrun():
        _one_of_many(run, recipe, mode, prepares=True)
        return
    count = runtime.devices(devices)
    _require_divisible(recipe, count)
    with progress.show(mode) as report:
        folder.prepare(run, recipe, report)
        if _is_finished(run, recipe):
            report(events.Note(f"nothing to do: {run} is trained to its last step"))
            return
    with folder.lock(run):
        if count == 1:
            _one_of_many(run, recipe, mode, prepares=False)
        else:
            runtime.launch(count, _one_of_many, (run, recipe, mode))


def _one_of_many(run: Path, recipe: Recipe, mode: progress.Mode, prepares: bool = False) -> None:
    """One rank's part: the first one shows progress and writes the log."""
    with runtime.start() as here:
        if not here.is_first:
            runtime.barrier()
            train.fit(run, recipe, here, events.ignore)
            return
        with progress.show(mode) as report:
            if prepares:
                _require_divisible(recipe, here.world_size)
                folder.prepare(run, recipe, report)
            runtime.barrier()
            with folder.log(run, report) as logged:
                train.fit(run, recipe, here, logged)


def _require_divisible(recipe: Recipe, count: int) -> None:
    if recipe.data.batch_size % count:
        found = f"data.batch_size = {recipe.data.batch_size} on {count} processes"
        raise RecipeError(found, expected="a batch that divides among them")


def _is_finished(run: Path, recipe: Recipe) -> bool:
    newest = checkpoint.newest(run)
    if newest is None:
        return False
    images = len(open_index(run / folder.INDEX))
    steps = images // recipe.data.batch_size * recipe.optim.epochs
    return artifact.read(newest, checkpoint.KIND).origin["step"] == steps
