"""Real processes that hang, die and are killed, with a stand-in for the decoder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_decoder import decode
from stand_in_stillborn import decode as stillborn

from btpipe.data.rejects import BadInputError
from btpipe.data.supervisor import supervise
from btpipe.errors import MachineError

LIMIT_SECONDS = 0.4
SLACK_SECONDS = 20.0
"""For starting a few processes on a busy machine; a hang would take an hour."""


def answers(
    tasks: list[str], processes: int = 2, limit_seconds: float = LIMIT_SECONDS
) -> dict[int, str | BadInputError]:
    got = list(
        supervise(decode, iter(enumerate(tasks)), processes=processes, limit_seconds=limit_seconds)
    )
    assert len(got) == len(tasks), "each task has one answer"
    return dict(got)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("processes", [1, 3])
def test_every_task_has_its_own_answer(processes: int) -> None:
    tasks = [f"task {i}" for i in range(20)]
    assert answers(tasks, processes) == {i: task.upper() for i, task in enumerate(tasks)}


def test_no_tasks_start_no_process() -> None:
    assert answers([]) == {}


def test_a_task_larger_than_a_pipe_arrives_whole() -> None:
    assert answers(["x" * 3_000_000]) == {0: "X" * 3_000_000}


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("kill", "decoding ended the process (SIGKILL)"),
        ("segfault", "decoding ended the process (SIGSEGV)"),
        ("exit", "decoding ended the process (exit code 7)"),
        ("sleep", "decoding took longer than 0.4 s"),
    ],
)
def test_a_task_that_takes_its_process_along_is_lost_and_no_other(deed: str, how: str) -> None:
    started = time.monotonic()
    got = answers(["a", deed, "b", "c"])
    assert {i: str(answer) for i, answer in got.items()} == {0: "A", 1: how, 2: "B", 3: "C"}
    assert isinstance(got[1], BadInputError)
    assert time.monotonic() - started < SLACK_SECONDS


def test_a_lost_task_was_tried_twice_and_never_more(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert isinstance(answers([f"log-kill {log}", "a"])[0], BadInputError)
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("deed", ["first-kill", "first-sleep"])
def test_a_task_that_does_it_once_is_answered(tmp_path: Path, deed: str) -> None:
    assert answers([f"{deed} {tmp_path / 'was-here'}", "a"]) == {0: "well again", 1: "A"}


def test_the_second_try_has_the_machine_and_a_process_for_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    answers([f"log-kill {log}", *[f"log-long {log}"] * 4], processes=3, limit_seconds=60)
    lines = [line.split() for line in log.read_text().splitlines()]
    begun: set[str] = set()
    tries = []
    for event, task, process in lines:
        begun = begun | {process} if event == "begin" else begun - {process}
        if task == "log-kill":
            tries.append((process, begun - {process}))
            begun = begun - {process}
    (first, _), (second, neighbours) = tries
    assert first != second
    assert neighbours == set()


def test_many_that_hang_and_die_leave_the_others_answered() -> None:
    deeds = ["sleep", "kill", "a"] * 2 + ["exit", "b"]
    got = answers(deeds)
    assert {i for i, answer in got.items() if isinstance(answer, BadInputError)} == {0, 1, 3, 4, 6}


def test_who_leaves_early_leaves_no_process_behind() -> None:
    running = supervise(decode, iter(enumerate(["pid"] * 50)), processes=2, limit_seconds=60)
    processes = {int(str(next(running)[1])) for _ in range(8)}
    assert all(is_running(process) for process in processes)
    running.close()
    assert not any(is_running(process) for process in processes)


SUPERVISED = """
import sys
from btpipe.data.supervisor import supervise
from stand_in_decoder import decode
if __name__ == "__main__":
    tasks = iter(enumerate(["pid", "sleep"]))
    for _, answer in supervise(decode, tasks, processes=1, limit_seconds=3600):
        print(answer, flush=True)
"""


def test_a_supervisor_that_is_killed_takes_a_hanging_process_along(tmp_path: Path) -> None:
    script = tmp_path / "supervised.py"
    script.write_text(SUPERVISED)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}
    ) as supervisor:
        assert supervisor.stdout
        process = int(supervisor.stdout.readline())
        assert is_running(process)
        supervisor.send_signal(signal.SIGKILL)
    until = time.monotonic() + SLACK_SECONDS
    while is_running(process) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_running(process)


def test_processes_that_cannot_start_are_an_error_and_no_loop() -> None:
    tasks = iter([(0, "a")])
    with pytest.raises(MachineError, match=r"cannot start: it ended the process \(exit code 9\)"):
        list(supervise(stillborn, tasks, processes=1, limit_seconds=LIMIT_SECONDS))
