"""Multinomial logistic regression with a swept L2 penalty, on vectors that fit in memory.

Minimises, over weights W (D, K) and biases b (K,) of vectors x standardised by the training rows,

    C sum_i -log softmax(x_i W + b)[y_i] + 1/2 |W|^2

which is scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C=C))`; biases are free.
For two classes that is one weight vector w = W[:, 1] - W[:, 0] with 1/2 |w|^2: here |W|^2.

In float64, since the line search compares losses that differ in the tenth digit. The penalty is the
same in any rotated basis, so the rows are turned to their principal axes once; there each weight's
curvature is known from one product, and scaling by it leaves L-BFGS a fifth of its steps.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

GRID = tuple(float(10.0 ** (half / 2)) for half in range(-10, 5))
"""C from 1e-5 to 100, two a decade. On encoders' vectors the best one was 0.03 to 0.3."""
WORSE = 4
"""The sweep ends when so many Cs in a row, two decades, name fewer held-out rows than the best."""
GRADIENT = 1e-6
"""Largest entry of the mean loss's gradient, in units of the curvature, at which a minimum counts
as found: on real vectors probabilities were then within 1e-4 of scikit-learn's up to C 0.03, within
3e-3 up to C 3, and named the same classes."""
SWEEP_GRADIENT = 1e-4
"""The same while C is swept, in half the time: on real vectors it chose the same C as 1e-5."""
STEPS = 1000
HISTORY = 30
SMALL = 2**22
"""Numbers in the vectors, 8,192 rows of 512: below it threads wait for each other longer than they
work, on a busy machine 12 CPU-seconds in place of 0.3."""
_BLOCK_BYTES = 32 * 2**20

OnSweep = Callable[[int, int], None]
"""Called with the penalties done and in all."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights for standardised vectors: `mean`, `scale` (D,), `weights` (D, K), `biases` (K,)."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    biases: NDArray[np.float64]
    converged: bool

    def probabilities(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """(m, D) -> (m, K), rows sum to 1."""
        shares = np.empty((len(vectors), len(self.biases)))
        for block in _blocks(len(vectors), vectors.shape[1]):
            standard = (vectors[block].astype(np.float64) - self.mean) / self.scale
            logits = standard @ self.weights + self.biases
            raised = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares[block] = raised / raised.sum(axis=1, keepdims=True)
        return shares


@dataclasses.dataclass(frozen=True)
class Swept:
    """The model of the C that names most held-out rows; `right` are their shares, C by C."""

    model: Model
    c: float
    grid: tuple[float, ...]
    right: tuple[float, ...]

    @property
    def at_end(self) -> bool:
        """Whether the best C is the grid's first or last: a better one may lie beyond."""
        return self.c in (self.grid[0], self.grid[-1])


def fit(vectors: NDArray[np.floating], labels: NDArray[np.int64], c: float) -> Model:
    """The minimum for one C: (n, D), (n,) with every class from 0 to K - 1 there, K at least 2."""
    with _threads(vectors.size):
        turned = _turn(vectors)
        return turned.model(_minimum(turned.rows, labels, c, None, GRADIENT))


def sweep(
    vectors: NDArray[np.floating],
    labels: NDArray[np.int64],
    held_out: NDArray[np.bool_],
    grid: Sequence[float] = GRID,
    on_progress: OnSweep = lambda _done, _total: None,
) -> Swept:
    """Fits the rows that are not held out, for each C, and judges by those that are; fits all rows
    by the best C.

    (n, D), (n,), (n,); `grid` rises. Of equally good Cs the smallest is taken. From the strongest
    penalty on, each starts where the one before ended. Means, scales, axes are those of all rows.
    """
    with _threads(vectors.size):
        return _sweep(vectors, labels, held_out, tuple(grid), on_progress)


def _sweep(
    vectors: NDArray[np.floating],
    labels: NDArray[np.int64],
    held_out: NDArray[np.bool_],
    grid: tuple[float, ...],
    on_progress: OnSweep,
) -> Swept:
    order = np.argsort(held_out, kind="stable")
    turned = _turn(vectors[order])
    ordered, first = labels[order], int(np.count_nonzero(~held_out))
    present, fitted = np.unique(ordered[:first], return_inverse=True)
    judged = torch.from_numpy(np.searchsorted(present, ordered[first:]))
    has_class = torch.from_numpy(np.isin(ordered[first:], present))
    at, right = None, list[float]()
    for done, c in enumerate(grid):
        at = _minimum(turned.rows[:first], fitted, c, at, SWEEP_GRADIENT)
        hits = ((turned.rows[first:] @ at.weights).argmax(dim=1) == judged) & has_class
        right.append(int(hits.sum()) / len(hits))
        on_progress(done + 1, len(grid) + 1)
        if len(right) > WORSE and max(right[-WORSE:]) < max(right):
            break
    best = grid[int(np.argmax(right))]
    model = turned.model(_minimum(turned.rows, ordered, best, None, GRADIENT))
    on_progress(len(grid) + 1, len(grid) + 1)
    return Swept(model, best, grid, tuple(right))


@contextlib.contextmanager
def _threads(size: int) -> Iterator[None]:
    """One thread for small vectors, inside."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if size < SMALL else before)
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class _Minimum:
    """Weights (r + 1, K) in the turned basis, the biases last."""

    weights: torch.Tensor
    converged: bool


@dataclasses.dataclass(frozen=True)
class _Turned:
    """Standardised rows in the basis `axes` (D, r) of their principal axes, and a column of 1."""

    rows: torch.Tensor
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    axes: torch.Tensor

    def model(self, at: _Minimum) -> Model:
        """The minimum in the basis of the vectors."""
        weights = (self.axes @ at.weights[:-1]).numpy()
        return Model(self.mean, self.scale, weights, at.weights[-1].numpy(), at.converged)


def _turn(vectors: NDArray[np.floating]) -> _Turned:
    """(n, D) -> (n, r + 1): a rank r below D loses nothing, the minimum lies in the rows' span."""
    n, dimension = vectors.shape
    mean, scale = _spread(vectors)
    gram = torch.zeros(dimension, dimension, dtype=torch.float64)
    for block in _blocks(n, dimension):
        part = torch.from_numpy((vectors[block].astype(np.float64) - mean) / scale)
        gram += part.T @ part
    values, axes = torch.linalg.eigh(gram / n)
    axes = axes[:, values > dimension * torch.finfo(torch.float64).eps * values.max()]
    rows = torch.ones(n, axes.shape[1] + 1, dtype=torch.float64)
    for block in _blocks(n, dimension):
        part = torch.from_numpy((vectors[block].astype(np.float64) - mean) / scale)
        rows[block, :-1] = part @ axes
    return _Turned(rows, mean, scale, axes)


def _spread(vectors: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each dimension; a constant one is only centred.

    Constant is what rounding alone explains, as in scikit-learn's StandardScaler.
    """
    n = len(vectors)
    mean = vectors.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for block in _blocks(n, vectors.shape[1]):
        squares += ((vectors[block].astype(np.float64) - mean) ** 2).sum(axis=0)
    variance = squares / n
    eps = np.finfo(np.float64).eps
    constant = variance <= n * eps * variance + (n * mean * eps) ** 2
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def _minimum(
    rows: torch.Tensor,
    labels: NDArray[np.int64],
    c: float,
    start: _Minimum | None,
    tolerance: float,
) -> _Minimum:
    """L-BFGS (Nocedal and Wright, algorithm 7.5) on weights scaled by their curvature at the start.

    Where the loss curves by h and the penalty by p, the unit is 1 / sqrt(h + p).
    """
    targets = torch.from_numpy(np.ascontiguousarray(labels))
    counts = torch.bincount(targets).double()
    penalty = torch.full((rows.shape[1], 1), (2 if len(counts) == 2 else 1) / (c * len(rows)))
    penalty = penalty.double()
    penalty[-1] = 0
    if start is None:
        begin = torch.zeros(rows.shape[1], len(counts), dtype=torch.float64)
        begin[-1] = (counts / counts.sum()).log()
    else:
        begin = start.weights
    unit = (_curvature(rows, begin) + penalty).rsqrt()
    scaled = torch.nn.Parameter(begin / unit)
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=STEPS,
        max_eval=2 * STEPS,
        tolerance_grad=tolerance,
        tolerance_change=1e-15,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        weights = scaled.detach() * unit
        loss, gradient = _loss(rows, targets, weights)
        scaled.grad = (gradient + penalty * weights) * unit
        return loss + float((penalty * weights**2).sum()) / 2

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert scaled.grad is not None
    return _Minimum(scaled.detach() * unit, float(scaled.grad.abs().max()) <= tolerance)


def _loss(
    rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy and its gradient, (n, r + 1), (n,), (r + 1, K) -> (r + 1, K)."""
    loss, gradient = 0.0, torch.zeros_like(weights)
    for block in _blocks(len(rows), max(weights.shape)):
        part = rows[block]
        logarithms = torch.log_softmax(part @ weights, dim=1)
        at = targets[block, None]
        loss -= float(logarithms.gather(1, at).sum())
        errors = logarithms.exp_()
        errors.scatter_add_(1, at, torch.full(at.shape, -1.0, dtype=torch.float64))
        gradient.addmm_(part.T, errors)
    return loss / len(rows), gradient / len(rows)


def _curvature(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The diagonal of the mean loss's second derivative: mean of x^2 p (1 - p), (r + 1, K).

    At least 1e-6 of the largest: a class that nothing is near to would be given endless steps.
    """
    curvature = torch.zeros_like(weights)
    for block in _blocks(len(rows), max(weights.shape)):
        part = rows[block]
        shares = torch.softmax(part @ weights, dim=1)
        curvature.addmm_((part**2).T, shares * (1 - shares))
    curvature /= len(rows)
    return curvature.clamp_min(1e-6 * float(curvature.max()))


def _blocks(n: int, width: int) -> list[slice]:
    """Slices of rows, so that a block of `width` float64 numbers a row stays small."""
    rows = max(1, _BLOCK_BYTES // (8 * width))
    return [slice(start, start + rows) for start in range(0, n, rows)]
