"""The order of the images of an epoch, as a pure function of (seed, epoch): position -> image.

A Feistel network over pairs (a, b) with a * b slightly above the number of images, whose round
functions are Philox words, permutes positions; the few that fall outside walk on until they are
inside. Any slice costs the same wherever it starts, and nothing of an epoch's length is held.

`blocks` is the order for tar shards on slow storage: stretches of consecutive images are permuted,
and the images of several stretches are mixed. Its stretches begin elsewhere in each epoch.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

from btpipe.data.pipeline.augment_params import key_of, philox

ROUNDS = 12
_ORDER_TAG, _REPLACEMENT_TAG = 0xFF000000, 0xFE000000
_BLOCK_TAG, _POOL_TAG, _SHIFT_TAG = 0xFD000000, 0xFC000000, 0xFB000000
"""The top byte of Philox's third counter: above every view number, so that no words are shared."""


def permutation(seed: int, epoch: int, count: int, start: int, stop: int) -> NDArray[np.int64]:
    """The images at positions [start, stop) of an epoch over `count` images: (stop - start,)."""
    assert 0 <= start <= stop <= count
    return _permute(np.arange(start, stop, dtype=np.int64), seed, epoch, _ORDER_TAG, count)


def blocks(
    seed: int,
    epoch: int,
    count: int,
    start: int,
    stop: int,
    *,
    block_images: int,
    mixed_blocks: int,
) -> NDArray[np.int64]:
    """`permutation` that stays in few places: (stop - start,).

    Blocks of `block_images` consecutive images, counted from an image that each epoch chooses, are
    permuted; each `mixed_blocks` of them, one after the other, are a pool that is permuted again.
    What does not fill a block comes last, so it is another stretch of images in every epoch.
    """
    assert 0 <= start <= stop <= count
    whole, pool_images = count // block_images, block_images * mixed_blocks
    shift = _below(count, seed, np.array([[0, epoch, _SHIFT_TAG, 0]], dtype=np.uint32))
    parts = [np.zeros(0, dtype=np.int64)]
    for pool in range(start // pool_images, -(-stop // pool_images)):
        begin = pool * pool_images
        length = min(pool_images, count - begin)
        local = np.arange(max(start - begin, 0), min(stop - begin, length), dtype=np.int64)
        mixed = begin + _permute(local, seed, epoch, _POOL_TAG | pool, length)
        slots, within = np.divmod(mixed, block_images)
        full = slots < whole
        slots[full] = _permute(slots[full], seed, epoch, _BLOCK_TAG, whole)
        parts.append((slots * block_images + within + shift) % count)
    return np.concatenate(parts)


def replacement(seed: int, epoch: int, image: int, attempt: int, count: int) -> int:
    """The image that stands in for an unreadable one; `attempt` counts stand-ins that failed."""
    counter = np.array(
        [[image & 0xFFFFFFFF, epoch, _REPLACEMENT_TAG | image >> 32, attempt]], dtype=np.uint32
    )
    return _below(count, seed, counter)


def _below(count: int, seed: int, counter: NDArray[np.uint32]) -> int:
    """A number in [0, count) from 64 random bits."""
    high, low = (int(word) for word in philox(counter, key_of(seed))[0, :2])
    return (high << 32 | low) * count >> 64


def _permute(
    positions: NDArray[np.int64], seed: int, epoch: int, tag: int, count: int
) -> NDArray[np.int64]:
    """Positions below `count` to others below `count`, one to one; `tag` names the permutation."""
    images = _pass(positions, seed, epoch, tag, count)
    while len(outside := np.flatnonzero(images >= count)):
        images[outside] = _pass(images[outside], seed, epoch, tag, count)
    return images


def _pass(
    positions: NDArray[np.int64], seed: int, epoch: int, tag: int, count: int
) -> NDArray[np.int64]:
    """One pass over the domain of a * b >= count positions."""
    a, b = _sides(count)
    left, right = np.divmod(positions, b)
    for number, table in enumerate(_tables(seed, epoch, tag, count)):
        if number % 2 == 0:
            left = (left + table[right]) % a
        else:
            right = (right + table[left]) % b
    return np.asarray(left * b + right)


def _sides(count: int) -> tuple[int, int]:
    b = max(math.isqrt(max(count - 1, 0)) + 1, 2)
    return max(-(-count // b), 2), b


@functools.lru_cache(maxsize=8)
def _tables(seed: int, epoch: int, tag: int, count: int) -> list[NDArray[np.int64]]:
    """The round functions, tabulated: about sqrt(count) entries each."""
    a, b = _sides(count)
    counter = np.zeros((ROUNDS, max(a, b), 4), dtype=np.uint32)
    counter[..., 0] = np.arange(max(a, b))
    counter[..., 1], counter[..., 2] = epoch, tag
    counter[..., 3] = np.arange(ROUNDS)[:, None]
    words = philox(counter.reshape(-1, 4), key_of(seed))[:, 0].reshape(ROUNDS, -1).astype(np.uint64)
    modulus = np.array([a, b], dtype=np.uint64)[np.arange(ROUNDS) % 2, None]
    return list((words * modulus >> np.uint64(32)).astype(np.int64))
