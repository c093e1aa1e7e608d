"""How many test images get their class from their nearest neighbours in a table of vectors."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe import neighbours
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import Tabled

BUNDLE_KEY = b"btpipe.bundle"
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

    def table(self) -> Tabled:
        """The accuracy for people, in per cent."""
        cells = (f"{100 * self.top1:.1f}", f"{100 * self.low:.1f} to {100 * self.high:.1f}")
        majority = f"{100 * self.majority:.1f}"
        columns = ("top-1 %", "95 % interval", "majority class %")
        note = f"{self.n:,} test images, k = {self.k}, cosine, weighted by exp(s / temperature)"
        return Tabled("nearest neighbours", columns, ((*cells, majority),), note)


def accuracy(
    train_vectors: NDArray[np.floating],
    train_labels: NDArray[np.int64],
    test_vectors: NDArray[np.floating],
    test_labels: NDArray[np.int64],
    k: int = 20,
    temperature: float = 0.07,
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
    known, asked = _read(vectors), _read(test)
    if vectors.samefile(test):
        raise UsageError(
            "each image would be its own neighbour", where=test, expected="a table of other images"
        )
    if known.bundle != asked.bundle:
        raise RefusedError(
            f"vectors of bundle {asked.bundle or 'unknown'}",
            where=test,
            expected=f"those of {known.bundle or 'unknown'}, as in {vectors}",
            fix="embed both with the same --model",
        )
    if known.embeddings.shape[1] != asked.embeddings.shape[1]:
        raise RefusedError(
            f"vectors of {asked.embeddings.shape[1]} numbers",
            where=test,
            expected=f"{known.embeddings.shape[1]}, as in {vectors}",
        )
    names = {name: i for i, name in enumerate(sorted(set(known.labels)))}
    unknown = sorted(set(asked.labels) - set(names))
    if unknown:
        raise UsageError(
            f"classes without one neighbour to name them: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}",
            where=test,
            expected=f"classes of {vectors}: {', '.join(list(names)[:5])}"
            f"{' ...' if len(names) > 5 else ''}",
            fix="give both folders the same class folders",
        )
    return accuracy(
        known.embeddings, _numbers(known, names), asked.embeddings, _numbers(asked, names), k
    )


@dataclasses.dataclass(frozen=True)
class _Table:
    bundle: str
    labels: list[str]
    embeddings: NDArray[np.floating]


def _numbers(table: _Table, names: dict[str, int]) -> NDArray[np.int64]:
    return np.array([names[label] for label in table.labels], dtype=np.int64)


def _read(path: Path) -> _Table:
    """Labels and vectors of a table, and the digest of the bundle that made them."""
    if not path.is_file():
        raise UsageError("no such table of vectors", where=path, fix="make it: btpipe embed")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            bundle = (file.schema_arrow.metadata or {}).get(BUNDLE_KEY, b"").decode()
            table = file.read(columns=["label", "embedding"])
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"cannot be read: {error}", where=path) from error
    if set(table.column_names) != {"label", "embedding"} or not pa.types.is_fixed_size_list(
        table.schema.field("embedding").type
    ):
        raise IntegrityError(
            "is not a table of vectors", where=path, expected="made by btpipe embed"
        )
    if table.num_rows == 0:
        raise UsageError("holds no vectors", where=path, fix="embed a folder with images")
    if table["label"].null_count:
        raise UsageError(
            f"{table['label'].null_count} of {table.num_rows} rows have no label",
            where=path,
            fix="embed a folder with one folder of images for each class",
        )
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return _Table(bundle, table["label"].to_pylist(), flat.reshape(table.num_rows, -1))
