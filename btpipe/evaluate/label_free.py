"""What vectors of two views of the same images say of an encoder, without labels.

All of them are of unit vectors, as cosine sees them, except the rank.
"""

import numpy as np
from numpy.typing import NDArray

from btpipe import neighbours

TEMPERATURE = 2.0
"""t of the uniformity, the published default."""


def alignment(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared distance of the two views of each image: (n, D), (n, D) -> (n,), 0 to 4.

    Their mean is the alignment with alpha = 2 of Wang and Isola (arXiv 2005.10242, eq. 7).
    """
    x, y = (neighbours.normalize(vectors).astype(np.float64) for vectors in (first, second))
    return np.asarray(np.square(x - y).sum(axis=1))


def uniformity(vectors: NDArray[np.floating]) -> float:
    """log of the mean of exp(-2 d^2) over pairs of distinct rows: (n, D) -> -8 to 0.

    d is the distance of two unit vectors: arXiv 2005.10242, eq. 8, with t = 2.
    """
    unit = neighbours.normalize(vectors)
    count, total = len(unit), 0.0
    rows = max(1, neighbours.BLOCK_BYTES // (8 * max(1, count)))
    for start in range(0, count, rows):
        cosines = (unit[start : start + rows] @ unit.T).astype(np.float64)
        diagonal = np.arange(len(cosines))
        cosines[diagonal, start + diagonal] = -np.inf  # exp(-inf) = 0: no row is paired with itself
        total += float(np.exp(2 * TEMPERATURE * (cosines - 1)).sum())
    return float(np.log(total / (count * (count - 1))))


def retrieval(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of each image, in how many of two directions its other view is found: (n, D) twice -> (n,).

    Found: nearest by cosine among the other views of all n images; 0, 0.5 or 1.
    """
    images = np.arange(len(first))
    forward, backward = (
        neighbours.nearest(one, other, 1)[0][:, 0] == images
        for one, other in ((first, second), (second, first))
    )
    return np.asarray((forward.astype(np.float64) + backward) / 2)


def standard_error(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of the difference of two means over the same images: (n,), (n,)."""
    return float(np.std(a - b, ddof=1) / np.sqrt(len(a)))
