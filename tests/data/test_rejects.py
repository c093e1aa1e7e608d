"""Inputs that cannot be used: their kinds, and the files that list them."""

import errno
import os
from pathlib import Path

import pytest
from tiny_run import draw_images

from btpipe.data import index, rejects
from btpipe.events import Kind, Rejected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOENT, "No such file or directory"), "gone"),
        (FileNotFoundError("a.jpg"), "gone"),
        (OSError(errno.EINVAL, "not a regular file"), "content"),
        (OSError("Corrupt snappy compressed data."), "content"),
        (TimeoutError("timed out"), "machine"),
        *(
            (OSError(code, os.strerror(code)), "machine")
            for code in (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT)
        ),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_is_gone_or_strange_or_the_machines_fault(
    error: OSError, kind: Kind
) -> None:
    assert rejects.unreadable(error).kind == kind


def test_a_list_of_rejects_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = [
        Rejected('a, b\n"c".jpg', "decode", "content", "damaged", 12, 1_700_000_000_000_000_001),
        Rejected("gone.jpg", "index", "gone", "cannot be read: no such file"),
    ]
    rejects.write(tmp_path / "rejects.csv", written)
    assert rejects.read(tmp_path / "rejects.csv") == written


def test_a_listing_tells_a_damaged_file_from_one_that_is_gone(tmp_path: Path) -> None:
    draw_images(tmp_path, 1)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    names = ["a/000.jpg", "cut.jpg", "gone.jpg"]
    (tmp_path / "l.txt").write_text("\n".join(names))
    _, rejected = index.build(tmp_path / "l.txt")
    assert {bad.path: bad.kind for bad in rejected} == {"cut.jpg": "content", "gone.jpg": "gone"}
