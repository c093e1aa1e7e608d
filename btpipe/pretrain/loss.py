"""The Barlow Twins loss and its gradient, in closed form, over the batch of all ranks.

    L = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2        C = Z1' Z2 / N

with Z1, Z2 the embeddings (N, D) of the two views, standardised per dimension over the N images of
the global batch (arXiv 2103.03230, eq. 1 and 2; the published code's `BatchNorm1d(affine=False)`).

The second sum needs no D x D matrix:

    sum_{ij} C_ij^2 = sum_{nm} (Z1 Z1')_nm (Z2 Z2')_nm / N^2

so two N x N Gram matrices do ("gram"), at 8 N^2 D flops for the gradient against 6 N D^2 for the
correlation matrix ("cross"). Both are exact.
"""

import dataclasses
import math
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
Wire = Literal["auto", "bf16"]
Halves = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""sum_ij C_ij^2, the diagonal of C (D,), dL/dz1 and dL/dz2 (n, D)."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What one batch's correlation matrix says, as 0-d tensors on the device, equal on all ranks.

    `off_diagonal` is before `lambd`; `mean_diagonal` is the mean of C_ii; `dead` counts dimensions
    that are constant over the batch in a view.
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
    `own` (n, D) are this rank's rows, `every` (N, D) those of all ranks in rank order, both as the
    network gave them; `mean` and `deviation` (D,), the latter sqrt(variance + EPSILON).
    """

    def __init__(self, z: torch.Tensor) -> None:
        self.own = z.detach()
        self.mean, variance = _moments(self.own)
        self.deviation = (variance + EPSILON).sqrt()
        self.dead = (variance <= DEAD_VARIANCE).sum()
        self._shift, self._scale = self.mean, 1 / self.deviation
        self._first = runtime.rank() * len(z)
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def gather(self, wire: Wire) -> None:
        """Collects the rows of all ranks."""
        if wire == "bf16" and runtime.world_size() > 1 and self.own.dtype.itemsize > 2:
            # Rounded where values are of order 1, and on all ranks alike: the loss stays one.
            self.own = ((self.own - self._shift) * self._scale).to(torch.bfloat16)
            self._shift, self._scale = torch.zeros_like(self.mean), torch.ones_like(self.mean)
        self.every = runtime.gather_rows(self.own)

    def block(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(own rows, all ranks' rows) of these columns: (n, c), (N, c)."""
        if self._whole is not None:
            return self._whole
        every = self._standard(self.every, columns)
        both = every[self._first : self._first + len(self.own)], every
        if columns == slice(0, self.own.shape[1]):
            self._whole = both
        return both

    def block_of_own(self, columns: slice) -> torch.Tensor:
        """This rank's rows of these columns: (n, c)."""
        return self._whole[0] if self._whole else self._standard(self.own, columns)

    def _standard(self, rows: torch.Tensor, columns: slice) -> torch.Tensor:
        return (rows[:, columns] - self._shift[columns]).mul_(self._scale[columns])


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
    own = torch.stack([torch.cat(means), torch.cat(variances)])
    mean, variance = runtime.merge_moments(own).unbind()
    return mean, variance


def _wide(z: torch.Tensor) -> torch.Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _blocks(rows: int, z: torch.Tensor) -> list[slice]:
    """The columns of z in blocks whose `rows` rows of float32 take `BLOCK_BYTES`; 256 or more."""
    dimension = z.shape[1]
    width = max(256, BLOCK_BYTES.get(z.device.type, BLOCK_BYTES["cuda"]) // (4 * rows))
    return [slice(i, min(i + width, dimension)) for i in range(0, dimension, width)]


def value_and_gradient(
    z1: torch.Tensor, z2: torch.Tensor, lambd: float, form: Form, wire: Wire = "auto"
) -> tuple[Terms, torch.Tensor, torch.Tensor]:
    """Loss over the global batch, and its gradient for this rank's rows.

    z1, z2: (n, D) on each rank, N = world_size * n. Returns the terms (equal on all ranks) and
    dL/dz1, dL/dz2, each (n, D) in at least float32: the true gradient of the global loss, to be
    summed over ranks once it has reached the parameters.

    Memory beyond z and its gradient: "gram" two (n, N) matrices and a few blocks of columns, and
    on several ranks the rows of the others; "cross" the (D, D) matrix and two (n, D).
    """
    a, b = Standardised(z1), Standardised(z2)
    halves = _gram(a, b, lambd, wire) if form == "gram" else _cross(a, b, lambd)
    squares, diagonal, gradient_a, gradient_b = halves
    terms = Terms(
        on_diagonal=(1 - diagonal).square().sum(),
        off_diagonal=squares - diagonal.square().sum(),
        mean_diagonal=diagonal.mean(),
        dead=torch.maximum(a.dead, b.dead),
    )
    return terms, gradient_a, gradient_b


def _gram(a: Standardised, b: Standardised, lambd: float, wire: Wire) -> Halves:
    """From (n, N) slices of the two Gram matrices, a block of columns at a time."""
    a.gather(wire)
    b.gather(wire)
    rows, dimension = a.own.shape
    count = rows * runtime.world_size()
    blocks = _blocks(count, a.own)
    rows_a, rows_b = (a.mean.new_zeros(rows, count) for _ in range(2))
    diagonal = torch.empty_like(a.mean)
    for columns in blocks:
        (own_a, every_a), (own_b, every_b) = a.block(columns), b.block(columns)
        rows_a.addmm_(own_a, every_a.T)
        rows_b.addmm_(own_b, every_b.T)
        diagonal[columns] = _column_sums(every_a, every_b) / count
    squares = runtime.all_reduce_sum((rows_a * rows_b).sum()) / count**2
    on_c = _on_diagonal_gradient(diagonal, lambd, count)
    gradients = torch.empty(2, rows, dimension, dtype=a.mean.dtype, device=a.mean.device)
    gradient_a, gradient_b = gradients
    scale = 2 * lambd / count**2
    rows_a *= scale
    rows_b *= scale
    for columns in blocks:
        (own_a, every_a), (own_b, every_b) = a.block(columns), b.block(columns)
        torch.addmm(own_b * on_c[columns], rows_b, every_a, out=gradient_a[:, columns])
        torch.addmm(own_a * on_c[columns], rows_a, every_b, out=gradient_b[:, columns])
    _through_standardise(gradient_a, a, count)
    _through_standardise(gradient_b, b, count)
    return squares, diagonal, gradient_a, gradient_b


def _cross(a: Standardised, b: Standardised, lambd: float) -> Halves:
    """From the (D, D) correlation matrix."""
    whole = slice(0, a.own.shape[1])
    own_a, own_b = a.block_of_own(whole), b.block_of_own(whole)
    count = len(own_a) * runtime.world_size()
    correlation = runtime.all_reduce_sum(own_a.T @ own_b).div_(count)
    diagonal = correlation.diagonal().clone()
    squares = torch.linalg.vector_norm(correlation).square()
    on_c = _on_diagonal_gradient(diagonal, lambd, count)
    scale = 2 * lambd / count
    gradient_a = torch.addmm(own_b * on_c, own_b, correlation.T, alpha=scale)
    gradient_b = torch.addmm(own_a * on_c, own_a, correlation, alpha=scale)
    _through_standardise(gradient_a, a, count)
    _through_standardise(gradient_b, b, count)
    return squares, diagonal, gradient_a, gradient_b


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
        sums[1, columns] = _column_sums(gradient[:, columns], z.block_of_own(columns))
    mean, along = runtime.all_reduce_sum(sums) / count
    for columns in blocks:
        part = gradient[:, columns].sub_(mean[columns])
        part.addcmul_(z.block_of_own(columns), along[columns], value=-1).div_(z.deviation[columns])


def off_diagonal_rms(terms: Terms, dimension: int) -> float:
    """Root mean square of C_ij, i != j: about 1 / sqrt(N) for independent features."""
    pairs = max(1, dimension * (dimension - 1))
    total = float(terms.off_diagonal)
    return math.sqrt(total / pairs) if not total < 0 else 0.0  # rounding; NaN stays NaN


def choose_form(asked: Literal["auto", "gram", "cross"], count: int, dimension: int) -> Form:
    """The cheaper form for N images and D dimensions: 8 N^2 D flops against 6 N D^2."""
    if asked != "auto":
        return asked
    return "gram" if count < 0.75 * dimension else "cross"


def floor(count: int, dimension: int, lambd: float) -> float:
    """The least value the loss can take for N images and D dimensions.

    C has rank at most N - 1. With all N - 1 non-zero eigenvalues of a symmetric C equal to c,
    L = D (1 - a)^2 + lambd (D^2 a^2 / (N - 1) - D a^2) for diagonal entries a; its
    minimum over a is D k / (1 + k), k = lambd (D / (N - 1) - 1). Zero where D <= N - 1.
    """
    k = max(0.0, lambd * (dimension / (count - 1) - 1))
    return dimension * k / (1 + k)
