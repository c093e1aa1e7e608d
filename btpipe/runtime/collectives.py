"""What ranks do together. A collective is the identity when a process is alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GRADIENT_BUCKET_BYTES = 64 * 2**20


@functools.cache
def define_operators() -> None:
    """Collectives as operators with a fake, whole in a compiled graph.

    Called when a group is formed: inside a graph that is being traced it would break it.
    """
    import torch
    import torch.distributed as dist

    @torch.library.custom_op(
        "btpipe::all_reduce_sum", mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @all_reduce_sum.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.custom_op("btpipe::gather", mutates_args=(), schema="(Tensor x) -> Tensor")
    def gather(x: torch.Tensor) -> torch.Tensor:
        rows = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather(list(rows.unbind()), x.contiguous())
        return rows

    @gather.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((dist.get_world_size(), *x.shape))

    _define_merge_moments()


def _define_merge_moments() -> None:
    """The one collective that is differentiated.

    Its backward sends the gradient of the merged moments, not that of each rank's: their number
    does not grow with the ranks. The loss is one, over all ranks, so what a rank's moments
    contributed to the others comes back as a sum over ranks.
    """
    import torch

    @torch.library.custom_op(
        "btpipe::merge_moments", mutates_args=(), schema="(Tensor moments) -> Tensor"
    )
    def merge_moments(moments: torch.Tensor) -> torch.Tensor:
        means, variances = torch.ops.btpipe.gather(moments).unbind(-2)
        mean = means.mean(0)
        return torch.stack([mean, variances.mean(0) + (means - mean).square().mean(0)], -2)

    @merge_moments.register_fake
    def _(moments: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(moments, memory_format=torch.contiguous_format)

    class Context(torch.autograd.function.FunctionCtx):
        saved_tensors: tuple[torch.Tensor, ...]

    def keep(ctx: Context, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        mean = inputs[0].select(-2, 0)
        ctx.save_for_backward(mean - output.select(-2, 0))

    def backward(ctx: Context, gradient: torch.Tensor) -> torch.Tensor:
        (mean_offset,) = ctx.saved_tensors
        mean, variance = torch.ops.btpipe.all_reduce_sum(gradient).div(world_size()).unbind(-2)
        return torch.stack([mean + 2 * variance * mean_offset, variance], -2)

    merge_moments.register_autograd(backward, setup_context=keep)


def world_size() -> int:
    """Ranks in this process's group; 1 when it is alone."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in its group; 0 when it is alone."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks: (...) -> (...)."""
    if world_size() == 1:
        return x
    import torch

    return torch.ops.btpipe.all_reduce_sum(x)  # type: ignore[no-any-return]


def gather(x: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor, in rank order: (...) -> (world_size, ...)."""
    if world_size() == 1:
        return x[None]
    import torch

    return torch.ops.btpipe.gather(x)  # type: ignore[no-any-return]


def merge_moments(moments: torch.Tensor) -> torch.Tensor:
    """Mean and variance (..., 2, C) over all ranks, from each rank's over equally many numbers.

    As Chan et al. (1983): never E[x^2] - mean^2, which cancels. Differentiable.
    """
    if world_size() == 1:
        return moments
    import torch

    return torch.ops.btpipe.merge_moments(moments)  # type: ignore[no-any-return]


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Every rank's rows, in rank order: (n, ...) -> (world_size * n, ...)."""
    return gather(x).flatten(0, 1)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replaces every `.grad` by its sum over ranks, in buckets that are under way together."""
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    under_way = []
    for bucket in _buckets(gradients):
        flat = torch.cat([_memory_order(gradient) for gradient in bucket])
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in under_way:
        assert work is not None
        work.wait()
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            _memory_order(gradient).copy_(part)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() * t.element_size() for t in bucket) >= GRADIENT_BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of a dense tensor in the order of its memory (channels_last needs no copy)."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


_PATIENT: list[torch.distributed.ProcessGroup] = []


def wait_patiently(group: torch.distributed.ProcessGroup | None) -> None:
    """From now on ranks wait for each other in this group, whose time-out is longer.

    None lets go of it: a group must not outlive `destroy_process_group`.
    """
    _PATIENT[:] = [group] if group else []


def any_rank(flag: bool) -> bool:
    """Waits for every rank, however long its work takes; whether any of them says yes."""
    if world_size() == 1:
        return flag
    import torch
    import torch.distributed as dist

    flags = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_PATIENT[0])
    return bool(flags.item())


def barrier() -> None:
    """Waits for every rank, however long its work takes; a rank that died ends the wait."""
    any_rank(False)


class Agreement:
    """Small requests (stop, save) on which all ranks act at the same step.

    Each step starts a reduction of this rank's requests and reads the one of the step before, so
    that nobody waits for it.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.distributed.Work | None] | None = None

    def exchange(self, requests: Sequence[bool]) -> list[bool]:
        """Hands in this step's requests; returns what any rank asked for one step earlier.

        Alone, the answer is this step's.
        """
        if world_size() == 1:
            return list(requests)
        import torch
        import torch.distributed as dist

        before, self._pending = self._pending, None
        flags = torch.tensor([int(request) for request in requests], dtype=torch.int32)
        self._pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return [False] * len(requests)
        agreed, work = before
        assert work is not None
        work.wait()
        return [bool(flag) for flag in agreed.tolist()]
