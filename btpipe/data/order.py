"""The order of the images of an epoch, as a pure function of (seed, epoch): position -> image.

A Feistel network over pairs (a, b) with a * b slightly above the number of images, whose round
functions are Philox words, permutes positions; the few that fall outside walk on until they are
inside. Any slice costs the same wherever it starts, and nothing of an epoch's length is held.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

from btpipe.data.params import key_of, philox

ROUNDS = 12
_ORDER_TAG, _REPLACEMENT_TAG = 0xFF000000, 0xFE000000
"""The top byte of Philox's third counter: above every view number, so that no words are shared."""


def permutation(seed: int, epoch: int, count: int, start: int, stop: int) -> NDArray[np.int64]:
    """The images at positions [start, stop) of an epoch over `count` images: (stop - start,)."""
    assert 0 <= start <= stop <= count
    positions = np.arange(start, stop, dtype=np.int64)
    images = _permute(positions, seed, epoch, count)
    while len(outside := np.flatnonzero(images >= count)):
        images[outside] = _permute(images[outside], seed, epoch, count)
    return images


def replacement(seed: int, epoch: int, image: int, attempt: int, count: int) -> int:
    """The image that stands in for an unreadable one; `attempt` counts stand-ins that failed."""
    counter = np.array(
        [[image & 0xFFFFFFFF, epoch, _REPLACEMENT_TAG | image >> 32, attempt]], dtype=np.uint32
    )
    high, low = (int(word) for word in philox(counter, key_of(seed))[0, :2])
    return (high << 32 | low) * count >> 64


def _permute(positions: NDArray[np.int64], seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """One pass over the domain of a * b >= count positions."""
    a, b = _sides(count)
    left, right = np.divmod(positions, b)
    for number, table in enumerate(_tables(seed, epoch, count)):
        if number % 2 == 0:
            left = (left + table[right]) % a
        else:
            right = (right + table[left]) % b
    return np.asarray(left * b + right)


def _sides(count: int) -> tuple[int, int]:
    b = max(math.isqrt(max(count - 1, 0)) + 1, 2)
    return max(-(-count // b), 2), b


@functools.lru_cache(maxsize=4)
def _tables(seed: int, epoch: int, count: int) -> list[NDArray[np.int64]]:
    """The round functions, tabulated: about sqrt(count) entries each."""
    a, b = _sides(count)
    counter = np.zeros((ROUNDS, max(a, b), 4), dtype=np.uint32)
    counter[..., 0] = np.arange(max(a, b))
    counter[..., 1], counter[..., 2] = epoch, _ORDER_TAG
    counter[..., 3] = np.arange(ROUNDS)[:, None]
    words = philox(counter.reshape(-1, 4), key_of(seed))[:, 0].reshape(ROUNDS, -1).astype(np.uint64)
    modulus = np.array([a, b], dtype=np.uint64)[np.arange(ROUNDS) % 2, None]
    return list((words * modulus >> np.uint64(32)).astype(np.int64))
