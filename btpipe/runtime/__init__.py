"""The machine a process runs on: devices, ranks, collectives, precision, stop signals.

The only user of `torch.distributed` and of the environment. Model code is single-process code.
Torch is imported when something needs it, so that the command line starts without it.
"""

from btpipe.runtime.cluster import ClusterNode, ray_cluster, require_ray
from btpipe.runtime.collectives import (
    Agreement,
    all_reduce_sum,
    any_rank,
    barrier,
    gather,
    gather_rows,
    merge_moments,
    rank,
    sum_gradients,
    world_size,
)
from btpipe.runtime.cpu_flags import Cpu, cpu, cpu_has_bf16, cpu_is_faster_in_int8, cpu_sums_int8
from btpipe.runtime.device import AskedDevice, resolve_device
from btpipe.runtime.launcher import launch
from btpipe.runtime.machine import (
    DALI_PACKAGES,
    Precision,
    Runtime,
    core_groups,
    cores,
    devices,
    environment,
    gpu_count,
    is_rank,
    keep_compiled_code,
    keep_to,
    package_folder,
    package_version,
    precision,
    start,
)
from btpipe.runtime.nvjpeg import mapped_nvjpegs
from btpipe.runtime.rank_env import FIRST_PORT, PORTS
from btpipe.runtime.signals import StopSignals
from btpipe.runtime.stream import gpu_stream, use_gpu
from btpipe.runtime.tf32 import require_float32_products

__all__ = [
    "DALI_PACKAGES",
    "FIRST_PORT",
    "PORTS",
    "Agreement",
    "AskedDevice",
    "ClusterNode",
    "Cpu",
    "Precision",
    "Runtime",
    "StopSignals",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "core_groups",
    "cores",
    "cpu",
    "cpu_has_bf16",
    "cpu_is_faster_in_int8",
    "cpu_sums_int8",
    "devices",
    "environment",
    "gather",
    "gather_rows",
    "gpu_count",
    "gpu_stream",
    "is_rank",
    "keep_compiled_code",
    "keep_to",
    "launch",
    "mapped_nvjpegs",
    "merge_moments",
    "package_folder",
    "package_version",
    "precision",
    "rank",
    "ray_cluster",
    "require_float32_products",
    "require_ray",
    "resolve_device",
    "start",
    "sum_gradients",
    "use_gpu",
    "world_size",
]
