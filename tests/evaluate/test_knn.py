"""Nearest-neighbour accuracy: the number, its interval, and tables that must not be compared."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from btpipe.errors import BtpipeError, IntegrityError, RefusedError, UsageError
from btpipe.evaluate import knn

ROUNDED = 5e-4
"""The interval is compared with published values of three digits."""

Vectors = NDArray[np.float32]


def clouds(classes: int, each: int, spread: float, seed: int) -> tuple[Vectors, NDArray[np.int64]]:
    """Vectors around `classes` axes of a space of 8 dimensions, with their class numbers."""
    labels = np.repeat(np.arange(classes), each)
    noise = np.random.default_rng(seed).normal(size=(len(labels), 8)) * spread
    return (np.eye(8)[labels] + noise).astype(np.float32), labels


def write(path: Path, labels: list[str | None], vectors: Vectors, bundle: str = "b" * 64) -> Path:
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    schema = pa.schema(
        [("label", pa.string()), ("embedding", embedding.type)],
        metadata={"btpipe.bundle": bundle},
    )
    pq.write_table(pa.table([pa.array(labels, pa.string()), embedding], schema=schema), path)
    return path


def refusal(kind: type[BtpipeError], vectors: Path, test: Path) -> str:
    with pytest.raises(kind) as caught:
        knn.evaluate(vectors, test, 3)
    return str(caught.value)


def test_separate_clouds_are_told_apart_and_noise_is_not() -> None:
    tight = knn.accuracy(*clouds(8, 30, 0.1, 1), *clouds(8, 20, 0.1, 2))
    assert (tight.top1, tight.n, tight.k) == (1.0, 160, 20)
    loose = knn.accuracy(*clouds(8, 30, 100.0, 1), *clouds(8, 20, 100.0, 2))
    assert loose.low < 1 / 8 < loose.high
    assert loose.majority == 1 / 8


def test_one_near_neighbour_outvotes_two_far_ones() -> None:
    angles = np.radians([0, 40, 40])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    test, right = np.array([[1.0, 0.0]]), np.array([0])
    by_weight = knn.accuracy(train, np.array([0, 1, 1]), test, right, k=3)
    assert by_weight.top1 == 1  # exp(-0.234 / 0.07) = 0.035 each
    by_count = knn.accuracy(train, np.array([0, 1, 1]), test, right, k=3, temperature=1.0)
    assert by_count.top1 == 0


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    assert knn.wilson(right, total) == pytest.approx((low, high), abs=ROUNDED)
    assert knn.wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=ROUNDED)


def test_two_tables_give_the_accuracy_of_their_vectors(tmp_path: Path) -> None:
    (train, train_labels), (test, test_labels) = clouds(4, 30, 0.5, 1), clouds(4, 20, 0.5, 2)
    names = ["bee", "ant", "fly", "moth"]
    train_table = write(tmp_path / "train.parquet", [names[i] for i in train_labels], train)
    test_table = write(tmp_path / "test.parquet", [names[i] for i in test_labels], test)
    expected = knn.accuracy(train, train_labels, test, test_labels, 7)
    assert knn.evaluate(train_table, test_table, 7) == expected
    assert expected.low < expected.top1 < expected.high
    assert math.isclose(expected.majority, 1 / 4)


def test_vectors_of_two_bundles_are_never_compared(tmp_path: Path) -> None:
    vectors = np.eye(3, dtype=np.float32)
    first = write(tmp_path / "a.parquet", ["x", "y", "x"], vectors)
    second = write(tmp_path / "b.parquet", ["x", "y", "x"], vectors, bundle="c" * 64)
    message = refusal(RefusedError, first, second)
    assert "b" * 64 in message
    assert "c" * 64 in message


def test_vectors_of_two_dimensions_are_never_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", ["x"], np.ones((1, 3), np.float32))
    second = write(tmp_path / "b.parquet", ["x"], np.ones((1, 4), np.float32))
    assert "vectors of 4 numbers" in refusal(RefusedError, first, second)


def test_a_table_is_not_compared_with_itself(tmp_path: Path) -> None:
    table = write(tmp_path / "a.parquet", ["x", "y"], np.eye(2, dtype=np.float32))
    assert "its own neighbour" in refusal(UsageError, table, table)


def test_rows_without_a_label_are_counted_and_refused(tmp_path: Path) -> None:
    vectors = np.eye(3, dtype=np.float32)
    full = write(tmp_path / "a.parquet", ["x", "y", "x"], vectors)
    holes = write(tmp_path / "b.parquet", ["x", None, None], vectors)
    assert "2 of 3 rows have no label" in refusal(UsageError, full, holes)
    assert "2 of 3 rows have no label" in refusal(UsageError, holes, full)


def test_a_class_that_nothing_was_seen_of_is_named(tmp_path: Path) -> None:
    vectors = np.eye(2, dtype=np.float32)
    train = write(tmp_path / "a.parquet", ["x", "y"], vectors)
    test = write(tmp_path / "b.parquet", ["x", "zebra"], vectors)
    assert "zebra" in refusal(UsageError, train, test)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "a.parquet", ["x"], np.ones((1, 3), np.float32))
    assert "no such table" in refusal(UsageError, good, tmp_path / "none.parquet")
    empty = write(tmp_path / "b.parquet", [], np.empty((0, 3), np.float32))
    assert "holds no vectors" in refusal(UsageError, good, empty)
    wild = write(
        tmp_path / "w.parquet", ["x", "x"], np.array([[1, 1, 1], [np.inf, 1, 1]], np.float32)
    )
    assert "the first is row 1" in refusal(IntegrityError, good, wild)
    (tmp_path / "c.parquet").write_text("a,b\n1,2\n")
    assert "cannot be read" in refusal(IntegrityError, good, tmp_path / "c.parquet")
    pq.write_table(pa.table({"label": ["x"]}), tmp_path / "d.parquet")
    assert "not a table of vectors" in refusal(IntegrityError, good, tmp_path / "d.parquet")
