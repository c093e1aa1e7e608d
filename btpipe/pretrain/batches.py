"""The batches of a run, and the budget of unusable images, which is counted over all ranks."""

import numpy as np
import torch

from btpipe import runtime
from btpipe.data.pipeline.train_loader import Batch, TrainingLoader
from btpipe.errors import BudgetError
from btpipe.pretrain.folder import RunRejects


class Supply:
    """A loader's batches for the loop, and `data.max_bad` over the ranks together.

    A rank that is over the budget has no batch to give, but the others wait for it within the step:
    it goes on with blank images until all have heard of it. Nothing of that is saved, because
    `require_budget` comes before every checkpoint.
    """

    def __init__(self, loader: TrainingLoader, rejects: RunRejects) -> None:
        """Raises BudgetError: what earlier starts of this run found is over the budget."""
        if loader.rejected:
            loader.require_budget(len(loader.rejected))
        self._loader, self._rejects = loader, rejects
        self._batches = iter(loader)
        self._counted = self._recorded = len(loader.rejected)
        self._over: BudgetError | None = None

    def next(self, step: int) -> Batch:
        """The batch of this step, or a blank one when this rank is over the budget."""
        if self._over is None:
            try:
                return next(self._batches)
            except BudgetError as error:
                self._over = error
        blank = tuple(
            torch.zeros(shape, dtype=torch.uint8, device=self._loader.device)
            for shape in self._loader.view_shapes
        )
        return Batch(step, np.zeros(0, dtype=np.int64), blank)

    def has_found(self) -> bool:
        """Whether this rank found unusable images since they were last counted."""
        return self._over is not None or len(self._loader.rejected) > self._counted

    def require_budget(self) -> None:
        """Counts the unusable images over all ranks, each once; every rank must call it.

        Raises:
            BudgetError: they are more than `data.max_bad` allows.
        """
        bad = self._loader.rejected
        self._counted = len(bad)
        if runtime.world_size() > 1:
            rows = torch.zeros(len(self._loader.index), dtype=torch.int32)
            rows[list(bad)] = 1
            total = int((runtime.all_reduce_sum(rows) > 0).sum())
            if total:
                self._loader.require_budget(total, f", {len(bad)} of them met by this process")
        if self._over is not None:
            raise self._over

    def record(self) -> None:
        """Writes what this rank found to rejects.csv, where a kill cannot take it away."""
        bad = self._loader.rejected
        if len(bad) > self._recorded:
            self._rejects.update(bad)
            self._recorded = len(bad)
