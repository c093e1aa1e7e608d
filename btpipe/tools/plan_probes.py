"""Looks at a run before it starts: some steps of it, timed in processes of their own."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from btpipe import runtime
from btpipe.errors import UsageError
from btpipe.events import Note, Report
from btpipe.recipe import Recipe
from btpipe.tools import plan_cases
from btpipe.tools.measured_process import MeasuredProcess, Prepared, Timing

FIRST_IMAGES = 8
"""Of a process's batch, in the first look."""
STEP_SECONDS = 4.0
"""What a step of the second look may take."""
LOOK_SECONDS = 8.0
"""How long one look lasts, about."""


@dataclasses.dataclass(frozen=True)
class Look:
    """A step's time and memory for so many images of one process."""

    images: int
    turn: Timing
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one process at the batch that was looked at: images/s, and CPU-seconds of an image."""

    loader: float
    loader_cpu: float
    step: float
    step_cpu: float


def take(
    recipe: Recipe, index: Path, device: plan_cases.Device, share: int, on_event: Report
) -> list[Look]:
    """The loop at a small batch and at one as large as time allows, at most `share`."""

    def look(images: int, steps: int) -> Look | None:
        text = f"looking at {steps} steps of {images} images, loader and network"
        on_event(Note(text, {"steps": steps, "images": images}))
        prepare = functools.partial(plan_cases.training, recipe, index, device, images, steps)
        measured = _measured(prepare, steps)
        return Look(images, *measured) if measured else None

    first = look(min(FIRST_IMAGES, share), 2)
    if first is None:
        fix = "free the GPU, or take a smaller network"
        raise UsageError("too little GPU memory for the smallest look", fix=fix)
    room = STEP_SECONDS / first.turn.seconds * first.images
    largest = min(share, 2 ** int(np.log2(max(room, first.images * 2))))
    while largest > first.images:
        # A small batch is dearer for each image: the second look says what the first one cannot.
        steps = max(2, round(LOOK_SECONDS / (first.turn.seconds * largest / first.images)))
        second = look(largest, min(steps, 50))
        if second is not None:
            return [first, second]
        on_event(Note(f"too little GPU memory for {largest} images", {"images": largest}))
        largest //= 2
    return [first]


def rates(
    recipe: Recipe, index: Path, device: plan_cases.Device, last: Look, on_event: Report
) -> Rates:
    text = f"looking at loader and step apart, {last.images} images each"
    on_event(Note(text, {"images": last.images}))
    images = last.images
    batches = max(2, round(LOOK_SECONDS / 2 / last.turn.seconds))
    load_batches = functools.partial(plan_cases.loading, recipe, index, device, images, batches)
    loader = _measured(load_batches, batches)
    step = _measured(functools.partial(plan_cases.stepping, recipe, index, device, images), 1)
    if loader is None or step is None:
        fix = "free the GPU: something else takes of its memory"
        raise UsageError(f"too little GPU memory for {images} images, which had fitted", fix=fix)
    (load, _), (update, _) = loader, step
    return Rates(
        loader=images / load.seconds,
        loader_cpu=load.cpu_seconds / images,
        step=images / update.seconds,
        step_cpu=update.cpu_seconds / images,
    )


def _measured(prepare: Callable[[], Prepared], repeats: int) -> tuple[Timing, int] | None:
    """Time of one of the action's `repeats`, and the peak of memory; None: a GPU has too little."""
    process = MeasuredProcess("plan", prepare, runtime.cores())
    try:
        turn = process.measure() if process.prepare() else None
        if turn is None:
            return None
        return Timing(turn.seconds / repeats, turn.cpu_seconds / repeats), process.peak_bytes()
    finally:
        process.close()


def at(images: int, points: list[tuple[int, float]]) -> float:
    """The value at so many images: of the last point, or on the line through the last two."""
    last, value = points[-1]
    if images == last or len(points) == 1:
        return value * images / last
    before, less = points[-2]
    slope = (value - less) / (last - before)
    return value + max(slope, 0.0) * (images - last)
