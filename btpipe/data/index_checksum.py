"""What an index file says of its own content, so that a flipped bit in it can be seen."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from btpipe.data import index_mmap
from btpipe.data.sources import Source, source


def of(table: pa.Table, root: Path, sources: Sequence[Source]) -> dict[str, str]:
    """sha256 of the table's values (`content`), and of root and sources (`origin`)."""
    origin = os.fsencode(root) + b"\0" + source.to_json(sources).encode()
    return {"content": index_mmap.digest(table), "origin": hashlib.sha256(origin).hexdigest()}


def broken(path: Path, table: pa.Table, root: Path, sources: Sequence[Source]) -> list[str]:
    """What of the index file `path` is not as it was saved; older files do not say, and pass."""
    metadata = pq.read_schema(path.absolute()).metadata or {}
    digests = of(table, root, sources)
    return [
        name
        for name, digest in digests.items()
        if metadata.get(name.encode()) not in {None, digest.encode()}
    ]
