"""A Ray cluster: the one that RAY_ADDRESS names, or one started on this machine and ended again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
from collections.abc import Iterator

from btpipe.errors import MachineError, UsageError
from btpipe.runtime.machine import cores, gpu_count

STORE_BYTES = 100 * 2**20
"""Memory for what Ray itself passes on: orders and answers; vectors go through files."""


@dataclasses.dataclass(frozen=True)
class ClusterNode:
    """What Ray may use of one of its machines."""

    cores: int
    gpus: int


def require_ray() -> None:
    """Passes where Ray is installed.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise _no_ray("ray")


def _no_ray(name: str | None) -> UsageError:
    return UsageError(
        f"--cluster ray needs a package that is not here: {name}",
        expected="ray[data] 2.40 or newer",
        fix="pip install 'btpipe[ray]', or leave out --cluster",
    )


@contextlib.contextmanager
def ray_cluster() -> Iterator[list[ClusterNode]]:
    """The machines of the cluster that is joined, or started, for the length of a `with`.

    Raises:
        UsageError: Ray Data is not installed.
        MachineError: the cluster does not answer, or Ray cannot start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray.data
    except ImportError as error:
        raise _no_ray(error.name) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # of errors it raises
    ray.data.DataContext.get_current().enable_progress_bars = False
    address = os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address == "local":
            ray.init(
                address,
                num_cpus=cores(),
                num_gpus=gpu_count(),
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
        shares = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        members = [ClusterNode(int(s.get("CPU", 0)), int(s.get("GPU", 0))) for s in shares]
    except Exception as error:
        raise MachineError(
            f"Ray at {address} cannot be used: {error}",
            fix="see that `ray status` shows the cluster, or unset RAY_ADDRESS to start one here",
        ) from error
    try:
        yield members
    finally:
        ray.shutdown()
