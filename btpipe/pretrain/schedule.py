"""Learning rates as a pure function of the step."""

import math

from btpipe.recipe import Optim


def rate(step: int, *, steps: int, warmup_steps: int, final_ratio: float) -> float:
    """Factor on the scaled base rate: linear warm-up from 0, then a cosine to `final_ratio`.

    As published (barlowtwins main.py, adjust_learning_rate), with 0 <= step < steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cosine + final_ratio * (1 - cosine)


def rates(optim: Optim, step: int, *, steps_per_epoch: int, batch_size: int) -> tuple[float, float]:
    """(rate of the weights, rate of biases and batch norm) at this step."""
    factor = rate(
        step,
        steps=optim.epochs * steps_per_epoch,
        warmup_steps=optim.warmup_epochs * steps_per_epoch,
        final_ratio=optim.final_lr_ratio,
    )
    scaled = factor * batch_size / 256
    return scaled * optim.lr, scaled * optim.bias_lr
