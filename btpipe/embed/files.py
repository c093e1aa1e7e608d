"""Image files that somebody names one by one, as the evaluation view's pixels."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data import header
from btpipe.data.index import SCHEMA, Index
from btpipe.data.loader import evaluation_batches
from btpipe.data.sources.rows import readable
from btpipe.data.views import Geometry
from btpipe.errors import UsageError

BATCH = 32


def pixels(paths: Sequence[Path], geometry: Geometry) -> Iterator[NDArray[np.uint8]]:
    """Batches of uint8 `(n, S, S, 3)`, one row for each path, in their order.

    Raises:
        UsageError: a file that is missing, no image, or damaged; the message names it.
    """
    rows = [_row(path) for path in paths]
    index = Index(Path("/"), pa.Table.from_pylist(rows, schema=SCHEMA))
    batches = evaluation_batches(
        index,
        np.arange(len(paths)),
        geometry,
        batch_size=BATCH,
        threads=runtime.cores(),
    )
    for batch in batches:
        for row, reason in batch.rejected:
            raise UsageError(reason, where=paths[row])
        yield batch.pixels


def _row(path: Path) -> dict[str, object]:
    """The file as a row of an index; its name is absolute."""
    try:
        status, found = path.stat(), header.read(path)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from error
    if isinstance(found, header.Refusal):
        raise UsageError(found.reason, where=path, expected="an image file")
    name = os.fsencode(path.absolute())
    return {
        "path": readable(name),
        "path_bytes": name,
        "source": 0,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "width": found.width,
        "height": found.height,
        "orientation": found.orientation,
        "format": found.format,
        "mode": found.mode,
        "label": None,
    }
