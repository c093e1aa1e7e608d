"""Numbers that are not finite: kept from the weights on the device, told to the host a step later.

The flag of a step masks its update where it is computed (`found_inf`, torch's protocol for
optimisers), so that nothing waits for it; the host reads it once the next step is under way.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from btpipe import runtime

INITIAL_SCALE = 2.0**16
GROWTH, BACKOFF, GROWTH_STEPS = 2.0, 0.5, 2000  # torch.amp.GradScaler's


@dataclasses.dataclass(frozen=True)
class Flags:
    """What one update found, on the device until it is read.

    `found_inf` (0-d, 0 or 1) is equal on all ranks and masks the update; `ranks` (world_size,) is
    1 for each rank whose own embeddings or gradients were not finite.
    """

    found_inf: torch.Tensor
    ranks: torch.Tensor


def flags(gradients: list[torch.Tensor], embeddings: list[torch.Tensor]) -> Flags:
    """Looks at this rank's gradients, before they are summed, and embeddings; tells all ranks."""
    largest = [norm for part in (gradients, embeddings) for norm in _largest(part)]
    bad = ~torch.isfinite(torch.stack([value.float() for value in largest])).all()
    ranks = torch.zeros(runtime.world_size(), device=bad.device)
    ranks[runtime.rank()] = bad.float()
    ranks = runtime.all_reduce_sum(ranks)
    return Flags(ranks.amax(), ranks)


def _largest(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """max |x| of each tensor, not a number where one of its values is none."""
    norms: Sequence[torch.Tensor] = torch._foreach_norm(tensors, ord=float("inf"))
    return norms


def broken(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the first tensor that holds a number which is not finite, or nothing. Waits."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    good = torch.isfinite(torch.stack(list(_largest(list(floating.values()))))).tolist()
    return next((name for name, whole in zip(floating, good, strict=True) if not whole), "")


class LossScale:
    """Factor on the loss in fp16, so that small gradients do not vanish: a tensor on the device.

    Halved after an overflow, doubled after 2,000 steps without one, as torch.amp.GradScaler does.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Divides gradients by the scale, in place."""
        torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, found_inf: torch.Tensor) -> None:
        """Counts the overflow of this step, if it was one, and moves the scale."""
        self.overflows += found_inf.to(torch.int64)
        torch._amp_update_scale_(
            self.scale, self.good_steps, found_inf, GROWTH, BACKOFF, GROWTH_STEPS
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep."""
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}


@dataclasses.dataclass(frozen=True)
class NonfiniteFlags:
    """Flags as read by the host: the update of `step` was left out."""

    step: int
    ranks: tuple[int, ...]
    scale: float
    """Loss scale after the step; 1 without one."""


class Watch:
    """Reads the flags of each step when the next one is under way."""

    def __init__(self) -> None:
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None

    def stepped(self, step: int, flags: Flags, scale: LossScale | None) -> NonfiniteFlags | None:
        """Hands in a step's flags; returns what the step before it found, if it did."""
        before = self.last()
        numbers = torch.cat([flags.ranks, scale.scale[None] if scale else flags.ranks.new_ones(1)])
        if numbers.device.type != "cuda":
            self._pending = step, numbers.clone(), None
            return before
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._pending = step, host, copied
        return before

    def last(self) -> NonfiniteFlags | None:
        """What the newest step found, if it did; waits for it. Told once."""
        if self._pending is None:
            return None
        step, numbers, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        *ranks, scale = numbers.tolist()
        bad = tuple(rank for rank, flag in enumerate(ranks) if flag)
        return NonfiniteFlags(step, bad, scale) if bad else None
