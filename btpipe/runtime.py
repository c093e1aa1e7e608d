"""The machine a process runs on: devices, ranks, collectives, precision, stop signals.

The only user of `torch.distributed` and of the environment. Model code is single-process code: a
collective is the identity when a process is alone. Torch is imported when something needs it, so
that the command line starts without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from btpipe.errors import BtpipeError, MachineError, Stopped, UsageError

if TYPE_CHECKING:
    import torch

GRADIENT_BUCKET_BYTES = 64 * 2**20
REPEAT_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One process of a job: its device, and its place among the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0


@contextlib.contextmanager
def start() -> Iterator[Runtime]:
    """The runtime of this process, alone or as a rank of the group torchrun describes.

    Raises:
        MachineError: the process group cannot be formed.
    """
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not under_torchrun():
        yield _with_threads(Runtime(device))
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise MachineError(f"the ranks did not find each other: {error}") from error
    try:
        yield _with_threads(Runtime(device, dist.get_rank(), dist.get_world_size()))
    finally:
        dist.destroy_process_group()


def _with_threads(runtime: Runtime) -> Runtime:
    """torchrun gives every rank one thread; each gets its share of the cores instead."""
    import torch

    torch.set_num_threads(cores())
    return runtime


def cores() -> int:
    """CPU cores that this process may use: its share of those that its machine's ranks may."""
    alike = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // alike)


def under_torchrun() -> bool:
    """Whether torchrun, or something that sets its variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def devices(asked: str) -> int:
    """How many processes `--devices` means on this machine: "auto" is every GPU, or one on a CPU.

    Raises:
        UsageError: not a number, or more GPUs than there are.
    """
    import torch

    gpus = torch.cuda.device_count()
    if asked == "auto":
        return max(gpus, 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise UsageError(f"--devices {asked}", expected="auto, or a number from 1")
    if gpus and int(asked) > gpus:
        raise UsageError(f"--devices {asked}", expected=f"at most the {gpus} GPUs of this machine")
    return int(asked)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a rank ended: None, or the error it raised, in words that cross a process border."""

    error: str | None = None
    exit_code: int = 0


def launch(count: int, entry: Callable[..., None], arguments: Sequence[object]) -> None:
    """Runs `entry(*arguments)` in `count` processes on this machine, through torchrun's machinery.

    Raises:
        BtpipeError: the error of the first rank that failed, with its exit code.
        Stopped: a signal arrived; the ranks were told and had saved their state.
        MachineError: a rank was lost.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        outcomes = elastic_launch(config, _rank)(entry, *arguments)
    except SignalException as error:
        raise Stopped(f"stopped by {error.sigval.name}; run the same command to go on") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise MachineError(
            f"rank {rank} was lost (exit code {failure.exitcode})",
            fix="run the same command again: it goes on from the last checkpoint",
        ) from error
    for outcome in outcomes.values():
        if outcome.error is not None:
            _raise(outcome)


def _rank(entry: Callable[..., None], *arguments: object) -> Outcome:
    try:
        entry(*arguments)
    except BtpipeError as error:
        return Outcome(str(error), error.exit_code)
    return Outcome()


def _raise(outcome: Outcome) -> None:
    stopped = outcome.exit_code == Stopped.exit_code
    error = (Stopped if stopped else BtpipeError)(outcome.error or "")
    error.exit_code = outcome.exit_code
    raise error


class StopSignals:
    """SIGTERM, SIGUSR1 and the first Ctrl-C set `asked`; a second Ctrl-C ends the process with 130.

    A signal within two seconds of the first one is the same request: a terminal sends Ctrl-C to
    every process, and the launcher passes it on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.asked: str = ""
        self._seconds = 0.0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if not self.asked:
            self.asked, self._seconds = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._seconds > REPEAT_SECONDS:
            os._exit(130)


@functools.cache
def _define_operators() -> None:
    """Collectives as operators with a fake and a backward, whole in a compiled graph.

    The convention of the backward: the loss is one, over all ranks; every rank holds the gradient
    of its own rows, and what a rank contributed to others comes back as a sum over ranks.
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

    def all_reduce_backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient)  # type: ignore[no-any-return]

    all_reduce_sum.register_autograd(all_reduce_backward)

    @torch.library.custom_op("btpipe::gather", mutates_args=(), schema="(Tensor x) -> Tensor")
    def gather(x: torch.Tensor) -> torch.Tensor:
        rows = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather(list(rows.unbind()), x.contiguous())
        return rows

    @gather.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((dist.get_world_size(), *x.shape))

    def gather_backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient)[dist.get_rank()].clone()  # type: ignore[no-any-return]

    gather.register_autograd(gather_backward)


def world_size() -> int:
    """Ranks in this process's group; 1 when it is alone."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in its group; 0 when it is alone."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, differentiable: (...) -> (...)."""
    if world_size() == 1:
        return x
    import torch

    _define_operators()
    return torch.ops.btpipe.all_reduce_sum(x)  # type: ignore[no-any-return]


def gather(x: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor, in rank order, differentiable: (...) -> (world_size, ...)."""
    if world_size() == 1:
        return x[None]
    import torch

    _define_operators()
    return torch.ops.btpipe.gather(x)  # type: ignore[no-any-return]


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


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


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


Precision = Literal["fp32", "bf16", "fp64"]


def precision(asked: Literal["auto", "fp32", "bf16", "fp64"], device: torch.device) -> Precision:
    """What `run.precision` means here: "auto" is bf16 where the hardware computes in it."""
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" or cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 (AVX512-BF16 or AMX on x86-64, BF16 on aarch64)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    words = set(text.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def environment() -> dict[str, object]:
    """Hardware and versions, for the record of a run."""
    import importlib.metadata

    import torch

    packages = ("btpipe", "torch", "torchvision", "nvidia-dali-cuda130", "numpy", "pyarrow")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_has_bf16": cpu_has_bf16(),
        "gpus": gpus,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }
