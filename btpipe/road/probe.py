"""What the processes of `btpipe plan` run: loader, step, and both together, at some batch size."""

import itertools
from pathlib import Path
from typing import Literal

import torch

from btpipe.data.index import open_index
from btpipe.data.loader import Batch, TrainingLoader
from btpipe.events import ignore
from btpipe.pretrain import step
from btpipe.recipe import Recipe
from btpipe.road.seat import PeakMemory, Prepared

Device = Literal["cpu", "cuda"]
ENDLESS_EPOCHS = 1_000_000
RATES = 1e-3, 1e-3
"""Small: what is measured is time."""


def at(recipe: Recipe, batch: int) -> Recipe:
    """The same run with another batch, without an end, in one process."""
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"batch_size": batch, "max_bad": 1.0}),
            "optim": recipe.optim.model_copy(update={"epochs": ENDLESS_EPOCHS}),
            "run": recipe.run.model_copy(update={"micro_batch": 0}),
        }
    )


def loading(recipe: Recipe, index: Path, device: Device, batches: int) -> Prepared:
    """Makes `batches` batches."""
    made = supply(recipe, index, torch.device(device))

    def action() -> None:
        for _ in range(batches):
            next(made)

    return Prepared(action, PeakMemory(torch.device(device)), batches)


def stepping(recipe: Recipe, index: Path, device: Device) -> Prepared:
    """One update, of a batch that is at hand."""
    here = torch.device(device)
    memory = PeakMemory(here, whole=True)
    batch = next(supply(recipe, index, here))
    core = _core(recipe, here)
    return Prepared(lambda: step.update(core, batch.views, *RATES), memory)


def training(recipe: Recipe, index: Path, device: Device, steps: int) -> Prepared:
    """Makes `steps` batches and an update of each, as a run does."""
    here = torch.device(device)
    memory = PeakMemory(here, whole=True)
    batches, core = supply(recipe, index, here), _core(recipe, here)

    def action() -> None:
        for batch in itertools.islice(batches, steps):
            step.update(core, batch.views, *RATES)

    return Prepared(action, memory, steps)


def _core(recipe: Recipe, device: torch.device) -> step.Core:
    core = step.build(recipe, device)
    if core.compiled:
        step.compile(core)
    return core


def supply(recipe: Recipe, index: Path, device: torch.device) -> "itertools.chain[Batch]":
    """The batches of a run, as `pretrain` makes them."""
    loader = TrainingLoader(
        open_index(index),
        recipe,
        rank=0,
        world_size=1,
        start_step=0,
        device=device,
        report=ignore,
        quarantine={},
    )
    return itertools.chain(loader)
