"""Nearest neighbours by cosine, their vote, and the effective rank of vectors. numpy only."""

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 64 * 2**20
"""What one block of similarities may take; the base is never compared with all queries at once."""


def normalize(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length 1: (n, D) -> (n, D). A row of zeros stays zero."""
    wide = np.asarray(vectors, dtype=np.float32)
    # Squares of large float32 values overflow where the values do not.
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    scaled = wide / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def nearest(
    queries: NDArray[np.floating], base: NDArray[np.floating], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The rows of `base` with the largest cosines: (m, D), (n, D) -> (m, k) indices and cosines.

    Sorted by falling cosine, ties by the lower index; k is cut to n. Beyond inputs and outputs it
    takes three blocks of `BLOCK_BYTES`, whatever m and n are.
    """
    k = min(k, len(base))
    unit_queries, unit_base = normalize(queries), normalize(base)
    indices = np.empty((len(queries), k), dtype=np.int64)
    similarities = np.empty((len(queries), k), dtype=np.float32)
    rows = max(1, BLOCK_BYTES // (4 * max(1, len(base))))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        cosines = unit_queries[block] @ unit_base.T
        indices[block], similarities[block] = largest(cosines, k)
    return indices, similarities


def largest(values: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices and values of the k largest of each row, falling, ties by the lower index.

    (m, n) -> (m, k) twice; k is at most n.
    """
    if k == 0:
        return np.empty((len(values), 0), np.int64), np.empty((len(values), 0), np.float32)
    threshold = np.partition(values, -k, axis=1)[:, -k, None]
    mask = values >= threshold
    surplus = np.count_nonzero(mask, axis=1) - k
    for row in np.flatnonzero(surplus):  # equal to the k-th value, but there is no room for all
        equal = np.flatnonzero(values[row] == threshold[row])
        mask[row, equal[-surplus[row] :]] = False
    columns = np.nonzero(mask)[1].reshape(len(values), k)
    chosen = np.take_along_axis(values, columns, axis=1)
    order = np.argsort(-chosen, axis=1, kind="stable")
    return (
        np.take_along_axis(columns, order, axis=1).astype(np.int64),
        np.take_along_axis(chosen, order, axis=1),
    )


def vote(
    indices: NDArray[np.int64],
    similarities: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    temperature: float = 0.07,
) -> NDArray[np.float64]:
    """Score of each class, the sum of exp(s / T) over its neighbours: (m, k) -> (m, classes).

    `labels` (n,) are the base's. The vote of Wu et al. (arXiv 1805.01978, section 3.4; T = 0.07
    there), divided by each row's largest weight, so that nothing overflows.
    """
    top = similarities.max(axis=1, keepdims=True, initial=-1)
    weights = np.exp((similarities.astype(np.float64) - top) / temperature)
    scores = np.zeros((len(indices), classes))
    rows = np.broadcast_to(np.arange(len(indices))[:, None], indices.shape)
    np.add.at(scores, (rows, labels[indices]), weights)
    return scores


def leave_one_out(
    vectors: NDArray[np.floating], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The other rows with the largest cosines: (n, D) -> (n, k) indices and cosines.

    As `nearest`, but no row is its own neighbour; k is cut to n - 1.
    """
    indices, similarities = nearest(vectors, vectors, k + 1)
    others = indices != np.arange(len(vectors))[:, None]
    others[others.all(axis=1), -1:] = False  # more than k copies of a row come before itself
    shape = len(vectors), max(0, indices.shape[1] - 1)
    return indices[others].reshape(shape), similarities[others].reshape(shape)


def effective_rank(vectors: NDArray[np.floating]) -> float:
    """RankMe: exp of the entropy of the singular values' shares, (n, D) -> 1 to min(n, D).

    Garrido et al., arXiv 2210.02885, eq. 1 and 2: vectors as they are, not centred. 0 when
    all of them are zero. As exact as `effective_rank_of_gram`.
    """
    wide = np.asarray(vectors, dtype=np.float64)
    return effective_rank_of_gram(wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide)


def effective_rank_of_gram(gram: NDArray[np.float64]) -> float:
    """`effective_rank` from the smaller of X X' and X' X in float64: (m, m), m = min(n, D).

    The singular values are the roots of its eigenvalues: 20 to 40 times faster than a decomposition
    of X. Eigenvalues are known to about m eps of the largest; below that they are noise and taken
    as 0, which changes the result by less than 1 % at m = 1024 (in practice by less than 1e-6 where
    no singular value is under a millionth of the largest).
    """
    eigenvalues = np.linalg.eigvalsh(gram)
    noise = len(gram) * np.finfo(np.float64).eps * eigenvalues.max(initial=0)
    singular = np.sqrt(eigenvalues[eigenvalues > noise])
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
