"""Where a process stands among the ranks of a job: told by torchrun's variables, or by SLURM's."""

import dataclasses
import os
import re

FIRST_PORT, PORTS = 12_000, 20_000
"""Ports for a job that exports none: below those that systems hand out to clients (32768)."""


@dataclasses.dataclass(frozen=True)
class Place:
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


def find() -> Place | None:
    """This process's place; None when it is alone.

    torchrun's variables come first. SLURM's count only inside a step of several tasks: a shell in
    an allocation sees the allocation's number of tasks, but is one process.
    """
    told = os.environ
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= told.keys():
        local = (int(told.get("LOCAL_RANK", "0")), int(told.get("LOCAL_WORLD_SIZE", "1")))
        attempt = int(told.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Place(int(told["RANK"]), int(told["WORLD_SIZE"]), *local, attempt=attempt)
    tasks = int(told.get("SLURM_STEP_NUM_TASKS", told.get("SLURM_NTASKS", "1")))
    if not {"SLURM_STEP_ID", "SLURM_PROCID"} <= told.keys() or tasks < 2:
        return None
    hosts = told.get("SLURM_STEP_NODELIST", told.get("SLURM_JOB_NODELIST", "localhost"))
    host = told.get("MASTER_ADDR", first_host(hosts))
    port = told.get("MASTER_PORT", str(FIRST_PORT + int(told.get("SLURM_JOB_ID", "0")) % PORTS))
    here = told.get("SLURM_STEP_TASKS_PER_NODE", told.get("SLURM_NTASKS_PER_NODE", str(tasks)))
    return Place(
        rank=int(told["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(told.get("SLURM_LOCALID", "0")),
        local_world_size=int(re.split(r"\D", here)[0]),  # "4(x2),3": the first machine's
        address=f"tcp://{host}:{port}",
        local_cores=int(told.get("SLURM_CPUS_PER_TASK", "0")),
    )


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9],cpu1` -> `gpu03`."""
    name = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes)
    assert name is not None  # every part may be empty
    return "".join(part or "" for part in name.groups())
