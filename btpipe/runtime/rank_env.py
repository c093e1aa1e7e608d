"""The rank of a process in its job, from the variables of torchrun or of SLURM."""

import dataclasses
import os
import re

FIRST_PORT, PORTS = 12_000, 20_000
"""Ports for a job that exports none: below those that systems hand out to clients (32768)."""


@dataclasses.dataclass(frozen=True)
class RankEnvironment:
    """One rank of a job. `address` is empty where torchrun has its own way to bring ranks together.

    `local_cores` is what SLURM gives to each task; 0 if the ranks of a machine share its cores.
    `attempt` counts torchrun's restarts.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str = ""
    local_cores: int = 0
    attempt: int = 0


def find_rank_env() -> RankEnvironment | None:
    """What this process was started with; None when it is alone.

    torchrun's variables come first. SLURM's count only inside a step of several tasks: a shell in
    an allocation sees the allocation's number of tasks, but is one process.
    """
    environ = os.environ
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        local = (int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", "1")))
        attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return RankEnvironment(
            int(environ["RANK"]), int(environ["WORLD_SIZE"]), *local, attempt=attempt
        )
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    if not {"SLURM_STEP_ID", "SLURM_PROCID"} <= environ.keys() or tasks < 2:
        return None
    hosts = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
    host = environ.get("MASTER_ADDR", first_host(hosts))
    port = environ.get(
        "MASTER_PORT", str(FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % PORTS)
    )
    tasks_per_node = environ.get(
        "SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", str(tasks))
    )
    return RankEnvironment(
        rank=int(environ["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(environ.get("SLURM_LOCALID", "0")),
        local_world_size=int(re.split(r"\D", tasks_per_node)[0]),  # "4(x2),3": the first machine's
        address=f"tcp://{host}:{port}",
        local_cores=int(environ.get("SLURM_CPUS_PER_TASK", "0")),
    )


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9],cpu1` -> `gpu03`."""
    name = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes)
    assert name is not None  # every part may be empty
    return "".join(part or "" for part in name.groups())
