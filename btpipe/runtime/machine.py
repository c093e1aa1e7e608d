"""Devices, ranks, cores, precision and the record of the machine a process runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from btpipe.errors import MachineError, UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16", "fp64"]


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
def start(on: Literal["auto", "cpu"] = "auto") -> Iterator[Runtime]:
    """The runtime of this process, alone or as a rank of the group torchrun describes.

    `on` "cpu" leaves the GPUs alone, so that there may be more ranks than GPUs.

    Raises:
        MachineError: the process group cannot be formed.
    """
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = on == "auto" and torch.cuda.is_available()
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


def precision(asked: Literal["auto"] | Precision, device: torch.device) -> Precision:
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
