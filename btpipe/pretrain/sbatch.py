"""The SLURM job file of a run: written, never submitted."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from btpipe import artifact, runtime
from btpipe.errors import RefusedError, Stopped, UsageError
from btpipe.pretrain.launch import require_divisible
from btpipe.recipe import Recipe

CORES = 8
"""CPU cores for each GPU: decoding needs them. Machines differ: change the line in the file."""

SAVE_SECONDS = 120
"""How long before its time is up the job is asked to save."""

FILE = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --chdir={folder}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={tasks}
#SBATCH --cpus-per-task={cores}
#SBATCH --signal=USR1@{seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.out
{more}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$(({first_port} + SLURM_JOB_ID % {ports}))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

srun {command}
code=$?
if [ "$code" -eq {stopped} ]; then # stopped with its state saved: the job goes on later
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """What is asked of SLURM: one task for each of `devices` GPUs on each of `nodes` machines.

    `time` and `partition` are SLURM's own words; empty: the cluster's default.
    """

    nodes: int
    devices: str
    time: str = ""
    partition: str = ""

    def require_default(self) -> None:
        """Raises UsageError where something is asked for that only a job file can say."""
        if (self.nodes, self.time, self.partition) != (1, "", ""):
            what = "--nodes, --time and --partition are for a SLURM job file"
            fix = "add --sbatch FILE; under torchrun, nodes are torchrun's to name"
            raise UsageError(what, fix=fix)


def write(file: Path, name: str, recipe: Recipe, arguments: Sequence[str], job: SlurmJob) -> None:
    """Writes a job that runs `btpipe` with these arguments in every task, and goes on when stopped.

    Raises:
        UsageError: `devices` is no number.
        RecipeError: a batch or a micro-batch does not divide among the tasks.
        RefusedError: the file exists and says something else.
    """
    if not job.devices.isdecimal() or int(job.devices) < 1:
        what, fix = f"--devices {job.devices}", "--devices 8 for machines with eight"
        raise UsageError(what, expected="with --sbatch, the GPUs of each machine", fix=fix)
    require_divisible(recipe, job.nodes * int(job.devices))
    options = {"time": job.time, "partition": job.partition}
    text = FILE.format(
        command=shlex.join([sys.executable, "-m", "btpipe", *arguments]),
        name=name,
        folder=Path.cwd(),
        nodes=job.nodes,
        tasks=job.devices,
        cores=CORES,
        seconds=SAVE_SECONDS,
        more="".join(f"#SBATCH --{key}={value}\n" for key, value in options.items() if value),
        first_port=runtime.FIRST_PORT,
        ports=runtime.PORTS,
        stopped=Stopped.exit_code,
    )
    if file.exists() and file.read_text() != text:
        fix = "give --sbatch another name, or remove the file"
        raise RefusedError("says something else than this command", where=file, fix=fix)
    artifact.write_file(file, text.encode())
