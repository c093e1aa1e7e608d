"""What a run is while it trains."""

import dataclasses
from pathlib import Path

from btpipe.data.index import Index
from btpipe.events import Report
from btpipe.pretrain import checkpoint, schedule, step
from btpipe.recipe import Recipe
from btpipe.runtime import Runtime


@dataclasses.dataclass
class TrainingRun:
    """What the loop carries from step to step."""

    recipe: Recipe
    folder: Path
    runtime: Runtime
    on_event: Report
    core: step.Core
    state: checkpoint.State
    index: Index

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return self.recipe.steps_per_epoch(len(self.index))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.recipe.steps(len(self.index))

    def rates(self, at: int) -> tuple[float, float]:
        """Learning rates of weights and biases at a step."""
        return schedule.rates(self.recipe, at, len(self.index))
