"""Vectors as points of a plane, and groups of them that lie together."""

import numpy as np
from numpy.typing import NDArray

from btpipe import neighbours
from btpipe.errors import UsageError

BLOCK_ROWS = 8192
UMAP_DIMENSIONS = 50
"""Principal components that UMAP sees, as its authors advise for long vectors."""
UMAP_NEIGHBOURS = 15
UMAP_DISTANCE = 0.1
"""UMAP's own defaults (arXiv 1802.03426)."""
CLUSTER_ROUNDS = 25
CLUSTER_SAMPLE = 20_000
"""Rows that k-means learns its centres from."""

Floats = NDArray[np.floating]


def principal(vectors: Floats, count: int) -> NDArray[np.float32]:
    """The first principal components of rows of length 1: (n, D) -> (n, count).

    Each one's sign is such that its largest weight is positive: the same vectors, the same map.
    """
    dimension = vectors.shape[1]
    mean, square = np.zeros(dimension), np.zeros((dimension, dimension))
    for block in _blocks(vectors):
        mean += block.sum(axis=0, dtype=np.float64)
        square += block.T @ block
    mean /= max(1, len(vectors))
    covariance = square / max(1, len(vectors)) - np.outer(mean, mean)
    _, axes = np.linalg.eigh(covariance)
    axes = axes[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    parts = [(block - mean) @ axes for block in _blocks(vectors)]
    projection = np.concatenate(parts) if parts else np.zeros((0, axes.shape[1]))
    wide = np.zeros((len(vectors), count), np.float32)
    wide[:, : projection.shape[1]] = projection
    return wide


def umap(vectors: Floats, seed: int = 0) -> NDArray[np.float32]:
    """UMAP of the first 50 principal components: (n, D) -> (n, 2), the same every time.

    Raises:
        UsageError: umap-learn is not installed, or there are too few rows for a neighbourhood.
    """
    try:
        from umap import UMAP  # noqa: PLC0415 - an extra, and slow to load
    except ImportError as error:
        fix = "pip install 'btpipe[map]', or take the map of principal components: --by pca"
        raise UsageError("--by umap needs umap-learn", fix=fix) from error
    if len(vectors) <= UMAP_NEIGHBOURS:
        raise UsageError(f"{len(vectors)} vectors are too few for UMAP", fix="--by pca")
    reduced = principal(vectors, min(UMAP_DIMENSIONS, vectors.shape[1]))
    model = UMAP(
        n_neighbors=UMAP_NEIGHBOURS,
        min_dist=UMAP_DISTANCE,
        metric="cosine",
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(model.fit_transform(reduced), np.float32)


def clusters(points: NDArray[np.float32], count: int, seed: int = 0) -> NDArray[np.int64]:
    """k-means with k-means++ starts: (n, d) -> (n,) numbers, 0 the largest cluster."""
    count = min(count, len(points))
    if count == 0:
        return np.zeros(0, np.int64)
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(points))[:CLUSTER_SAMPLE]
    sample = points[np.sort(chosen)]
    centres = _starts(sample, count, random)
    for _ in range(CLUSTER_ROUNDS):
        nearest = _nearest(sample, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        sizes = np.bincount(nearest, minlength=count)
        moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
        if np.allclose(moved, centres, atol=1e-6):
            break
        centres = moved.astype(np.float32)
    numbers = _nearest(points, centres)
    order = np.argsort(-np.bincount(numbers, minlength=count), kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    return rank[numbers]


def _starts(
    points: NDArray[np.float32], count: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007): far points are likelier centres."""
    centres = [points[random.integers(len(points))]]
    nearest = np.square(points - centres[0]).sum(axis=1)
    for _ in range(count - 1):
        total = float(nearest.sum(dtype=np.float64))
        share = nearest.astype(np.float64) / total if total > 0 else None
        centres.append(points[random.choice(len(points), p=share)])
        nearest = np.minimum(nearest, np.square(points - centres[-1]).sum(axis=1))
    return np.stack(centres)


def _nearest(points: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    lengths = np.square(centres).sum(axis=1)
    return np.asarray((lengths - 2 * points @ centres.T).argmin(axis=1), np.int64)


def _blocks(vectors: Floats) -> list[NDArray[np.float32]]:
    starts = range(0, len(vectors), BLOCK_ROWS)
    return [neighbours.normalize(vectors[start : start + BLOCK_ROWS]) for start in starts]
