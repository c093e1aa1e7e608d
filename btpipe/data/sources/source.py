"""One origin of images in an index: a folder, a list, named files, a tar or a parquet file."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

Kind = Literal["folder", "list", "files", "tar", "parquet", "synthetic"]
"""folder: all that is found below it; list: what a list names; files: these very files; synthetic:
made in memory."""

SHARDS = "shards"
"""The kind, in its manifest, of a folder that `btpipe shard` made."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows of an index come from, as an absolute path or a URL.

    `place` is the folder, the list, the folder that files are named from, or the container. A row's
    path is `prefix` and its name there. `bytes` and `mtime_ns` are a container's or a list's own,
    -1 for the others; `column` holds the images of a parquet file.
    """

    kind: Kind
    place: str
    prefix: str = ""
    bytes: int = -1
    mtime_ns: int = -1
    column: str = ""

    @property
    def is_container(self) -> bool:
        """Whether images lie within one file."""
        return self.kind in {"tar", "parquet", "synthetic"}

    @property
    def base(self) -> str:
        """The folder, or URL, that names of files are relative to."""
        return self.place.rpartition("/")[0] if self.kind == "list" else self.place

    def listed(self) -> "Source":
        """What it becomes where an index is the input: the files that it names, and no others."""
        if self.is_container:
            return self
        return dataclasses.replace(self, kind="files", place=self.base, bytes=-1, mtime_ns=-1)


def to_json(sources: Sequence[Source]) -> str:
    """Sources as they stand in an index file; bytes that are not UTF-8 survive."""
    return json.dumps([dataclasses.asdict(source) for source in sources])


def from_json(text: str) -> tuple[Source, ...]:
    """What `to_json` wrote.

    Raises:
        ValueError, TypeError: anything else.
    """
    return tuple(Source(**entry) for entry in json.loads(text))
