"""Devices, ranks, cores, precision and the record of the machine a process runs on."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from btpipe.errors import LostRankError, MachineError, UsageError
from btpipe.runtime.collectives import define_operators, wait_patiently
from btpipe.runtime.cpu_flags import cpu_has_bf16
from btpipe.runtime.rank_env import RankEnvironment, find_rank_env

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16", "fp64"]

DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
RECORDED = ("btpipe", "torch", "torchvision", *DALI_PACKAGES, "numpy", "pyarrow")
"""Packages whose versions a run records, where they are installed."""

COLLECTIVE_SECONDS = 600.0
"""How long ranks wait for one that does not answer. Long enough for a slow disk; a rank that died
is noticed at once, its connections close. (On GPUs, NCCL's own watchdog ends a process then.)"""

CULPRIT_SECONDS = 5.0
"""How long a rank that lost another one waits to be ended: so its launcher meets the lost one
first, and names it."""


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
def start(
    on: Literal["auto", "cpu"] = "auto", collective_seconds: float = COLLECTIVE_SECONDS
) -> Iterator[Runtime]:
    """The runtime of this process, alone or as a rank of the group torchrun or SLURM describes.

    `on` "cpu" leaves the GPUs alone, so that there may be more ranks than GPUs.

    Raises:
        LostRankError: another rank died, or did not answer for `collective_seconds`.
        MachineError: the process group cannot be formed.
    """
    import torch

    rank_env = find_rank_env()
    cuda = on == "auto" and torch.cuda.is_available()
    local_rank = rank_env.local_rank if rank_env else 0
    # SLURM may show each task one GPU of its own, as number 0.
    number = local_rank % torch.cuda.device_count() if cuda else 0
    device = torch.device("cuda", number) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one shape
    if rank_env is None:
        yield _with_threads(Runtime(device))
        return
    with _group(rank_env, "cpu:gloo,cuda:nccl" if cuda else "gloo", collective_seconds):
        yield _with_threads(Runtime(device, rank_env.rank, rank_env.world_size))


@contextlib.contextmanager
def _group(rank_env: RankEnvironment, backend: str, collective_seconds: float) -> Iterator[None]:
    """A process group for the length of a `with`; what it raises when a rank is gone, in words."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    wait = timedelta(seconds=collective_seconds)
    try:
        address = rank_env.address or "env://"
        store = next(iter(rendezvous(address, rank_env.rank, rank_env.world_size)))[0]
        # After a restart torchrun's store still holds the addresses of the ranks before.
        store = PrefixStore(f"attempt-{rank_env.attempt}", store)
        dist.init_process_group(
            backend, timeout=wait, store=store, rank=rank_env.rank, world_size=rank_env.world_size
        )
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        assert isinstance(patient, dist.ProcessGroup)
        wait_patiently(patient)
        del patient
        define_operators()
    except RuntimeError as error:
        time.sleep(CULPRIT_SECONDS)
        raise LostRankError(f"the ranks did not find each other: {error}") from error
    except ValueError as error:
        raise MachineError(f"the ranks cannot find each other: {error}") from error
    try:
        yield
    except RuntimeError as error:
        loss_text = _lost(error)
        if not loss_text:
            raise
        time.sleep(CULPRIT_SECONDS)
        fix = "run the same command again: it goes on from the last checkpoint"
        raise LostRankError(loss_text, fix=fix) from error
    finally:
        wait_patiently(None)
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> str:
    """What a collective's error says about the other ranks; nothing if it is another error."""
    import torch.distributed as dist

    text = str(error)
    if "imed out" in text or "timeout" in text:
        return "another rank does not answer" if _of_a_collective(error) else ""
    is_lost = isinstance(error, dist.DistError) or _of_a_collective(error)
    return "the connection to another rank was lost" if is_lost else ""


def _of_a_collective(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, NCCL and the store DistErrors."""
    import torch.distributed as dist

    words = ("gloo/transport", "Application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _with_threads(runtime: Runtime) -> Runtime:
    """torchrun gives every rank one thread; each gets its share of the cores instead."""
    import torch

    torch.set_num_threads(cores())
    return runtime


def cores() -> int:
    """CPU cores that this process may use: its share of those that its machine's ranks may."""
    rank_env, count = find_rank_env(), len(os.sched_getaffinity(0))
    if rank_env is None:
        return count
    return max(1, min(count, rank_env.local_cores) or count // rank_env.local_world_size)


def keep_to(cores: Sequence[int], gpu: int | None) -> None:
    """Keeps this process to these cores and, unless None, this GPU of those that it may use.

    Before a library looks for either.
    """
    os.sched_setaffinity(0, cores)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)


def core_groups(count: int) -> list[tuple[int, ...]]:
    """This process's cores in `count` groups of neighbours, about as many in each.

    Raises:
        UsageError: fewer cores than groups.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cpus):
        raise UsageError(f"{count} workers", expected=f"1 to {len(cpus)}, one core for each")
    return [
        tuple(cpus[i * len(cpus) // count : (i + 1) * len(cpus) // count]) for i in range(count)
    ]


def gpu_count() -> int:
    """GPUs that the driver lets this process use; asked of the driver itself, for want of torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def is_rank() -> bool:
    """Whether torchrun or SLURM started this process as one of several."""
    return find_rank_env() is not None


def devices(setting: str) -> int:
    """How many processes `--devices` means on this machine: "auto" is every GPU, or one on a CPU.

    Raises:
        UsageError: not a number, or more GPUs than there are.
    """
    import torch

    gpus = torch.cuda.device_count()
    if setting == "auto":
        return max(gpus, 1)
    if not setting.isdecimal() or int(setting) < 1:
        raise UsageError(f"--devices {setting}", expected="auto, or a number from 1")
    if gpus and int(setting) > gpus:
        raise UsageError(
            f"--devices {setting}", expected=f"at most the {gpus} GPUs of this machine"
        )
    return int(setting)


def precision(setting: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """What `run.precision` means here: "auto" is bf16 where the hardware computes in it."""
    if setting != "auto":
        return setting
    return "bf16" if device.type == "cuda" or cpu_has_bf16() else "fp32"


def keep_compiled_code(folder: Path) -> None:
    """Where torch.compile keeps its code and finds it again; before anything is compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def environment() -> dict[str, object]:
    """Hardware and versions, for the record of a run; of packages those that say theirs."""
    import torch

    packages = {name: package_version(name) for name in RECORDED}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_has_bf16": cpu_has_bf16(),
        "gpus": gpus,
        "packages": {name: version for name, version in packages.items() if version},
    }


def package_folder(name: str) -> Path | None:
    """Where an installed package's files are; None where there is none of this name."""
    import importlib.metadata

    try:
        return Path(str(importlib.metadata.distribution(name).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return None


def package_version(name: str) -> str:
    """The version of an installed package; empty where there is none of this name.

    btpipe knows its own: it runs from a checkout that nobody installed as well.
    """
    import importlib.metadata

    from btpipe import __version__

    if name == "btpipe":
        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
