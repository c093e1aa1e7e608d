"""The doctor, on this machine and on ones that lack something: real processes, real limits."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path


def doctor(
    folder: Path, *, files: int = 0, **environment: str
) -> "tuple[int, dict[str, list[str]], str]":
    """Exit code, rows by name (found, verdict, what to do), and standard error."""

    def limit() -> None:
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    done = subprocess.run(
        [sys.executable, "-m", "btpipe", "doctor", "--json"],
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (tabled,) = (event for event in events if event["event"] == "Tabled")
    return done.returncode, {name: rest for name, *rest in tabled["rows"]}, done.stderr


def test_here_everything_works_that_tests_need(tmp_path: Path) -> None:
    code, rows, _ = doctor(tmp_path)
    assert code == 0
    assert "decodes" in rows["DALI"][0]
    assert "CPUExecution" in rows["onnxruntime"][0]
    assert str(tmp_path) in rows["disk"][0]
    assert all(verdict != "broken" for _, verdict, _ in rows.values())


def test_what_is_missing_is_named_with_what_to_type(tmp_path: Path) -> None:
    """No compiler on the path, few files, and an onnxruntime that cannot be loaded."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    bare = tmp_path / "bin"
    bare.mkdir()
    code, rows, said = doctor(tmp_path, files=256, PATH=str(bare), CXX="", PYTHONPATH=str(tmp_path))
    assert code == 5
    assert rows["onnxruntime"][1] == "broken"
    assert "libcudart.so.13" in rows["onnxruntime"][0]
    assert "not usable: onnxruntime" in said
    assert rows["compiler"][1:] == ["look", "apt install g++, or --set run.compile=off"]
    assert rows["open files"] == ["256 at a time", "look", "ulimit -n 256"]


def test_a_folder_that_takes_no_file_is_broken() -> None:
    code, rows, said = doctor(Path("/proc"))
    assert code == 5
    assert rows["disk"][1] == "broken"
    assert "not usable: disk" in said
