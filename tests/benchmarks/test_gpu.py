"""The stages that a GPU must pass, here on the CPU: they fail alone, in words, and in time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.workspace import PROJECT, Workspace

WHOLE_SECONDS = 900
"""For all stages in small; four minutes on two quiet cores."""


def stage_of(name: str) -> gpu.Stage:
    return next(stage for stage in (*gpu.TRAINING, *gpu.EMBEDDING) if stage.name == name)


def command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_list_names_every_stage_with_its_seconds() -> None:
    lines = command("list").stdout.splitlines()
    assert len(lines) == len(gpu.TRAINING) + len(gpu.EMBEDDING)
    for stage in (*gpu.TRAINING, *gpu.EMBEDDING):
        assert stage.planned <= stage.limit
        assert any(stage.decides in line for line in lines)


def test_a_stage_that_fails_is_red_and_one_that_hangs_is_over_time_and_both_say_why(
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path, tmp_path / "data", small=True)
    prepared = gpu.one(stage_of("prepare"), 60, workspace, tmp_path / "prepare.log")
    assert (prepared.how, prepared.results[-1]["jpegs"]) == ("ok", 64)
    assert (workspace.nasty / "bad-marker.jpg").is_file()
    (workspace.nasty / "bad-missing.jpg").write_bytes((workspace.nasty / "000.jpg").read_bytes())
    red = gpu.one(stage_of("badfiles"), 120, workspace, tmp_path / "badfiles.log")
    assert red.how == "red"
    wrong = [str(result["what"]) for result in red.results if result["name"] == "WRONG"]
    assert wrong == ["8 threads: 6 of 7 bad files named"]
    late = gpu.one(stage_of("pixels"), 0.5, workspace, tmp_path / "pixels.log")
    assert late.how == "over time"
    assert late.seconds < 10


@pytest.mark.slow
def test_every_stage_ends_well_on_the_cpu_in_small(tmp_path: Path) -> None:
    words = ("--small", "--work", str(tmp_path / "work"), "--out", str(tmp_path))
    ended = command("all", str(WHOLE_SECONDS), *words)
    record = json.loads((tmp_path / "gpu-all.json").read_text())
    assert {stage["name"]: stage["how"] for stage in record["stages"]} == dict.fromkeys(
        [stage.name for stage in gpu.CALLS["all"]], "ok"
    ), ended.stdout
    assert ended.returncode == 0
