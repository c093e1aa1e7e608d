"""What the processes of `btpipe plan` run: loader, step, and both together, at some batch size.

One process without an end; a step takes its batch whole, whatever `run.micro_batch` says.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import torch

from btpipe.data.index import open_index
from btpipe.data.pipeline.train_loader import Batch, LoaderSettings, TrainingLoader
from btpipe.events import ignore
from btpipe.pretrain import step
from btpipe.recipe import Recipe
from btpipe.tools.measured_process import PeakMemory, Prepared

Device = Literal["cpu", "cuda"]
RATES = 1e-3, 1e-3
"""Small: what is measured is time."""


def loading(recipe: Recipe, index: Path, device: Device, batch_size: int, batches: int) -> Prepared:
    """Makes `batches` batches."""
    supplied = supply(LoaderSettings.sample(recipe, batch_size), index, torch.device(device))

    def action() -> None:
        for _ in range(batches):
            next(supplied)

    return Prepared(action, PeakMemory(torch.device(device)), batches)


def stepping(recipe: Recipe, index: Path, device: Device, batch_size: int) -> Prepared:
    """One update, of a batch that is at hand."""
    target = torch.device(device)
    memory = PeakMemory(target, whole=True)
    batch = next(supply(LoaderSettings.sample(recipe, batch_size, steps=1), index, target))
    core = _core(recipe, target)
    return Prepared(lambda: step.update(core, batch.views, *RATES), memory)


def training(recipe: Recipe, index: Path, device: Device, batch_size: int, steps: int) -> Prepared:
    """Makes `steps` batches and an update of each, as a run does."""
    target = torch.device(device)
    memory = PeakMemory(target, whole=True)
    batches = supply(LoaderSettings.sample(recipe, batch_size), index, target)
    core = _core(recipe, target)

    def action() -> None:
        for batch in itertools.islice(batches, steps):
            step.update(core, batch.views, *RATES)

    return Prepared(action, memory, steps)


def _core(recipe: Recipe, device: torch.device) -> step.Core:
    core = dataclasses.replace(step.build(recipe, device), micro_batch=0)
    if core.compiled:
        step.compile(core)
    return core


def supply(settings: LoaderSettings, index: Path, device: torch.device) -> "itertools.chain[Batch]":
    """Batches as `pretrain` makes them."""
    loader = TrainingLoader(
        open_index(index),
        settings,
        rank=0,
        world_size=1,
        start_step=0,
        device=device,
        on_event=ignore,
        rejected={},
    )
    return itertools.chain(loader)
