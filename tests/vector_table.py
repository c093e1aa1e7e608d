"""A table of vectors as `btpipe embed` writes it, from vectors that a test makes up."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from btpipe.embed import outputs, table

BUNDLE = "b" * 64


def write(
    path: Path,
    vectors: NDArray[np.float32],
    *,
    paths: Sequence[str] = (),
    labels: Sequence[str | None] = (),
    digests: Sequence[str] = (),
    sizes: Sequence[tuple[int, int]] = (),
    root: Path | str = "",
    bundle: str = BUNDLE,
) -> Path:
    """Rows 0.jpg, 1.jpg ... of 10 x 10 pixels where nothing else is said."""
    count, dimension = vectors.shape
    names = list(paths) or [f"{row}.jpg" for row in range(count)]
    footer = table.Footer(bundle, "i", "{}", "fp32", str(root), dimension)
    shapes = list(sizes) or [(10, 10)] * count
    listed = pa.table(
        {
            "path": pa.array(names, pa.string()),
            "path_bytes": pa.nulls(count, pa.binary()),
            "bytes": pa.array([1000] * count, pa.int64()),
            "mtime_ns": pa.array([10**18] * count, pa.int64()),
            "width": pa.array([width for width, _ in shapes], pa.int32()),
            "height": pa.array([height for _, height in shapes], pa.int32()),
            "label": pa.array(list(labels) or [None] * count, pa.string()),
        }
    )
    name_digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    rows = table.rows(footer, listed, list(digests) or name_digests, vectors)
    outputs.write(path, path.with_name(f"beside{path.suffix}"), footer, [rows])
    outputs.take_place(path, path.with_name(f"beside{path.suffix}"))
    return path
