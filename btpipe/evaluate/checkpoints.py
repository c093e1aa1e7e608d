"""`btpipe eval select`: which of a run's checkpoints to take, by numbers that need no labels."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from btpipe import artifact, neighbours, recipe, runtime
from btpipe.data.index import Index, build, open_index
from btpipe.data.pipeline import view_pairs
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.eval_loader import evaluation_batches
from btpipe.data.pipeline.view_pairs import Pairs
from btpipe.errors import IntegrityError, UsageError
from btpipe.evaluate import label_free
from btpipe.evaluate.checkpoint_report import By, CheckpointRow, Selected
from btpipe.events import Note, Progressed, Rejected, Report, Warned, per_second
from btpipe.export import encoder_source
from btpipe.plot import history
from btpipe.pretrain import checkpoint, knn, network
from btpipe.pretrain.folder import INDEX, RunRejects
from btpipe.recipe import Recipe

BATCH = 64
KINDS = (".html", ".png")
PerImage = Mapping[str, NDArray[np.float64]]
"""Of a measure that is a mean over images, each image's share in it: (n,)."""


@dataclasses.dataclass(frozen=True)
class _Set:
    """What every checkpoint sees: pairs of views, and the evaluation view (n, S, S, 3)."""

    pairs: Pairs
    evaluation: torch.Tensor
    labelled: Index | None


def run(
    folder: Path,
    on_event: Report,
    *,
    by: By = "retrieval",
    images: tuple[str, ...] = (),
    most: int = 1024,
    out: Path | None = None,
) -> Selected:
    """Measures the checkpoints, reports the best one, and draws and writes all numbers.

    `images`: others than the run's own. Writes `out`, a page or a PNG, and its X.json beside it;
    RUN/select.html if none.

    Raises:
        UsageError: as `measure`, or a name that is neither X.html nor X.png.
        IntegrityError: as `measure`.
        MachineError: no space, or no permission.
    """
    out = out or folder / "select.html"
    if out.suffix.lower() not in KINDS:
        raise UsageError(f"--out {out}", expected="a name that ends in .html or .png")
    with artifact.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write = _writer(out)
    selected = measure(folder, on_event, by=by, images=images, most=most)
    write(selected)
    artifact.write_json(out.with_suffix(".json"), selected.record())
    if selected.start_is_better:
        on_event(Warned(selected.start_is_better))
    on_event(selected)
    numbers = out.with_suffix(".json")
    text = f"{out} and {numbers} are written; btpipe export {folder} --step {selected.step}"
    on_event(Note(text, {"step": selected.step}))
    return selected


def measure(
    folder: Path, on_event: Report, *, by: By, images: tuple[str, ...] = (), most: int = 1024
) -> Selected:
    """Every measure of every checkpoint, and of the network the run started from.

    Each encoder is the one that export would publish: float32, batch norm by its running
    statistics. With `by` "knn" the run's labelled images judge all of them; else kNN is what the
    run told of that very step.

    Raises:
        UsageError: no run, no checkpoint, fewer than two images, or no labelled images for "knn".
        IntegrityError: no checkpoint is whole.
        BudgetError: none of the images can be read.
    """
    started = time.monotonic()
    if not (folder / "recipe.toml").is_file():
        expected, fix = "a folder with recipe.toml", "name a run folder: runs/NAME"
        raise UsageError("no run there", where=folder, expected=expected, fix=fix)
    described, run_index = recipe.load(folder / "recipe.toml"), open_index(folder / INDEX)
    steps = [step for step in checkpoint.steps(folder) if step]
    if not steps:
        raise UsageError("no checkpoint yet", where=folder, fix="let btpipe pretrain write one")
    labelled = _labelled(folder) if by == "knn" else None
    accuracies = {} if labelled else _accuracies(folder)
    index = build(images, on_event)[0] if images else run_index
    if min(most, len(index)) < 2:
        raise UsageError(f"{len(index)} images", where=index.root, expected="two or more")
    known_bad = {} if images else RunRejects(folder, index).by_row()
    steps_per_epoch = max(1, described.steps_per_epoch(len(run_index)))
    rows: list[CheckpointRow] = []
    shares: dict[int, PerImage] = {}
    with runtime.start() as process:
        image_set = _read(index, described, most, labelled, process.device, on_event, known_bad)
        for step, encoder in _encoders(folder, [0, *steps], image_set, on_event):
            measures = _measured(encoder.to(process.device), described, image_set)
            if measures is None:
                text = f"step {step}: its vectors are not finite; left out"
                on_event(Warned(text, {"step": step}))
                continue
            row, shares[step] = measures
            accuracy = row.knn if labelled else accuracies.get(step)
            epoch = step / steps_per_epoch
            rows.append(dataclasses.replace(row, step=step, epoch=epoch, knn=accuracy))
    if not any(row.step for row in rows):
        raise IntegrityError("none of its checkpoints can be measured", where=folder)
    return Selected.choose(
        folder.resolve().name,
        by,
        tuple(rows),
        images=len(image_set.pairs.rows),
        own=not images,
        seconds=time.monotonic() - started,
        errors=lambda a, b: _error(by, shares[a], shares[b]),
    )


def _writer(out: Path) -> Callable[[Selected], None]:
    """What writes `out`; a PNG whose extra is missing is refused before anything is measured."""
    if out.suffix.lower() == ".png":
        from btpipe.plot import png  # noqa: PLC0415 - an extra

        return lambda selected: png.write_panels(
            out, selected.title(), selected.panels(), selected.marks()
        )
    from btpipe.plot import html  # noqa: PLC0415 - beside its like

    return lambda selected: html.write_panels(
        out,
        selected.title(),
        selected.text,
        selected.panels(),
        selected.marks(),
        selected.tables()[0],
    )


def _labelled(folder: Path) -> Index:
    if not (folder / knn.INDEX).is_file():
        raise UsageError(
            "--by knn: the run has no labelled images",
            where=folder,
            expected="a run with health.knn in its recipe",
            fix="choose by what needs none: --by retrieval; or export two steps (btpipe export"
            " --step N), embed labelled images with both, and compare: btpipe eval knn",
        )
    return open_index(folder / knn.INDEX)


def _accuracies(folder: Path) -> dict[int, float]:
    """Step to the kNN accuracy that the run told of it."""
    if not (folder / "events.jsonl").is_file():
        return {}
    return dict(history.read(folder).series["accuracy"])


def _read(
    index: Index,
    described: Recipe,
    most: int,
    labelled: Index | None,
    device: torch.device,
    on_event: Report,
    known_bad: Mapping[int, Rejected],
) -> _Set:
    pairs = view_pairs.read(index, described, most, device, on_event, known_bad=known_bad)
    pixels = [p for _, p in _evaluation(index, pairs.rows, described, device)]
    return _Set(pairs, torch.cat(pixels), labelled)


def _evaluation(
    index: Index, rows: NDArray[np.int64], described: Recipe, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Readable rows and their pixels, batch by batch."""
    for batch in evaluation_batches(
        index,
        rows,
        Geometry.for_size(described.data.image_size),
        batch_size=BATCH,
        threads=described.data.threads or runtime.cores(),
        gpu=device.index if device.type == "cuda" else None,
    ):
        yield batch.rows, torch.from_numpy(batch.pixels)


def _encoders(
    folder: Path, steps: list[int], image_set: _Set, on_event: Report
) -> Iterator[tuple[int, nn.Module]]:
    """Each step's encoder as export would publish it; damaged ones are named and left out."""
    started, each = time.monotonic(), 3 * len(image_set.pairs.rows)
    for i, step in enumerate(steps):
        rate = per_second(i * each, time.monotonic() - started)
        on_event(Progressed("select", i * each, len(steps) * each, rate, 0.0))
        try:
            kept = None if step == 0 else step
            source = encoder_source.of_run(folder, on_event, untrained=step == 0, step=kept)
        except IntegrityError as error:
            on_event(Warned(f"step {step} is left out: {error}", {"step": step}))
            continue
        yield step, source.encoder.to(memory_format=torch.channels_last)  # as its pixels are


def _measured(
    encoder: nn.Module, described: Recipe, image_set: _Set
) -> tuple[CheckpointRow, PerImage] | None:
    """The measures of an encoder and their parts; None where a vector is not finite."""
    device = next(encoder.parameters()).device
    first, second = (
        _vectors(encoder, view) for view in (image_set.pairs.first, image_set.pairs.second)
    )
    plain = _vectors(encoder, image_set.evaluation)
    if not all(np.isfinite(vectors).all() for vectors in (first, second, plain)):
        return None
    retrieval = label_free.retrieval(first, second)
    distances = label_free.alignment(first, second)
    accuracy = None
    if image_set.labelled:
        rows, classes = knn.judged(image_set.labelled)
        parts = [
            (good, _vectors(encoder, pixels))
            for good, pixels in _evaluation(image_set.labelled, rows, described, device)
        ]
        named = classes[np.concatenate([good for good, _ in parts])]
        accuracy = knn.leave_one_out_accuracy(np.concatenate([v for _, v in parts]), named)
    row = CheckpointRow(
        step=0,
        epoch=0.0,
        retrieval=float(retrieval.mean()),
        rank=neighbours.effective_rank(plain),
        uniformity=(label_free.uniformity(first) + label_free.uniformity(second)) / 2,
        alignment=float(distances.mean()),
        knn=accuracy,
    )
    return row, {"retrieval": retrieval, "alignment": distances}


def _vectors(encoder: nn.Module, pixels: torch.Tensor) -> NDArray[np.float32]:
    """(n, H, W, 3) uint8 -> (n, F)."""
    parameter = next(encoder.parameters())
    with torch.inference_mode():
        parts = [
            encoder(network.normalise(part.to(parameter.device), parameter.dtype)).cpu()
            for part in torch.split(pixels, BATCH)
        ]
    vectors: NDArray[np.float32] = torch.cat(parts).numpy()
    return vectors


def _error(by: By, a: PerImage, b: PerImage) -> float | None:
    """Standard error of the difference of two checkpoints, where the measure is a mean."""
    return label_free.standard_error(a[by], b[by]) if by in a else None
