"""The cross-correlation matrix of a run's checkpoints, on one batch of its own images.

    C = Z1' Z2 / N        (arXiv 2103.03230, eq. 2; its figure 1)

with the embeddings of two views, standardised over the batch as the loss does. All checkpoints see
the first batch of the first epoch.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from btpipe import recipe, runtime
from btpipe.data.index import open_index
from btpipe.data.pipeline import view_pairs
from btpipe.errors import UsageError
from btpipe.events import Report
from btpipe.pretrain import checkpoint, init_from, loss, network
from btpipe.recipe import Recipe

MOST_IMAGES = 256
"""Images of the batch: chance is 1 / sqrt(N), 0.06 for as many."""
MOST_CELLS = 256
"""Cells of a picture's side; a larger matrix is shown in blocks."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A correlation matrix as it is drawn: `cells` (d, d), each of a `block` x `block` of C.

    With `block` 1 they are C itself. Larger blocks hold the mean of |C_ij|, those on the diagonal
    the mean of C_ii alone, because one number among 1,000 would not be seen.
    """

    run: str
    step: int
    cells: NDArray[np.float32]
    dimension: int
    block: int
    images: int
    mean_diagonal: float
    off_diagonal_rms: float

    @property
    def about(self) -> str:
        """What is seen, in one sentence."""
        contents = (
            f"blocks of {self.block} x {self.block}: mean |C_ij|, on the diagonal mean C_ii"
            if self.block > 1
            else "every C_ij"
        )
        return (
            f"{self.dimension} dimensions, {self.images} images, {contents}; mean diagonal"
            f" {self.mean_diagonal:.3f}, off-diagonal RMS {self.off_diagonal_rms:.3f}"
        )


def measure(run: Path, selection: str, on_event: Report) -> list[Matrix]:
    """The matrices of the checkpoints that `selection` names: "first,last" or steps, "0,300".

    "first" and 0 are the network that the run started from. Takes the views that training takes,
    and batch norm as in training.

    Raises:
        UsageError: a step without a checkpoint; those that there are, are named.
        IntegrityError: a checkpoint or the index is damaged.
    """
    run_recipe, index = recipe.load(run / "recipe.toml"), open_index(run / "index.parquet")
    steps = _steps(run, selection)
    size = min(run_recipe.data.batch_size, MOST_IMAGES, len(index))
    with runtime.start() as process:
        pairs = view_pairs.read(index, run_recipe, size, process.device, on_event, known_bad={})
        matrices = []
        for step in steps:
            model = _network(run, run_recipe, step, on_event).to(process.device)
            with torch.no_grad():
                z = model(pairs.first, pairs.second).z
            matrices.append(_matrix(run.resolve().name, step, z[0], z[1]))
    return matrices


def blocks(matrix: NDArray[np.float32], most: int = MOST_CELLS) -> tuple[NDArray[np.float32], int]:
    """A matrix (D, D) in at most `most` x `most` cells as `Matrix` says, and the block's side."""
    dimension = len(matrix)
    side = -(-dimension // most)
    if side == 1:
        return matrix, 1
    starts = np.arange(0, dimension, side)
    lengths = np.diff(np.append(starts, dimension))
    sums = np.add.reduceat(np.add.reduceat(np.abs(matrix), starts, axis=0), starts, axis=1)
    cells = sums / np.outer(lengths, lengths)
    on = np.add.reduceat(np.diagonal(matrix).astype(np.float64), starts) / lengths
    np.fill_diagonal(cells, on)
    return cells.astype(np.float32), side


def _matrix(name: str, step: int, z1: torch.Tensor, z2: torch.Tensor) -> Matrix:
    """The correlation of two views' embeddings (N, D)."""
    count, dimension = z1.shape
    whole = slice(0, dimension)
    first, second = (loss.Standardised(z).local_block(whole) for z in (z1, z2))
    correlation = (first.T @ second / count).float().cpu().numpy()
    diagonal = np.diagonal(correlation).astype(np.float64)
    others = np.square(correlation, dtype=np.float64).sum() - np.square(diagonal).sum()
    cells, side = blocks(correlation)
    return Matrix(
        run=name,
        step=step,
        cells=cells,
        dimension=dimension,
        block=side,
        images=count,
        mean_diagonal=float(diagonal.mean()),
        off_diagonal_rms=float(np.sqrt(max(0.0, others) / max(1, dimension * (dimension - 1)))),
    )


def _steps(run: Path, selection: str) -> list[int]:
    saved_steps = checkpoint.steps(run)
    steps_by_name = {"first": 0, "last": max(saved_steps, default=0)}
    parts = [part.strip() for part in selection.split(",") if part.strip()]
    steps = [
        steps_by_name[part] if part in steps_by_name else int(part)
        for part in parts
        if _is_step(part)
    ]
    strange = [part for part in parts if not _is_step(part)]
    missing = [str(step) for step in steps if step not in (0, *saved_steps)]
    if strange or missing or not steps:
        absent = ", ".join(strange or missing) or "nothing"
        raise UsageError(
            f"--correlation {selection}: no checkpoint of {absent}",
            where=run,
            expected=f"first, last, or of {', '.join(map(str, [0, *saved_steps]))}",
            fix="keep more of the next run's checkpoints: --set run.keep_every=N",
        )
    return sorted(set(steps))


def _is_step(part: str) -> bool:
    return part in ("first", "last") or part.isdecimal()


def _network(run: Path, run_recipe: Recipe, step: int, on_event: Report) -> network.BarlowTwins:
    model = network.initialise(run_recipe)
    if step == 0 and 0 not in checkpoint.steps(run):
        init_from.load(run, run_recipe.network, model, on_event)
        return model
    model.load_state_dict(checkpoint.model_state(checkpoint.folder_of(run, step)))
    return model
