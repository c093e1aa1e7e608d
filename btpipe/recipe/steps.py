"""How many steps images make: an epoch is whole batches of them."""


def count_steps(images: int, batch_size: int, epochs: int = 1) -> int:
    """Optimiser steps of so many epochs; the last batch of each is dropped where it is short."""
    return epochs * (images // batch_size)
