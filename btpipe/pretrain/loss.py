"""The Barlow Twins loss and its gradient, in closed form, over the batch of all ranks.

    L = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2        C = Z1' Z2 / N

with Z1, Z2 the embeddings (N, D) of the two views, standardised per dimension over the N images of
the global batch (arXiv 2103.03230, eq. 1 and 2; the published code's `BatchNorm1d(affine=False)`).

The second sum needs no D x D matrix:

    sum_{ij} C_ij^2 = sum_{nm} (Z1 Z1')_nm (Z2 Z2')_nm / N^2

so two N x N Gram matrices do ("gram"), at 8 N^2 D flops for the gradient against 6 N D^2 for the
correlation matrix ("cross"). Both are exact.

With more than two views the loss is the mean over pairs of views. Each view has one Gram matrix,
and its gradient needs the sum of its partners': the cost grows with the views, not with the pairs.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch

from btpipe import runtime

EPSILON = 1e-5  # of the published code's batch norm on the embeddings
DEAD_VARIANCE = 1e-12
"""Variance at or below which a dimension counts as constant."""
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Size of a block of standardised columns, by device: small beside (N, D) and near to a CPU's
caches, large enough to keep a GPU busy."""

Form = Literal["gram", "cross"]
Pair = tuple[int, int]
"""Two views whose correlation is taken."""
Halves = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]
"""Of each pair sum_ij C_ij^2 (P,) and the diagonal of C (P, D); dL/dz of each view, (n, D)."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What one batch's correlation matrix says, as 0-d tensors on the device, equal on all ranks.

    Means over the pairs of views. `off_diagonal` is before `lambd`; `mean_diagonal` is the mean of
    C_ii; `dead` counts dimensions that are constant over the batch in a view.
    """

    on_diagonal: torch.Tensor
    off_diagonal: torch.Tensor
    mean_diagonal: torch.Tensor
    dead: torch.Tensor

    def total(self, lambd: float) -> torch.Tensor:
        """on_diagonal + lambd * off_diagonal."""
        return self.on_diagonal + lambd * self.off_diagonal


class Standardised:
    """Embeddings of one view, with zero mean and unit variance per dimension over all ranks' rows.

    Made a block of columns at a time, in at least float32, so that no second (N, D) is held.
    `local` (n, D) are this rank's rows, `gathered` (N, D) those of all ranks in rank order, both as
    the network gave them; `mean` and `deviation` (D,), the latter sqrt(variance + EPSILON).
    """

    def __init__(self, z: torch.Tensor) -> None:
        self.local = z.detach()
        self.mean, variance = _moments(self.local)
        self.deviation = (variance + EPSILON).sqrt()
        self.dead = (variance <= DEAD_VARIANCE).sum()
        self._scale = 1 / self.deviation
        self._first = runtime.rank() * len(z)
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def gather(self) -> None:
        """Collects the rows of all ranks."""
        self.gathered = runtime.gather_rows(self.local)

    def block(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(local rows, all ranks' rows) of these columns: (n, c), (N, c)."""
        if self._whole is not None:
            return self._whole
        gathered = self._standard(self.gathered, columns)
        both = gathered[self._first : self._first + len(self.local)], gathered
        if columns == slice(0, self.local.shape[1]):
            self._whole = both
        return both

    def local_block(self, columns: slice) -> torch.Tensor:
        """This rank's rows of these columns: (n, c)."""
        return self._whole[0] if self._whole else self._standard(self.local, columns)

    def _standard(self, rows: torch.Tensor, columns: slice) -> torch.Tensor:
        return (rows[:, columns] - self.mean[columns]).mul_(self._scale[columns])


Views = Sequence[Standardised]


def _moments(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (D,) of each column over the rows of all ranks.

    In two passes: E[x^2] - mean^2 would cancel.
    """
    means, variances = [], []
    for columns in _blocks(len(z), z):
        wide = _wide(z[:, columns])
        mean = wide.mean(0)
        means.append(mean)
        variances.append((wide - mean).square_().mean(0))
    local = torch.stack([torch.cat(means), torch.cat(variances)])
    mean, variance = runtime.merge_moments(local).unbind()
    return mean, variance


def _wide(z: torch.Tensor) -> torch.Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _blocks(rows: int, z: torch.Tensor) -> list[slice]:
    """The columns of z in blocks whose `rows` rows of float32 take `BLOCK_BYTES`; 256 or more."""
    dimension = z.shape[1]
    width = max(256, BLOCK_BYTES.get(z.device.type, BLOCK_BYTES["cuda"]) // (4 * rows))
    return [slice(i, min(i + width, dimension)) for i in range(0, dimension, width)]


def value_and_gradient(
    z: Sequence[torch.Tensor],
    lambd: float,
    form: Form,
    pairs: Sequence[Pair] = ((0, 1),),
) -> tuple[Terms, list[torch.Tensor]]:
    """Loss over the global batch, and its gradient for this rank's rows.

    z: (n, D) of each view on each rank, N = world_size * n. The loss is the mean of L over `pairs`
    of views. Returns the terms (equal on all ranks) and dL/dz of each view, (n, D) in at least
    float32: the true gradient of the global loss, to be summed over ranks once it has reached the
    parameters.

    Memory beyond z and its gradient: "gram" an (n, N) matrix for each view and a few blocks of
    columns, and on several ranks the rows of the others; "cross" a (D, D) matrix and (n, D) for
    each view.
    """
    views = [Standardised(one) for one in z]
    make = _gram if form == "gram" else _cross
    squares, diagonals, gradients = make(views, pairs, lambd)
    terms = Terms(
        on_diagonal=(1 - diagonals).square().sum(1).mean(),
        off_diagonal=(squares - diagonals.square().sum(1)).mean(),
        mean_diagonal=diagonals.mean(),
        dead=torch.stack([view.dead for view in views]).amax(),
    )
    return terms, list(gradients)


def _gram(views: Views, pairs: Sequence[Pair], lambd: float) -> Halves:
    """From (n, N) slices of each view's Gram matrix, a block of columns at a time."""
    for view in views:
        view.gather()
    rows, dimension = views[0].local.shape
    count = rows * runtime.world_size()
    blocks = _blocks(count, views[0].local)
    grams = [views[0].mean.new_zeros(rows, count) for _ in views]
    diagonals = views[0].mean.new_empty(len(pairs), dimension)
    for columns in blocks:
        blocked = [view.block(columns) for view in views]
        for gram, (local, gathered) in zip(grams, blocked, strict=True):
            gram.addmm_(local, gathered.T)
        for diagonal, (i, j) in zip(diagonals, pairs, strict=True):
            diagonal[columns] = _column_sums(blocked[i][1], blocked[j][1]) / count
    squares = torch.stack([(grams[i] * grams[j]).sum() for i, j in pairs])
    squares = runtime.all_reduce_sum(squares) / count**2
    on_c = _on_diagonal_gradient(diagonals, lambd, count) / len(pairs)
    partners = _partners(len(views), pairs)
    # d/dz_i of sum_nm (G_i G_j)_nm over the partners j: one product with the sum of their Grams.
    scale = 2 * lambd / (count**2 * len(pairs))
    if len(views) == 2:
        grams = [grams[1].mul_(scale), grams[0].mul_(scale)]
    else:
        grams = [_sum([grams[j] for _, j in others]) * scale for others in partners]
    gradients = torch.empty(len(views), rows, dimension, dtype=on_c.dtype, device=on_c.device)
    for columns in blocks:
        blocked = [view.block(columns) for view in views]
        for i, gradient in enumerate(gradients):
            direct = _sum([blocked[j][0] * on_c[pair, columns] for pair, j in partners[i]])
            torch.addmm(direct, grams[i], blocked[i][1], out=gradient[:, columns])
    for view, gradient in zip(views, gradients, strict=True):
        _through_standardise(gradient, view, count)
    return squares, diagonals, gradients.unbind()


def _cross(views: Views, pairs: Sequence[Pair], lambd: float) -> Halves:
    """From the (D, D) correlation matrix of each pair."""
    whole = slice(0, views[0].local.shape[1])
    local = [view.local_block(whole) for view in views]
    count = len(local[0]) * runtime.world_size()
    scale = 2 * lambd / (count * len(pairs))
    squares, diagonals = [], []
    gradients: list[torch.Tensor | None] = [None] * len(views)
    for i, j in pairs:
        correlation = runtime.all_reduce_sum(local[i].T @ local[j]).div_(count)
        diagonals.append(correlation.diagonal().clone())
        squares.append(torch.linalg.vector_norm(correlation).square())
        on_c = _on_diagonal_gradient(diagonals[-1], lambd, count) / len(pairs)
        for this, other, matrix in ((i, j, correlation.T), (j, i, correlation)):
            part = torch.addmm(local[other] * on_c, local[other], matrix, alpha=scale)
            before = gradients[this]
            gradients[this] = part if before is None else before.add_(part)
    view_gradients = [gradient for gradient in gradients if gradient is not None]
    assert len(view_gradients) == len(views), "every view is in a pair"
    for view, gradient in zip(views, view_gradients, strict=True):
        _through_standardise(gradient, view, count)
    return torch.stack(squares), torch.stack(diagonals), view_gradients


def _partners(views: int, pairs: Sequence[Pair]) -> list[list[tuple[int, int]]]:
    """For each view the (number of the pair, other view) of the pairs that it is in."""
    return [
        [(k, j if i == view else i) for k, (i, j) in enumerate(pairs) if view in (i, j)]
        for view in range(views)
    ]


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, in memory of its own where there are several."""
    total = tensors[0] if len(tensors) == 1 else tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total += tensor
    return total


def _on_diagonal_gradient(diagonal: torch.Tensor, lambd: float, count: int) -> torch.Tensor:
    """What a_ni must be multiplied by for C_ii's share: dL/dC_ii is -2 (1 - C_ii), and the
    redundancy term's own diagonal is taken out again."""
    return (-2 * (1 - diagonal) - 2 * lambd * diagonal) / count


def _column_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sum_n x_nd y_nd: (n, D), (n, D) -> (D,)."""
    return (x * y).sum(0)


def _through_standardise(gradient: torch.Tensor, z: Standardised, count: int) -> None:
    """Gradient (n, D) for standardised rows -> for the rows before standardisation, in place."""
    blocks = _blocks(len(gradient), gradient)
    sums = torch.empty(2, gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    for columns in blocks:
        torch.sum(gradient[:, columns], 0, out=sums[0, columns])
        sums[1, columns] = _column_sums(gradient[:, columns], z.local_block(columns))
    mean, along = runtime.all_reduce_sum(sums) / count
    for columns in blocks:
        part = gradient[:, columns].sub_(mean[columns])
        part.addcmul_(z.local_block(columns), along[columns], value=-1).div_(z.deviation[columns])


def off_diagonal_rms(terms: Terms, dimension: int) -> float:
    """Root mean square of C_ij, i != j: about 1 / sqrt(N) for independent features."""
    pairs = max(1, dimension * (dimension - 1))
    total = float(terms.off_diagonal)
    return math.sqrt(total / pairs) if not total < 0 else 0.0  # rounding; NaN stays NaN


def choose_form(
    form: Literal["auto", "gram", "cross"],
    count: int,
    dimension: int,
    *,
    views: int = 2,
    pairs: int = 1,
) -> Form:
    """The cheaper form for N images and D dimensions.

    4 N^2 D flops a view against 6 N D^2 a pair: with two views gram where N < 0.75 D.
    """
    if form != "auto":
        return form
    return "gram" if count * views < 1.5 * dimension * pairs else "cross"


def floor(count: int, dimension: int, lambd: float) -> float:
    """The least value the loss can take for N images and D dimensions.

    C has rank at most N - 1. With all N - 1 non-zero eigenvalues of a symmetric C equal to c,
    L = D (1 - a)^2 + lambd (D^2 a^2 / (N - 1) - D a^2) for diagonal entries a; its
    minimum over a is D k / (1 + k), k = lambd (D / (N - 1) - 1). Zero where D <= N - 1.
    """
    k = max(0.0, lambd * (dimension / (count - 1) - 1))
    return dimension * k / (1 + k)
