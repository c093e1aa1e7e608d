"""Learning rates as a pure function of the step."""

import math

import numpy as np

from btpipe.recipe import Optim, Recipe

AUTHOR_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}
"""Batch to the best rate of the weights for 256 images, of the author's trials over 300 epochs with
LARS on ImageNet (facebookresearch/barlowtwins, issue 7)."""


def base_lr(optim: Optim, batch_size: int) -> float:
    """`optim.lr`, or for "auto" the author's best at this batch.

    Between two of the table's batches on the straight line over log(batch) and log(rate); the
    nearest entry's outside of them.
    """
    if optim.lr != "auto":
        return optim.lr
    batches, values = zip(*AUTHOR_RATES.items(), strict=True)
    return float(np.exp(np.interp(math.log(batch_size), np.log(batches), np.log(values))))


def rate(step: int, *, steps: int, warmup_steps: int, final_ratio: float) -> float:
    """Factor on the scaled base rate: linear warm-up from 0, then a cosine to `final_ratio`.

    As published (barlowtwins main.py, adjust_learning_rate), with 0 <= step < steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cosine + final_ratio * (1 - cosine)


def rates(recipe: Recipe, step: int, images: int) -> tuple[float, float]:
    """(rate of weights, rate of biases and batch norm) at a step of a run on so many images."""
    optim, batch_size = recipe.optim, recipe.data.batch_size
    factor = rate(
        step,
        steps=recipe.steps(images),
        warmup_steps=optim.warmup_epochs * recipe.steps_per_epoch(images),
        final_ratio=optim.final_lr_ratio,
    )
    scaled = factor * batch_size / 256
    return scaled * base_lr(optim, batch_size), scaled * optim.bias_lr
