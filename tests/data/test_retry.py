import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_run import draw_images

from btpipe import recipe, runtime
from btpipe.data import index
from btpipe.data.pipeline.train_loader import Batch, LoaderSettings, TrainingLoader
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import TRIES, Patience, reading_threads, waiting_at_most
from btpipe.errors import MachineError, Stopped
from btpipe.events import Event

FAILING = Path("/proc/self/mem")
"""A regular file whose first bytes nobody can read: the kernel says EIO, as a dying disk does."""
HEALS_AFTER_SECONDS = 0.3


class Stumbling:
    """A source that fails with these errors, one after the other, and then gives its bytes."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def read(self) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"content"


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)),
        TimeoutError("no answer"),
        ConnectionResetError("gone"),
    ],
    ids=repr,
)
def test_what_may_pass_is_read_again(error: Exception) -> None:
    source = Stumbling(error, error)
    assert Patience("here").read(source.read) == b"content"
    assert source.calls == 3


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "gone"), PermissionError(errno.EACCES, "no")],
    ids=repr,
)
def test_what_will_not_pass_is_told_at_once(error: Exception) -> None:
    source = Stumbling(error)
    with pytest.raises(type(error)):
        Patience("here").read(source.read)
    assert source.calls == 1


def first_batches(images: index.Index, events: list[Event]) -> list[Batch]:
    chosen = recipe.Recipe(
        data=recipe.Data(batch_size=8, image_size=32, threads=2, max_bad=0.2),
        optim=recipe.Optim(epochs=1, warmup_epochs=0),
    )
    with TrainingLoader(
        images,
        LoaderSettings.of(chosen, len(images)),
        rank=0,
        world_size=1,
        start_step=0,
        device=torch.device("cpu"),
        on_event=events.append,
        rejected={},
    ) as loader:
        return list(loader)


def test_a_disk_that_stumbles_costs_no_image(tmp_path: Path) -> None:
    paths = draw_images(tmp_path / "images", 16)
    images, _ = index.build(tmp_path / "images")
    healthy = first_batches(images, [])
    aside = tmp_path / "aside.jpg"
    paths[5].rename(aside)
    paths[5].symlink_to(FAILING)
    healing = threading.Timer(HEALS_AFTER_SECONDS, os.replace, (aside, paths[5]))
    events: list[Event] = []
    healing.start()
    got = first_batches(images, events)
    healing.join()
    assert events == []
    for one, other in zip(healthy, got, strict=True):
        assert one.images.tolist() == other.images.tolist()
        assert torch.equal(one.views[0], other.views[0])


def test_a_disk_that_stumbles_while_images_are_listed_costs_none(tmp_path: Path) -> None:
    (path,) = draw_images(tmp_path / "images", 1)
    (tmp_path / "list.txt").write_text(f"{path}\n")
    aside = tmp_path / "aside.jpg"
    path.rename(aside)
    path.symlink_to(FAILING)
    healing = threading.Timer(HEALS_AFTER_SECONDS, os.replace, (aside, path))
    healing.start()
    images, rejected = index.build(tmp_path / "list.txt")
    healing.join()
    assert (len(images), rejected) == (1, [])


def test_a_file_that_fails_while_its_folder_gives_others_is_named_after_some_tries(
    tmp_path: Path,
) -> None:
    paths = draw_images(tmp_path, 4)
    with waiting_at_most(6.0):
        images, _ = index.build(tmp_path)
        paths[0].unlink()
        paths[0].symlink_to(FAILING)
        row = images.table["path"].to_pylist().index(paths[0].relative_to(tmp_path).as_posix())
        # Nothing else is being read: the others are, to see that the folder is there.
        with pytest.raises(BadInputError, match="Input/output error") as caught:
            images.read_bytes(row)
    rejected = images.reject(row, "decode", caught.value)
    assert (rejected.stage, rejected.kind) == ("read", "machine")


def test_a_file_is_given_up_only_after_reads_of_others(tmp_path: Path) -> None:
    source, others = Stumbling(*(OSError(errno.EIO, "broken") for _ in range(99))), Stumbling()
    with waiting_at_most(6.0), pytest.raises(OSError, match="broken"):
        Patience("here").read(source.read, others.read)
    assert (source.calls, others.calls) == (TRIES, TRIES - 1)


def test_a_source_that_gives_nothing_ends_the_job_and_not_a_file() -> None:
    sources = [Stumbling(*(OSError(errno.EIO, "broken") for _ in range(999))) for _ in range(2)]
    started = time.monotonic()
    with waiting_at_most(0.5), pytest.raises(MachineError, match=r"given nothing for 0\.5 s"):
        Patience("here").read(sources[0].read, sources[1].read)
    assert 0.5 <= time.monotonic() - started < 2


def test_whoever_waits_for_a_source_hears_a_stop_signal() -> None:
    source = Stumbling(*(TimeoutError("no answer") for _ in range(999)))
    waiting = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    started = time.monotonic()
    waiting.start()
    with runtime.StopSignals(), pytest.raises(Stopped, match="SIGTERM"):
        Patience("here").read(source.read)
    assert time.monotonic() - started < 2
    assert not runtime.StopSignals.asked


def test_threads_that_wait_for_a_source_end_with_what_they_read_for() -> None:
    source = Stumbling(*(TimeoutError("no answer") for _ in range(999)))
    started = time.monotonic()
    with reading_threads(2) as pool:
        waiting = pool.submit(Patience("here").read, source.read)
        time.sleep(0.3)
    assert time.monotonic() - started < 2
    assert isinstance(waiting.exception(), Stopped)


def test_a_training_whose_folder_gives_nothing_ends_and_no_image_is_replaced(
    tmp_path: Path,
) -> None:
    paths = draw_images(tmp_path / "images", 16)
    with waiting_at_most(0.5):
        images, _ = index.build(tmp_path / "images")
        for path in paths:
            path.unlink()
            path.symlink_to(FAILING)
        events: list[Event] = []
        with pytest.raises(MachineError, match="given nothing"):
            first_batches(images, events)
    assert events == []
