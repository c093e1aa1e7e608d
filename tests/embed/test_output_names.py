"""Names of outputs: what can be written is, whatever it looks like; all else is refused at once."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from tiny_run import draw_images
from typer.testing import CliRunner, Result

from btpipe.cli import app
from btpipe.errors import BtpipeError

IMAGES = 4
NAMED = {
    "s3://bucket/v.parquet": (2, "is a URL"),
    "https://host/v.parquet": (2, "is a URL"),
    "file/v.parquet": (2, "file is not a folder"),
    "file/deep/v.parquet": (2, "file is not a folder"),
    "link/v.parquet": (2, "link is not a folder"),
    f"{'n' * 250}.parquet": (2, "bytes"),
    f"{'n' * 244}.parquet": (2, "bytes"),
    f"{'n' * 240}.parquet": (2, "bytes"),
    f"{'n' * 245}.npy": (2, "bytes"),
    f"{'n' * 300}/v.parquet": (2, "bytes"),
    f"{'folder/' * 600}v.parquet": (2, "bytes"),
    "/proc/v.parquet": (5, "cannot write"),
    "/proc/deep/v.parquet": (5, "cannot write"),
    ".": (2, "name"),
    "..": (2, "name"),
    "/": (2, "name"),
    "folder.parquet": (2, "a folder of that name is there"),
    "file": (2, "a file of that name is there"),
    "pipe": (2, "a file of that name is there"),
    "a.parquet": (2, "a folder of that name is there"),
    "b.npy": (2, "a folder of that name is there"),
    "c.parquet": (2, "a file of that name is there"),
}
"""`--out`, the exit code, and what is said."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images, and things in the way of outputs."""
    draw_images(tmp_path / "images", IMAGES)
    for name in ("folder.parquet", "a.rejects.parquet", "b.npy.ids.parquet"):
        (tmp_path / name).mkdir()
    for name in ("file", "c.parquet.work"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def embed(out: str, bundle: Path, images: str = "images") -> Result:
    return run("embed", images, "--out", out, "--model", str(bundle), "--device", "cpu")


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def refusal(done: Result) -> tuple[int, str]:
    """The exit code of a command that failed, and what it says."""
    assert isinstance(done.exception, BtpipeError), repr(done.exception)
    return done.exception.exit_code, str(done.exception)


@pytest.mark.parametrize("out", NAMED)
def test_a_name_that_cannot_be_written_is_refused_before_any_input_is_listed(
    folder: Path, bundle: Path, out: str
) -> None:
    code, words = NAMED[out]
    before = tree(folder)
    for done in (
        embed(out, bundle, images="not-listed"),
        run("merge", "none.parquet", "--out", out),
    ):
        found, said = refusal(done)
        assert (found, words in said.partition("\n")[0]) == (code, True), said
    assert tree(folder) == before


@pytest.mark.parametrize(
    "words",
    [
        ("scan", "not-listed"),
        ("shard", "not-listed"),
        ("export", "not-there"),
        ("dupes", "not-there.parquet"),
        ("outliers", "not-there.parquet"),
    ],
)
@pytest.mark.parametrize("out", ["s3://bucket/a.parquet", "file/a.parquet", "/proc/a.parquet"])
def test_other_outputs_are_refused_as_early(folder: Path, words: list[str], out: str) -> None:
    before = tree(folder)
    code, said = refusal(run(*words, "--out", out))
    assert (
        code,
        NAMED["/proc/v.parquet" if "proc" in out else out.replace("/a.", "/v.")][1] in said,
    ) == (
        5 if "proc" in out else 2,
        True,
    ), said
    assert tree(folder) == before


@pytest.mark.parametrize(
    "out",
    ["a:b/v.parquet", "run-2026-01-01T10:00:00.parquet", "s3:v.npy", "a:b", "a:v.safetensors"],
)
def test_a_name_with_a_colon_is_a_name(folder: Path, bundle: Path, out: str) -> None:
    index = Path(out).with_name("c:index.parquet")
    assert run("scan", "images", "--out", str(index)).exit_code == 0
    for images in ("images", str(index)):  # the second finds what is there
        done = embed(out, bundle, images)
        assert done.exit_code == 0, repr(done.exception)
    for words in (("verify", out), ("inspect", out), ("verify", str(index)), ("search", out, "0")):
        done = run(*words)
        assert done.exit_code == 0, (words, repr(done.exception))
    half = Path(out).with_name("half:0.parquet")
    share = ["--model", str(bundle), "--shard", "0/1", "--device", "cpu"]
    assert run("embed", "images", "--out", str(half), *share).exit_code == 0
    done = run("merge", str(half), "--out", str(Path(out).with_name("w:hole.parquet")))
    assert done.exit_code == 0, repr(done.exception)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(
    folder: Path, bundle: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre without `-o flock` answers, and several FUSE mounts."""

    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as without:
        without.setattr(fcntl, "flock", flock)
        for done in (embed("v.parquet", bundle), run("shard", "images", "--out", "small")):
            code, said = refusal(done)
            assert code == 5
            assert os.strerror(number) in said
            assert "to do: " in said
    assert embed("v.parquet", bundle).exit_code == 0
