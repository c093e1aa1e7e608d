"""The run folder `runs/NAME/`: made once from a recipe and its images, guarded, and gone on with.

recipe.toml  index.parquet  environment.json  events.jsonl  rejects.csv  checkpoints/step-N/
initial/ (with `network.init_from`)
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from btpipe import artifact, runtime
from btpipe.data import change_detection, rejects
from btpipe.data.index import Index, build, open_index
from btpipe.errors import RefusedError, UsageError
from btpipe.events import Event, Rejected, Report
from btpipe.pretrain import changes, foreign_weights, init_from
from btpipe.recipe import Recipe

RECIPE, INDEX, ENVIRONMENT, EVENTS = (
    "recipe.toml",
    "index.parquet",
    "environment.json",
    "events.jsonl",
)
REJECTS = "rejects.csv"


def prepare(
    folder: Path, recipe: Recipe, on_event: Report, accepted: Sequence[str] = ()
) -> Mapping[str, str]:
    """Makes the run folder for this recipe, or makes sure that it is this recipe's.

    Nothing is created before the images are found and enough for a batch. Returns the accepted
    changes that are to be made in its recipe, as `changes.differences` does.

    Raises:
        UsageError: `data.train` names no images, or fewer than a batch.
        RefusedError: the folder holds a run of another recipe: keys differ that are not accepted.
        RefusedError: `network.init_from` does not fit, or has other content by now.
    """
    before: Mapping[str, str] = {}
    if (folder / RECIPE).is_file():
        before = changes.differences(folder, recipe, accepted)
        artifact.sweep(folder / "checkpoints")
        if (folder / INDEX).is_file():
            init_from.require_same(folder, recipe.network)
            return before
    elif folder.exists() and any(folder.iterdir()):
        raise RefusedError("is not a run of btpipe", where=folder, fix="choose another --name")
    source = recipe.network.init_from
    adopted = foreign_weights.read_encoder(Path(source), recipe.network) if source else None
    index, rejected = _index(recipe, on_event)
    with artifact.disk_errors(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    artifact.write_file(folder / RECIPE, recipe.to_toml().encode())
    artifact.write_json(folder / ENVIRONMENT, runtime.environment())
    rejects.write(folder / REJECTS, rejected)
    if adopted:
        init_from.adopt(folder, adopted)
    index.save(folder / INDEX)
    return {}


def _index(recipe: Recipe, on_event: Report) -> tuple[Index, list[Rejected]]:
    inputs = recipe.data.inputs
    try:
        index, rejected = build(inputs, on_event)
    except UsageError as error:
        fix = "put the training images there (any tree of folders), or: --set data.train=DIR"
        what = f"data.train = {' '.join(inputs)!r}: {error.what}"
        raise UsageError(what, where=error.where, expected=error.expected, fix=fix) from error
    if len(index) < recipe.data.batch_size:
        raise UsageError(
            f"{len(index)} readable images are less than one batch of {recipe.data.batch_size}",
            where=" ".join(inputs),
            fix="add images, or lower the batch: --set data.batch_size=N",
        )
    return index, rejected


def require_same_images(folder: Path) -> None:
    """Makes sure that `data.train` still holds the images that the run's index lists.

    Files in rejects.csv are of no account: they are not trained on, or others stand in for them.

    Raises:
        RefusedError: images came, went or changed since the run began.
        MachineError: the folder cannot be read.
    """
    index = open_index(folder / INDEX)
    passed_over = {rejected.path for rejected in rejects.read(folder / REJECTS)}
    differences = change_detection.changes(index, passed_over)
    if differences:
        kinds = {
            "added": differences.added,
            "removed": differences.removed,
            "of another size": differences.resized,
        }
        summary = [f"{len(p)} {kind} ({p[0]})" for kind, p in kinds.items() if p]
        raise RefusedError(
            f"data.train: images changed since the run began: {', '.join(summary)}",
            where=folder,
            expected=f"the {len(index)} images of its index.parquet",
            fix="put the images back as they were, or train on the new ones under another --name",
        )


def lock(folder: Path, wait_seconds: float = 0) -> AbstractContextManager[None]:
    """One process group at a time in a run folder; a dead one's lock is free.

    `wait_seconds`: patience with a holder that may be about to end. Entering raises RefusedError
    where a living process holds it.
    """
    fix = "wait for it, or stop it; choose another --name for a second run"
    return artifact.locked(folder, "another process is training here", fix, wait_seconds)


@contextmanager
def log(folder: Path, on_event: Report) -> Iterator[Report]:
    """A `Report` that also appends every event to the run's events.jsonl."""
    with (folder / EVENTS).open("a", buffering=1) as file:

        def both(event: Event) -> None:
            with artifact.disk_errors(folder / EVENTS):
                file.write(json.dumps(event.record()) + "\n")
            on_event(event)

        yield both


class RunRejects:
    """rejects.csv: the inputs that the index left out, and its images that cannot be used."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index

    def by_row(self) -> dict[int, Rejected]:
        """By their rows, the images of the index that were rejected so far."""
        rejected = {bad.path: bad for bad in rejects.read(self._folder / REJECTS)}
        paths = self._index.table.column("path").to_pylist() if rejected else []
        return {row: rejected[path] for row, path in enumerate(paths) if path in rejected}

    def update(self, rejected: Mapping[int, Rejected]) -> None:
        """Adds what this rank rejected to what the file already names; one rank at a time."""
        if not rejected:
            return
        what = "another rank is writing it"
        with artifact.locked(self._folder, what, "start again", math.inf, name=RECIPE):
            before = rejects.read(self._folder / REJECTS)
            paths = {bad.path for bad in before}
            fresh = [rejected[row] for row in sorted(rejected) if rejected[row].path not in paths]
            if fresh:
                rejects.write(self._folder / REJECTS, before + fresh)
