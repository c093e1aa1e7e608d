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
from typing import Literal

import torch

from btpipe import runtime

EPSILON = 1e-5  # of the published code's batch norm on the embeddings
Form = Literal["gram", "cross"]


@dataclasses.dataclass(frozen=True)
class Terms:
    """Values of one batch, as 0-d tensors on the device; `off_diagonal` is before `lambd`."""

    on_diagonal: torch.Tensor
    off_diagonal: torch.Tensor

    def total(self, lambd: float) -> torch.Tensor:
        """on_diagonal + lambd * off_diagonal."""
        return self.on_diagonal + lambd * self.off_diagonal


@dataclasses.dataclass(frozen=True)
class Standardised:
    """Embeddings of one view with zero mean and unit variance per dimension over all ranks' rows.

    `own` (n, D) are this rank's rows, `every` (N, D) those of all ranks in rank order,
    `deviation` (D,) is sqrt(variance + EPSILON).
    """

    own: torch.Tensor
    every: torch.Tensor
    deviation: torch.Tensor


def standardise(z: torch.Tensor) -> Standardised:
    """(n, D) per rank -> standardised over the N = world_size * n rows, in at least float32."""
    wide = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    rows = runtime.gather_rows(wide)
    variance, mean = torch.var_mean(rows, 0, correction=0)
    deviation = (variance + EPSILON).sqrt()
    every = (rows - mean) / deviation
    first = runtime.rank() * len(wide)
    return Standardised(every[first : first + len(wide)], every, deviation)


def value_and_gradient(
    z1: torch.Tensor, z2: torch.Tensor, lambd: float, form: Form
) -> tuple[Terms, torch.Tensor, torch.Tensor]:
    """Loss over the global batch, and its gradient for this rank's rows.

    z1, z2: (n, D) on each rank, N = world_size * n. Returns the terms (equal on all ranks) and
    dL/dz1, dL/dz2, each (n, D) in at least float32: the true gradient of the global loss, to be
    summed over ranks once it has reached the parameters.
    """
    a, b = standardise(z1), standardise(z2)
    count = len(a.every)
    diagonal = (a.every * b.every).sum(0) / count
    if form == "gram":
        squares, gradient_a, gradient_b = _gram(a, b)
    else:
        squares, gradient_a, gradient_b = _cross(a, b)
    on_diagonal = (1 - diagonal).square().sum()
    off_diagonal = squares - diagonal.square().sum()
    # dL/dC_ii is -2 (1 - C_ii); the redundancy term's own diagonal is taken out again.
    on_c = (-2 * (1 - diagonal) - 2 * lambd * diagonal) / count
    gradient_a = gradient_a.mul_(lambd).addcmul_(b.own, on_c)
    gradient_b = gradient_b.mul_(lambd).addcmul_(a.own, on_c)
    terms = Terms(on_diagonal, off_diagonal)
    return terms, _through_standardise(gradient_a, a), _through_standardise(gradient_b, b)


def _gram(a: Standardised, b: Standardised) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_ij C_ij^2 and its gradients for own rows, from (n, N) slices of the Gram matrices."""
    count = len(a.every)
    rows_a, rows_b = a.own @ a.every.T, b.own @ b.every.T
    squares = runtime.all_reduce_sum((rows_a * rows_b).sum()) / count**2
    scale = 2 / count**2
    return squares, (rows_b @ a.every).mul_(scale), (rows_a @ b.every).mul_(scale)


def _cross(a: Standardised, b: Standardised) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_ij C_ij^2 and its gradients for own rows, from the (D, D) correlation matrix."""
    count = len(a.every)
    correlation = runtime.all_reduce_sum(a.own.T @ b.own).div_(count)
    squares = correlation.square().sum()
    scale = 2 / count
    return squares, (b.own @ correlation.T).mul_(scale), (a.own @ correlation).mul_(scale)


def _through_standardise(gradient: torch.Tensor, z: Standardised) -> torch.Tensor:
    """Gradient (n, D) for standardised rows -> gradient for the rows before standardisation."""
    count = len(z.every)
    sums = torch.stack([gradient.sum(0), (gradient * z.own).sum(0)])
    mean, along = runtime.all_reduce_sum(sums) / count
    return gradient.sub_(mean).addcmul_(z.own, along, value=-1).div_(z.deviation)


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
