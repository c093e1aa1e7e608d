"""`eval linear TABLE` beside scikit-learn's logistic regression (it comes with umap-learn)."""

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from btpipe.evaluate import logistic

CLASSES, DIMENSION = 6, 48
NEAR = 0.003
"""What the issue of a linear probe asks for: 0.3 points."""
PROBABILITY = 1e-3


def drawn(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Classes that overlap, in dimensions of very different size."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIMENSION))
    scales = np.geomspace(0.01, 10, DIMENSION)
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    vectors = (0.35 * centres[labels] + random.normal(size=(count, DIMENSION))) * scales
    return vectors.astype(np.float32), labels


def theirs(vectors: NDArray[np.float32], labels: NDArray[np.int64], c: float) -> Pipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=20_000))
        model.fit(vectors.astype(np.float64), labels)
    return model


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
def test_equal_penalties_give_equal_classes(c: float) -> None:
    (vectors, labels), (test, right) = drawn(1500, 1), drawn(3000, 2)
    ours = logistic.fit(vectors, labels, c).probabilities(test)
    other = theirs(vectors, labels, c).predict_proba(test.astype(np.float64))
    assert np.abs(ours - other).max() < PROBABILITY
    hits = [np.mean(probabilities.argmax(axis=1) == right) for probabilities in (ours, other)]
    assert 0.3 < hits[0] < 0.95  # a task on which one can be wrong
    assert abs(hits[0] - hits[1]) < NEAR


def test_the_swept_penalty_is_as_good_as_the_best_of_theirs() -> None:
    (vectors, labels), (test, right) = drawn(1500, 1), drawn(3000, 2)
    held_out = np.random.default_rng(3).random(len(labels)) < 0.2
    swept = logistic.sweep(vectors, labels, held_out)
    ours = np.mean(swept.model.probabilities(test).argmax(axis=1) == right)
    scores = []
    for c in logistic.GRID:
        model = theirs(vectors[~held_out], labels[~held_out], c)
        scores.append(model.score(vectors[held_out].astype(np.float64), labels[held_out]))
    best = logistic.GRID[int(np.argmax(scores))]
    other = theirs(vectors, labels, best).score(test.astype(np.float64), right)
    assert abs(ours - other) < NEAR
