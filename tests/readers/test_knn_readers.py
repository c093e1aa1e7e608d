"""`eval knn` beside scikit-learn's neighbours, to the last image (it comes with umap-learn)."""

from pathlib import Path

import numpy as np
import pytest
import vector_table
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from btpipe.evaluate import knn

CLASSES, DIMENSION = 7, 24


def drawn(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIMENSION))
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    vectors = 0.5 * centres[labels] + random.normal(size=(count, DIMENSION))
    return vectors.astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_the_same_images_are_named_rightly(tmp_path: Path, k: int) -> None:
    (train, labels), (test, right) = drawn(1200, 1), drawn(800, 2)
    first, second = (
        vector_table.write(tmp_path / name, vectors, labels=[str(n) for n in numbers])
        for name, vectors, numbers in (("k.parquet", train, labels), ("a.parquet", test, right))
    )
    ours = knn.judge(first, second, [k])
    theirs = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / knn.TEMPERATURE),
    ).fit(train.astype(np.float64), labels)
    shares = theirs.predict_proba(test.astype(np.float64))
    assert round(ours.top1[0] * 800) == np.count_nonzero(shares.argmax(axis=1) == right)
    assert 0.2 < ours.top1[0] < 0.95  # a task on which one can be wrong
