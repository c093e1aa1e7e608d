"""An artifact is complete, checked and dated, or it is not there."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from btpipe import artifact
from btpipe.errors import IntegrityError, MachineError

ORIGIN = {"recipe": "a" * 64, "step": 7}


def publish(folder: Path, weights: bytes = b"weights") -> Path:
    with artifact.publish(folder, "bundle", ORIGIN) as inside:
        (inside / "weights.bin").write_bytes(weights)
        (inside / "more").mkdir()
        (inside / "more" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def small_disk(disk: Callable[[str], Path]) -> Path:
    """A disk of 256 kB."""
    return disk("256k")


def test_a_published_artifact_reads_back_with_its_kind_files_and_origin(tmp_path: Path) -> None:
    manifest = artifact.verify(publish(tmp_path / "new" / "a"), "bundle")
    assert manifest.kind == "bundle"
    assert manifest.format_version == artifact.FORMAT_VERSION
    assert manifest.origin == ORIGIN
    assert sorted(manifest.files) == ["more/config.json", "weights.bin"]
    assert manifest.files["weights.bin"]["bytes"] == len(b"weights")


def test_the_digest_is_that_of_the_bytes_and_of_nothing_else(tmp_path: Path) -> None:
    first = artifact.read(publish(tmp_path / "a"), "bundle").digest
    assert artifact.read(publish(tmp_path / "b"), "bundle").digest == first
    assert artifact.read(publish(tmp_path / "c", b"other"), "bundle").digest != first
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["digest"] == first


def test_a_flipped_bit_is_found_by_verify_and_the_file_is_named(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a")
    content = bytearray((folder / "weights.bin").read_bytes())
    content[3] ^= 1
    (folder / "weights.bin").write_bytes(content)
    artifact.read(folder, "bundle")
    with pytest.raises(IntegrityError, match=r"weights\.bin: its bytes changed"):
        artifact.verify(folder, "bundle")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_cut_file_is_found_by_read(tmp_path: Path, damage: str) -> None:
    file = publish(tmp_path / "a") / "weights.bin"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"weigh")
    with pytest.raises(IntegrityError, match=r"weights\.bin: found (nothing|5 bytes)\nexpected: 7"):
        artifact.read(tmp_path / "a", "bundle")


def test_a_newer_format_is_refused_with_the_version_that_reads_it(tmp_path: Path) -> None:
    path = publish(tmp_path / "a") / "manifest.json"
    newer = {**json.loads(path.read_text()), "format_version": 99, "btpipe_version": "8.1.0"}
    path.write_text(json.dumps(newer))
    with pytest.raises(
        IntegrityError, match=r"format_version 99(.|\n)*install btpipe 8\.1\.0 or newer"
    ):
        artifact.read(tmp_path / "a", "bundle")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"is a bundle\nexpected: a checkpoint"):
        artifact.read(publish(tmp_path / "a"), "checkpoint")


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json"])
def test_a_folder_without_a_readable_manifest_is_refused(tmp_path: Path, content: str) -> None:
    if content:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"no readable manifest\.json"):
        artifact.read(tmp_path, "bundle")


def test_a_body_that_raises_leaves_nothing_and_keeps_what_stood_there(tmp_path: Path) -> None:
    publish(tmp_path / "a")

    def fail() -> None:
        with artifact.publish(tmp_path / "a", "bundle", {}) as inside:
            (inside / "weights.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "weights.bin").read_bytes() == b"weights"
    artifact.verify(tmp_path / "a", "bundle")


def test_an_artifact_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with artifact.publish(tmp_path / "a", "bundle", {}) as inside:
        (inside / "other.bin").write_bytes(b"new")
    assert list(artifact.verify(tmp_path / "a", "bundle").files) == ["other.bin"]
    assert not (tmp_path / "a" / "weights.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_sweep_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    (tmp_path / "b.tmp-0123abcd").mkdir()
    (tmp_path / "b.tmp-0123abcd" / "weights.bin").write_bytes(b"half")
    (tmp_path / "log.json.tmp-4567cdef").write_text("half")
    artifact.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_written_file_holds_all_of_it_and_nothing_stays_beside(tmp_path: Path) -> None:
    artifact.write_file(tmp_path / "x", b"old")
    artifact.write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_json_values_have_one_digest_whatever_the_order_of_their_keys() -> None:
    assert artifact.json_digest({"a": 1, "b": [2]}) == artifact.json_digest({"b": [2], "a": 1})
    assert artifact.json_digest({"a": 1}) != artifact.json_digest({"a": 2})


def test_a_full_disk_says_so_and_keeps_the_artifact_that_stood_there(small_disk: Path) -> None:
    publish(small_disk / "a")
    with pytest.raises(MachineError, match=r"a: no space left") as caught:
        publish(small_disk / "a", bytes(1024 * 1024))
    assert caught.value.exit_code == 5
    assert [path.name for path in small_disk.iterdir()] == ["a"]
    artifact.verify(small_disk / "a", "bundle")


def test_a_full_disk_leaves_the_old_file_under_its_name(small_disk: Path) -> None:
    artifact.write_file(small_disk / "x", b"old")
    with pytest.raises(MachineError, match="no space left"):
        artifact.write_file(small_disk / "x", bytes(1024 * 1024))
    assert (small_disk / "x").read_bytes() == b"old"
    assert len(list(small_disk.iterdir())) == 1


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from safetensors.numpy import save_file
from btpipe import artifact
from btpipe.errors import MachineError

content, folder = np.random.default_rng(0).random(2**15), Path(sys.argv[1])
writers = {
    "plain": lambda to: artifact.write_file(to, content.tobytes()),
    "parquet": lambda to: pq.write_table(pa.table({"a": content}), to),
    "safetensors": lambda to: save_file({"a": content}, to),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
for name, write in writers.items():
    try:
        with artifact.disk_errors(folder / name):
            write(folder / name)
    except MachineError as error:
        print(error.exit_code, *str(error).splitlines())
"""


def test_a_limit_on_the_size_of_files_is_the_machines_fault_and_named(tmp_path: Path) -> None:
    """As `ulimit -f` sets it; each library that writes has its own words for it."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, name in zip(output, ("plain", "parquet", "safetensors"), strict=True):
        assert line.startswith(f"5 {tmp_path / name}: a file may not grow this large")
        assert "ulimit -f" in line
    assert not (tmp_path / "plain").exists()


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from btpipe import artifact

folder, moment, can_exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
renamed, rename = 0, os.rename

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(*names):
    global renamed
    renamed += 1
    die() if moment == f"rename {renamed}" else rename(*names)

os.rename = counted
if moment == "removal":
    shutil.rmtree = die
if not can_exchange:
    artifact._exchange = lambda *_: False
with artifact.publish(folder, "bundle", {}) as inside:
    (inside / "other.bin").write_bytes(b"new")
"""


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("moment", ["rename 1", "rename 2", "removal"])
def test_a_kill_while_an_artifact_is_replaced_loses_neither(
    tmp_path: Path, moment: str, can_exchange: bool
) -> None:
    """The next start sweeps; file systems that cannot exchange names are as if they could not."""
    publish(tmp_path / "a")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), moment, str(can_exchange)]
    done = subprocess.run(command, check=False)
    assert done.returncode in (-9, 0)
    if can_exchange:  # there is no moment without an artifact of that name
        artifact.verify(tmp_path / "a", "bundle")
    artifact.sweep(tmp_path, "a")
    artifact.verify(tmp_path / "a", "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
