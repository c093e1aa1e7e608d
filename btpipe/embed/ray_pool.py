"""The workers of a job on the machines of a Ray cluster.

Ray Data hands out the parts of the frozen plan; each of its actors is the supervisor of one worker,
as a job on one machine is, so that a file that kills or hangs its decoder is found there too. Parts
are written to the job's work folder, which all machines see under one path, and are committed by
the job alone.
"""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data.index import Index, open_index
from btpipe.embed import work_folder
from btpipe.embed.messages import (
    Failed,
    JobStarted,
    PartProgress,
    PartTask,
    PartWritten,
    WorkerConfig,
)
from btpipe.embed.worker_pool import WorkerPool
from btpipe.embed.worker_process import start_with_signals_held
from btpipe.errors import BtpipeError, MachineError, UsageError
from btpipe.events import Event, Report

_TURN_SECONDS = 0.5
_END_SECONDS = 5.0  # for Ray to take leave; then it is killed
_PR_SET_PDEATHSIG = 1  # prctl(2)
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy other threads' locks


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What became of a part, and what its supervisor reported meanwhile."""

    outcome: PartWritten | Failed
    events: tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the cluster is to do; `workers` 0: as many as it has GPUs, or machines."""

    config: WorkerConfig
    workers: int
    limit_seconds: float
    started: JobStarted
    shared: "SharedPaths"
    tasks: Sequence[PartTask]


class RayPool:
    """As `WorkerPool`, on a cluster: one worker for each GPU, or for each machine without GPUs.

    `workers`: how many in all; 0 for these. They share the cores of their machines. Ray's own part
    is a process beside this one, in a session of its own: it installs signal handlers, writes to
    standard error, and ends its process where it loses its cluster.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(
        self,
        config: WorkerConfig,
        workers: int,
        limit_seconds: float,
        on_event: Report,
        signals: runtime.StopSignals,
    ) -> None:
        runtime.require_ray()
        self._config, self._workers, self._limit_seconds = config, workers, limit_seconds
        self._on_event, self._signals = on_event, signals
        self._connection, self._theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_drive, args=(self._theirs, os.getpid()))

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the actors; parts that are not written are lost."""
        self._connection.close()
        if self._process.pid is None:
            return
        self._process.terminate()
        self._process.join(_END_SECONDS)
        self._process.kill()  # the actors see that it is gone
        self._process.join()

    def start(self) -> None:
        """Joins or starts the cluster, if that was not done yet; it takes seconds."""
        if self._process.pid is not None:
            return
        start_with_signals_held(self._process)
        self._theirs.close()

    def work(
        self, started: JobStarted, index: Index, tasks: Sequence[PartTask]
    ) -> Iterator[PartWritten | PartProgress]:
        """Has the parts made, and tells of each. When asked to stop, it ends within a second.

        Raises:
            BtpipeError: whatever ended a worker that could say so.
            MachineError: Ray gave up, or a machine does not see what this one sees.
            UsageError: more workers than the cluster has GPUs or cores.
        """
        started = dataclasses.replace(started, folder=started.folder.absolute())
        shared = SharedPaths.of(started, index)
        job = _Job(self._config, self._workers, self._limit_seconds, started, shared, tasks)
        with contextlib.suppress(OSError):  # it is gone: `_receive` says so
            self._connection.send(job)
        images = {task.part: task.inputs for task in tasks}
        while images:
            answer = self._receive()
            if answer is None:
                return
            for event in answer.events:
                self._on_event(event)
            if isinstance(answer.outcome, Failed):
                raise answer.outcome.raised()
            yield PartProgress(images.pop(answer.outcome.part), 0.0)
            yield answer.outcome

    def _receive(self) -> _Answer | None:
        """The next answer; None when a signal asked to stop."""
        while not self._signals.first:
            try:
                if self._connection.poll(_TURN_SECONDS):
                    answer: _Answer = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - ours
                    return answer
            except (EOFError, OSError):
                time.sleep(_TURN_SECONDS)  # what ended Ray may have asked this process to stop
                if not self._signals.first:
                    fix = "see Ray's logs (ray status); run the same command again: it goes on"
                    raise MachineError("Ray ended unasked", fix=fix) from None
        return None


def _drive(jobs: Connection, parent: int) -> None:
    """The life of the process that Ray takes for its driver."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.setsid()  # so that a Ctrl-C reaches none of what Ray starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, runtime.StopSignals.SIGNALS)
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the job needs no more
        try:
            with runtime.ray_cluster() as machines:
                for answer in _run(jobs.recv(), machines):
                    jobs.send_bytes(answer)
        except BtpipeError as error:
            jobs.send_bytes(pickle.dumps(_Answer(Failed.of(error), ())))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            fix = "run the same command again: it goes on"
            failed = Failed(MachineError, f"Ray gave up: {error}", "", "", fix)
            jobs.send_bytes(pickle.dumps(_Answer(failed, ())))


def _run(job: _Job, machines: Sequence[runtime.ClusterNode]) -> Iterator[bytes]:
    """Runs the job as a data set of tasks; an answer, pickled, for each as it is done."""
    import ray.data  # noqa: PLC0415 - an optional package

    config, gpus = _on_one_device(job.config)
    workers, cores = _share_out(machines, job.workers, gpus)
    encoder = dataclasses.replace(config.encoder, threads=config.encoder.threads or cores)
    config = dataclasses.replace(config, encoder=encoder)
    rows = [{"task": pickle.dumps(task)} for task in job.tasks]
    # A block for each: what Ray hands out, and does again when an actor is lost.
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Actor,
        fn_constructor_args=(config, job.started, job.limit_seconds, job.shared),
        compute=ray.data.ActorPoolStrategy(
            size=min(workers, len(rows)), max_tasks_in_flight_per_actor=1
        ),
        batch_size=1,
        num_cpus=cores,
        num_gpus=gpus,
    )
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
        yield from batch["answer"]


def _on_one_device(config: WorkerConfig) -> tuple[WorkerConfig, int]:
    """With the device that "auto" means to the job, and how many GPUs each actor has: 1 or 0.

    "auto" precision stays: a machine that would choose another than the plan's is refused.
    """
    device = config.encoder.device
    cuda = device == "cuda" or (device == "auto" and runtime.gpu_count() > 0)
    encoder = dataclasses.replace(config.encoder, device="cuda" if cuda else "cpu")
    return dataclasses.replace(config, encoder=encoder), int(cuda)


def _share_out(
    machines: Sequence[runtime.ClusterNode], requested: int, gpus: int
) -> tuple[int, int]:
    """How many workers there are, and the cores of each: as many as leave every worker room.

    Raises:
        UsageError: more workers than GPUs, where each needs one, or than cores.
    """
    workers = requested or (sum(m.gpus for m in machines) if gpus else len(machines))
    for cores in range(max(m.cores for m in machines), 0, -1):
        room = [min(m.cores // cores, m.gpus if gpus else m.cores) for m in machines]
        if sum(room) >= workers > 0:
            return workers, cores
    have = ", ".join(f"{m.cores} cores and {m.gpus} GPUs" for m in machines)
    raise UsageError(f"{workers} workers", expected=f"a core (and GPU) for each of: {have}")


@dataclasses.dataclass(frozen=True)
class SharedPaths:
    """What the job sees on its machine, and every other must see under the same path.

    Relative paths are from `folder`.
    """

    folder: str
    paths: tuple[str, ...]

    @classmethod
    def of(cls, started: JobStarted, index: Index) -> "SharedPaths":
        """The work folder, and the inputs that are files or folders."""
        paths = [os.fspath(started.folder / work_folder.PLAN), os.fspath(index.root)]
        paths += [origin.place for origin in index.sources]
        return cls(os.fspath(Path.cwd()), tuple(path for path in paths if Path(path).exists()))

    def require(self) -> None:
        """Goes to the folder and looks.

        Raises:
            MachineError: something is not on this machine.
        """
        missing = [path for path in (self.folder, *self.paths) if not Path(path).exists()]
        if missing:
            raise MachineError(
                "not seen by this machine of the cluster",
                where=f"{socket.gethostname()}: {missing[0]}",
                expected="inputs, bundle and --out under the same path on every machine",
                fix="put them on a file system that all machines share",
            )
        os.chdir(self.folder)


class Actor:
    """The supervisor of one worker, which opens the bundle once."""

    def __init__(
        self, config: WorkerConfig, started: JobStarted, limit_seconds: float, shared: SharedPaths
    ) -> None:
        self._config, self._started, self._limit_seconds = config, started, limit_seconds
        self._shared = shared
        self._pool: WorkerPool | None = None
        self._events: list[Event] = []

    def __call__(self, rows: dict[str, NDArray[np.object_]]) -> dict[str, NDArray[np.object_]]:
        """One task -> one answer; what cannot be made again is an answer too."""
        task = pickle.loads(rows["task"][0])  # noqa: S301 - ours
        try:
            outcome: PartWritten | Failed = self._make(task)
        except BtpipeError as error:
            outcome = Failed.of(error)
        except Exception:
            text = f"a bug, met by an actor:\n{traceback.format_exc()}"
            outcome = Failed(BtpipeError, text, "", "", "")
        answer = _Answer(outcome, tuple(self._events))
        self._events.clear()
        return {"answer": np.array([pickle.dumps(answer)], dtype=object)}

    def _make(self, task: PartTask) -> PartWritten:
        if self._pool is None:
            self._shared.require()
            self._index = open_index(self._started.folder / work_folder.INDEX)
            config = dataclasses.replace(self._config, cores=runtime.core_groups(1)[0])
            on_event, signals = self._events.append, runtime.StopSignals()
            self._pool = WorkerPool([config], self._limit_seconds, on_event, signals)
            self._pool.start()
        messages = list(self._pool.work(self._started, self._index, [task]))
        return next(message for message in messages if isinstance(message, PartWritten))
