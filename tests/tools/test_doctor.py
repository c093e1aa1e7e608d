"""The doctor, on this machine and on ones that lack something: real processes, real limits."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import event_schema
import numpy as np
import pytest
import torch

from btpipe import runtime
from btpipe.tools import doctor_gpu, gpu_pixels


def doctor(
    folder: Path, *, files: int = 0, **environment: str
) -> "tuple[int, dict[str, list[Any]], str]":
    """Exit code, rows by name (found, verdict, what to do, values), and the error."""

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
    examined, *errors = event_schema.read(done.stdout)
    rows = {row.pop("name"): list(row.values()) for row in examined["findings"]}
    return done.returncode, rows, "".join(error["what"] for error in errors)


def first(folder: Path) -> str:
    """PYTHONPATH with this folder before what it has."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_here_everything_works_that_tests_need(tmp_path: Path) -> None:
    code, rows, _ = doctor(tmp_path)
    assert code == 0
    assert "decodes" in rows["DALI"][0]
    mapped = [path.resolve() for path in runtime.mapped_nvjpegs()]
    assert not mapped or mapped[0].name in rows["DALI"][0]
    assert "CPUExecution" in rows["onnxruntime"][0]
    assert str(tmp_path) in rows["disk"][0]
    assert all(verdict != "broken" for _, verdict, _, _ in rows.values())
    assert rows["processor"][3]["cores"] == runtime.cores()
    assert rows["memory"][3]["free_bytes"] > 0
    assert rows["disk"][3]["folder"] == str(tmp_path)
    assert "CPUExecution" in rows["onnxruntime"][3]["providers"]
    assert all(values for _, verdict, _, values in rows.values() if verdict == "ok")


def test_what_is_missing_is_named_with_what_to_type(tmp_path: Path) -> None:
    """No compiler on the path, few files, and an onnxruntime that cannot be loaded."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    bare = tmp_path / "bin"
    bare.mkdir()
    changed = {"PATH": str(bare), "CXX": "", "PYTHONPATH": first(tmp_path)}
    code, rows, error = doctor(tmp_path, files=256, **changed)
    assert code == 5
    assert rows["onnxruntime"][1] == "broken"
    assert "libcudart.so.13" in rows["onnxruntime"][0]
    assert "not usable: onnxruntime" in error
    assert rows["compiler"][1] == "look"
    assert "apt install g++, or --set run.compile=off" in rows["compiler"][2]
    assert "--accept-change run.compile" in rows["compiler"][2]
    limits = {"limit": 256, "hard_limit": 256}
    assert rows["open files"] == ["256 at a time", "look", "ulimit -n 256", limits]


def test_two_packages_of_onnxruntime_are_broken_in_one_folder_alone(tmp_path: Path) -> None:
    other = tmp_path / "onnxruntime-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.0\n")
    _, rows, _ = doctor(tmp_path, PYTHONPATH=first(tmp_path))
    assert rows["onnxruntime"][1] == "ok"
    gpu = tmp_path / "onnxruntime_gpu-1.0.dist-info"
    gpu.mkdir()
    text = "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n"
    (gpu / "METADATA").write_text(text)
    code, rows, _ = doctor(tmp_path, PYTHONPATH=first(tmp_path))
    assert (code, rows["onnxruntime"][1]) == (5, "broken")
    assert "two packages over each other" in rows["onnxruntime"][0]


def test_a_folder_that_takes_no_file_is_broken() -> None:
    code, rows, error = doctor(Path("/proc"))
    assert code == 5
    assert rows["disk"][1] == "broken"
    assert "not usable: disk" in error


@pytest.mark.skipif(not runtime.gpu_count(), reason="no GPU")
def test_libraries_compute_on_every_gpu_what_the_cpu_computes() -> None:
    findings = doctor_gpu.computed()
    assert [finding.verdict for finding in findings] == ["ok"] * 3, findings


@pytest.mark.skipif(runtime.gpu_count() > 0, reason="a GPU")
def test_without_a_gpu_nothing_is_compared() -> None:
    assert doctor_gpu.computed() == []


def test_a_result_of_zeros_is_told_with_what_was_expected() -> None:
    """What a GPU leaves behind that computes nothing; and what is not a number."""
    expected = np.full((4, 4), 256.4, np.float32)
    doctor_gpu.require("a product", expected * np.float32(1 + 1e-5), expected, 1e-4)
    message = (
        r"a product is 0 on average, 256.4 expected; largest difference 1.0e\+00, 1e-04 allowed"
    )
    with pytest.raises(doctor_gpu.Wrong, match=message) as wrong:
        doctor_gpu.require("a product", np.zeros_like(expected), expected, 1e-4)
    assert (wrong.value.values["difference"], wrong.value.values["allowed"]) == (1.0, 1e-4)
    with pytest.raises(doctor_gpu.Wrong, match="is nan on average"):
        doctor_gpu.require("a product", expected * np.float32(np.nan), expected, 1e-4)


def test_what_is_compared_is_far_from_zero() -> None:
    """Zeros differ from it by more than is allowed."""
    views = [gpu_pixels.evaluation_views(None), *gpu_pixels.training_views(torch.device("cpu"))]
    for view in views:
        assert view.shape == gpu_pixels.SHAPE
        assert gpu_pixels.grey_levels(np.zeros_like(view), view) > 50
        assert gpu_pixels.grey_levels(view, view) == 0
    assert np.isnan(gpu_pixels.grey_levels(views[0][:1], views[0]))
