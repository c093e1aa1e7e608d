"""What the stages of `benchmarks.gpu` share: where things are, how a number is told, recipes."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.workspace import MARK, PROJECT, Failed, Workspace
from btpipe import recipe, runtime
from btpipe.data.index import Index, build
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.events import Event, Rejected
from btpipe.recipe import Recipe


def recipe_of(workspace: Workspace, name: str, *overrides: str) -> Recipe:
    """A shipped recipe; the sizes of a dry run come last and win."""
    return recipe.load(PROJECT / "recipes" / name, [*overrides, *workspace.sizes])


Require = Callable[[bool, str], None]
"""Whether something holds, and what to say where it does not."""


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def gpu() -> int | None:
    """The GPU's number, or None."""
    return device().index


def print_result(name: str, **values: object) -> None:
    """One result: a line of JSON in the stage's log."""
    print(MARK + json.dumps({"name": name, **values}), flush=True)


@contextlib.contextmanager
def judged() -> Iterator[Require]:
    """Collects what is not as it must be, so that all of it is measured before the stage is red.

    Raises:
        Failed: at the end, naming all of it.
    """
    wrong: list[str] = []

    def require(holds: bool, what: str) -> None:
        if not holds:
            wrong.append(what)
            print_result("WRONG", what=what)

    yield require
    if wrong:
        raise Failed("; ".join(wrong))


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Rate:
    """Of one thing: so many a second, by the clock; CPU cores that were busy meanwhile."""

    per_second: float
    cores: float
    thread: float
    """Share of the time that the calling thread was busy."""


def rate(action: Callable[[], object], count: int, seconds: float, warm_ups: int = 2) -> Rate:
    """Repeats an action that does `count` things for about so long, after some warm-ups."""
    for _ in range(warm_ups):
        action()
    synchronize()
    started, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    calls = 0
    while calls == 0 or time.perf_counter() - started < seconds:
        action()
        calls += 1
    busy = time.thread_time() - thread
    synchronize()
    wall = time.perf_counter() - started
    return Rate(calls * count / wall, (time.process_time() - cpu) / wall, busy / wall)


def files_of(folder: Path, count: int = 1_000_000) -> list[NDArray[np.uint8]]:
    """The first files of a folder, whole."""
    paths = [path for path in sorted(folder.glob("*")) if path.is_file()]
    return [np.fromfile(path, np.uint8) for path in paths[:count]]


def index_of(folder: Path) -> Index:
    return build(folder)[0]


def loader_of(index: Index, settings: LoaderSettings, on: torch.device) -> TrainingLoader:
    """A loader of one process from step 0; what it rejects is printed."""

    def report(event: Event) -> None:
        if isinstance(event, Rejected):
            print(event)

    return TrainingLoader(
        index,
        settings,
        rank=0,
        world_size=1,
        start_step=0,
        device=on,
        on_event=report,
        rejected={},
    )


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """How a command of btpipe ended, what it printed, and its events."""

    code: int
    text: str
    events: list[dict[str, object]]

    def of(self, kind: str) -> list[dict[str, object]]:
        """The events of a kind, in order."""
        return [event for event in self.events if event["event"] == kind]


def btpipe(
    *words: str, folder: Path, seconds: float = 300.0, json_lines: bool = True
) -> CommandResult:
    """Runs a command of btpipe; after `seconds` it gets SIGTERM, and 30 s later SIGKILL."""
    options = ["--json"] if json_lines else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path[1:]])}
    child = subprocess.Popen(
        [sys.executable, "-m", "btpipe", *words, *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.terminate()
        try:
            text, _ = child.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            text, _ = child.communicate()
    print(f"$ btpipe {' '.join(words)}\n{text[-6000:]}\n# exit code {child.returncode}", flush=True)
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return CommandResult(child.returncode, text, [json.loads(line) for line in lines])


def cores() -> int:
    return runtime.cores()


def compile_setting(workspace: Workspace) -> str:
    """`run.compile` for a stage: off in a dry run, and where there is no compiler to call."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    has_compiler = any(map(shutil.which, ("cc", "gcc", "clang"))) and header.is_file()
    if not has_compiler:
        print_result("no compiler, or no Python.h", run_compile="off")
    return "run.compile=on" if has_compiler and not workspace.small else "run.compile=off"
