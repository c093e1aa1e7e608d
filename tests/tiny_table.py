"""Tables of vectors without a network: rows whose numbers are sines."""

import resource
from pathlib import Path

import numpy as np
import pyarrow as pa

from btpipe.embed import outputs, table

DIMENSION = 6
ROWS_OF_A_PART = 1000


def footer(dtype: table.Dtype = "float32", dimension: int = DIMENSION) -> table.Footer:
    return table.Footer(
        bundle="b" * 64,
        input="i" * 64,
        preprocessing="{}",
        precision="fp32",
        root="images",
        dimension=dimension,
        dtype=dtype,
    )


def part(
    start: int, count: int, dtype: table.Dtype = "float32", dimension: int = DIMENSION
) -> pa.Table:
    """Rows `start` to `start + count` of an endless table."""
    numbers = range(start, start + count)
    listed = pa.table(
        {
            "path": [f"{'ab'[i % 2]}/{i:06d}.jpg" for i in numbers],
            "path_bytes": pa.array([None] * count, pa.binary()),
            "bytes": pa.array(numbers, pa.int64()),
            "mtime_ns": pa.array([10**18 + i for i in numbers], pa.int64()),
            "width": pa.array([40] * count, pa.int32()),
            "height": pa.array([30] * count, pa.int32()),
            "label": pa.array(["ab"[i % 2] for i in numbers]),
        }
    )
    vectors = np.sin(np.arange(start * dimension, (start + count) * dimension, dtype=np.float32))
    digests = [f"{i:064x}" for i in numbers]
    return table.rows(footer(dtype, dimension), listed, digests, vectors.reshape(count, dimension))


def write(out: Path, rows: int, dtype: table.Dtype = "float32", piece: int = 700) -> pa.Table:
    """Writes the first rows in parts of `piece`; returns them as one table."""
    parts = [part(start, min(piece, rows - start), dtype) for start in range(0, rows, piece)]
    temporary = out.with_name("beside")
    outputs.write(out, temporary, footer(dtype), parts)
    outputs.take_place(out, temporary)
    return pa.concat_tables([table.schema(footer(dtype)).empty_table(), *parts])


def stream(out: str, written: int) -> None:
    """Writes so many bytes of vectors in a process of its own, and prints its peak memory."""
    dimension = 2048
    count = written // (4 * dimension * ROWS_OF_A_PART)
    parts = (part(i * ROWS_OF_A_PART, ROWS_OF_A_PART, dimension=dimension) for i in range(count))
    outputs.write(Path(out), Path(out), footer(dimension=dimension), parts)
    assert outputs.count(Path(out)) == count * ROWS_OF_A_PART
    print(_peak_bytes())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
