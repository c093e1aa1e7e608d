"""How many test images get their class from their nearest neighbours in a table of vectors."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import neighbours
from btpipe.evaluate import labelled
from btpipe.evaluate.labelled import Labels
from btpipe.events import Event, TextTable

KS = (10, 20, 100, 200)
"""As in the literature on self-supervised learning."""
TEMPERATURE = 0.07
Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of `n` test images whose class `k` neighbours name, with its 95 % interval.

    `majority` is what naming the test set's commonest class for every image would give.
    """

    top1: float
    low: float
    high: float
    n: int
    k: int
    majority: float


def accuracy(
    train_vectors: NDArray[np.floating],
    train_labels: NDArray[np.int64],
    test_vectors: NDArray[np.floating],
    test_labels: NDArray[np.int64],
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> Accuracy:
    """Weighted nearest-neighbour accuracy: (n, D), (n,), (m, D), (m,); labels from 0."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    indices, similarities = neighbours.nearest(test_vectors, train_vectors, k)
    scores = neighbours.vote(indices, similarities, train_labels, classes, temperature)
    right = int(np.count_nonzero(scores.argmax(axis=1) == test_labels))
    total = len(test_labels)
    low, high = wilson(right, total)
    majority = float(np.bincount(test_labels).max() / total)
    return Accuracy(right / total, low, high, total, min(k, len(train_labels)), majority)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share: Wilson, JASA 22 (1927) 209-212."""
    share, z2 = right / total, Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(vectors: Path, test: Path, k: int = 20) -> Accuracy:
    """Accuracy on the labelled table `test` by neighbours from the labelled table `vectors`.

    Raises:
        UsageError: no such table, no rows, rows without a label, or a test class that no row of
            `vectors` has; or both are one table.
        RefusedError: the tables were made by two bundles, or their vectors differ in dimension.
        IntegrityError: not a table of vectors.
    """
    train_rows, test_rows = labelled.pair(vectors, test, Labels())
    return accuracy(
        *train_rows.numbered(train_rows.names), *test_rows.numbered(train_rows.names), k
    )


@dataclasses.dataclass(frozen=True)
class Judged(Event):
    """Shares of `n` test images, 0 to 1, for each k: the class is the first, among the first five.

    `intervals1` and `intervals5` are 95 %. `unnamed` images have a class without a neighbour.
    """

    k: tuple[int, ...]
    top1: tuple[float, ...]
    top5: tuple[float, ...]
    intervals1: tuple[tuple[float, float], ...]
    intervals5: tuple[tuple[float, float], ...]
    n: int
    known: int
    classes: int
    majority: float
    unnamed: int
    left_out: int
    temperature: float

    def tables(self) -> list[TextTable]:
        """The shares for people, in per cent."""
        rows = []
        for i, k in enumerate(self.k):
            ones, fives = self.intervals1[i], self.intervals5[i]
            first = f"{100 * self.top1[i]:.1f}", f"{100 * ones[0]:.1f} to {100 * ones[1]:.1f}"
            five = f"{100 * self.top5[i]:.1f}", f"{100 * fives[0]:.1f} to {100 * fives[1]:.1f}"
            rows.append((str(k), *first, *five))
        note = (
            f"{self.n:,} test images by {self.known:,}, {self.classes} classes (the commonest"
            f" {100 * self.majority:.1f} %), cosine, weighted by exp(s / {self.temperature:g})"
        )
        if self.unnamed:
            note += (
                f"; {self.unnamed:,} have a class that no neighbour can name, and count as missed"
            )
        if self.left_out:
            note += f"; {self.left_out:,} rows without a label are left out"
        columns = ("k", "top-1 %", "95 % interval", "top-5 %", "95 % interval")
        return [TextTable("nearest neighbours", columns, tuple(rows), note)]


def judge(
    vectors: Path,
    test: Path | None,
    ks: Sequence[int],
    *,
    labels: Labels = Labels(),
    split: float = 0.2,
    seed: int = 0,
    temperature: float = TEMPERATURE,
) -> Judged:
    """Top-1 and top-5 for several k: on the table `test`, or on a share `split` of `vectors`.

    A class's score is the sum of exp(cosine / temperature) over its neighbours (Wu et al., arXiv
    1805.01978). Neighbours of equal cosine come in the order of their rows, classes of equal score
    in that of their names; a class without a neighbour is never among the five. Which rows are
    judged depends on the seed and on each image's content alone: copies stay on one side.

    Raises:
        UsageError: as `evaluate`; or a split that leaves one side empty.
        RefusedError, IntegrityError: as `evaluate`.
    """
    train_rows, test_rows, left_out = labelled.sides(vectors, test, labels, split, seed)
    names = {
        name: i for i, name in enumerate(sorted(set(train_rows.labels) | set(test_rows.labels)))
    }
    train_vectors, train_labels = train_rows.numbered(names)
    test_vectors, right = test_rows.numbered(names)
    k_values = sorted({min(k, len(train_labels)) for k in ks})
    indices, cosines = neighbours.nearest(test_vectors, train_vectors, k_values[-1])
    counts1, counts5 = [], []
    for k in k_values:
        scores = neighbours.vote(
            indices[:, :k], cosines[:, :k], train_labels, len(names), temperature
        )
        places = ranks(scores, right)
        counts1.append(int(np.count_nonzero(places < 1)))
        counts5.append(int(np.count_nonzero(places < 5)))
    total = len(right)
    return Judged(
        k=tuple(k_values),
        top1=tuple(count / total for count in counts1),
        top5=tuple(count / total for count in counts5),
        intervals1=tuple(wilson(count, total) for count in counts1),
        intervals5=tuple(wilson(count, total) for count in counts5),
        n=total,
        known=len(train_labels),
        classes=len(names),
        majority=float(np.bincount(right).max() / total),
        unnamed=int(np.count_nonzero(~np.isin(right, train_labels))),
        left_out=left_out,
        temperature=temperature,
    )


def ranks(scores: NDArray[np.float64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the right one; more than there are where it has no vote.

    (m, classes), (m,) -> (m,)
    """
    right_scores = scores[np.arange(len(right)), right][:, None]
    earlier = np.arange(scores.shape[1])[None] < right[:, None]
    before = np.count_nonzero(
        (scores > right_scores) | ((scores == right_scores) & earlier), axis=1
    )
    return np.asarray(np.where(right_scores[:, 0] > 0, before, scores.shape[1] + 5), np.int64)
