"""The pictures behind the rows of a table, small, for pages: read from where they lay."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from btpipe.data import index
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import CONTACT_SECONDS, Patience
from btpipe.data.sources import storage
from btpipe.embed import table
from btpipe.errors import BtpipeError
from btpipe.events import ignore
from btpipe.explore.tables import Vectors
from btpipe.pages import frame

_DECODED_SIDE = 2 * frame.THUMBNAIL_SIDE


class Pictures:
    """The originals of a table's rows, below `images`.

    Without, below the folder that the table names, looked for beside the table and in the working
    folder, or below these two themselves: wherever the first row's picture is.

    All thumbnails together take `frame.THUMBNAIL_BYTES` at most; then there are no more of them.
    `shown` and `missing` count.
    """

    def __init__(self, vectors: Vectors, images: Path | None) -> None:
        self._vectors = vectors
        self._root = os.fspath(images) if images else ""
        self._room = frame.THUMBNAIL_BYTES
        self._containers: dict[str, tuple[index.Index, dict[str, int]] | None] = {}
        self._patience = Patience("the pictures", CONTACT_SECONDS)
        self.shown, self.missing = 0, 0
        if not images:
            self._look_around()

    def _look_around(self) -> None:
        name = self._vectors.footer.get(table.ROOT, "")
        folders = [self._vectors.path.absolute().parent, Path.cwd()]
        for folder in [*(folder / name for folder in folders), *folders]:
            self._root = os.fspath(folder)
            location = self.location(0) or _split(self._vectors.text("path", 0))[0]
            if (folder / location).is_file():
                return
        self._root = name

    def figure(self, row: int, lines: Sequence[str]) -> str:
        """A picture with lines of HTML below it; it links to its file where that is one."""
        source = self._source(row)
        location = self.location(row)
        if source is None:
            inside = '<span class="muted">no picture</span>'
        else:
            alt = frame.text(self._vectors.text("path", row))
            inside = f'<img loading="lazy" alt="{alt}" src="{source}">'
        box = f'<div class="picture">{inside}</div>'
        if location and not storage.is_url(location) and Path(location).is_file():
            box = f'<a href="{frame.text(Path(location).absolute().as_uri())}">{box}</a>'
        captions = "".join(f"<div>{line}</div>" for line in lines)
        return f"<figure>{box}<figcaption>{captions}</figcaption></figure>"

    def note(self) -> str:
        """What a reader should know about pictures that are not there; "" where all are."""
        if not self.missing:
            return ""
        return (
            f"{self.missing} pictures are not shown: not found below {self._root or 'no root'}"
            f" (--images DIR), or more than {frame.THUMBNAIL_BYTES // 1_000_000} MB in all"
        )

    def _source(self, row: int) -> str | None:
        """The thumbnail as an address, while there is room."""
        source = None
        if self._room > 0:
            with contextlib.suppress(
                OSError, ValueError, BtpipeError, BadInputError, PIL.Image.DecompressionBombError
            ):
                source = frame.embedded(self._thumbnail(row))
        if source is None or len(source) > self._room:
            self.missing += 1
            return None
        self._room -= len(source)
        self.shown += 1
        return source

    def _thumbnail(self, row: int) -> bytes:
        with PIL.Image.open(io.BytesIO(self.content(row))) as picture:
            picture.draft("RGB", (_DECODED_SIDE, _DECODED_SIDE))
            return frame.thumbnail(PIL.ImageOps.exif_transpose(picture))

    def content(self, row: int) -> bytes:
        """The bytes of a row's picture; OSError, KeyError or BadInputError where there is none."""
        location = self.location(row)
        if location is not None:
            return self._patience.read(lambda: storage.read(location))
        path = self._vectors.text("path", row)
        container, _, _ = _split(path)
        members = self._container(container)
        if members is None:
            raise FileNotFoundError(path)
        listed, rows = members
        return listed.read_bytes(rows[_split(path)[2]])

    def location(self, row: int) -> str | None:
        """The file of a row; None where it is a part of one."""
        exact = self._vectors.cell("path_bytes", row)
        path = os.fsdecode(exact) if isinstance(exact, bytes) else self._vectors.text("path", row)
        if _split(path)[1]:
            return None
        return storage.join(self._root, path)

    def _container(self, name: str) -> tuple[index.Index, dict[str, int]] | None:
        """A tar or a table with pictures, and the rows of its members by name; kept open."""
        if name not in self._containers:
            self._containers[name] = None
            with contextlib.suppress(BtpipeError, OSError):
                listed, _ = index.build([storage.join(self._root, name)], ignore)
                paths = listed.table["path"].to_pylist()
                rows = {_split(path)[2]: row for row, path in enumerate(paths)}
                self._containers[name] = listed, rows
        return self._containers[name]


def _split(path: str) -> tuple[str, str, str]:
    """`a.tar::b.jpg` -> a.tar, ::, b.jpg; `a.parquet#17` likewise; others have no second part."""
    for mark in ("::", "#"):
        before, separator, after = path.rpartition(mark)
        if separator and before.endswith((".tar", ".parquet")):
            return before, separator, after
    return path, "", ""
