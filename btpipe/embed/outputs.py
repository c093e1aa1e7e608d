"""What a table of vectors is written as, by the ending of its name. Parts are always parquet."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from btpipe.embed import table
from btpipe.errors import UsageError


def check(out: Path) -> None:
    """Passes a name that vectors can be written to.

    Raises:
        UsageError: an ending that is not known, or a folder under a file's name.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise UsageError("not a name for a table", where=out, expected="a file X.parquet")


def write(out: Path, beside: Path, footer: table.Footer, parts: Iterable[pa.Table]) -> None:
    """Streams parts to `beside` in the format of the name `out`, and fsyncs it.

    What is in memory does not grow with the number of rows. The caller gives it its name.
    """
    check(out)
    table.write(beside, table.schema(footer), parts)


def footer_of(out: Path) -> Mapping[str, str] | None:
    """What the vectors under `out` say about themselves; None where nothing is there.

    Raises:
        IntegrityError: something that btpipe did not write, or in a newer format.
    """
    return table.footer_of(out)


def count(out: Path) -> int:
    """How many vectors are under `out`."""
    return table.count(out)


def rows(out: Path) -> Iterator[pa.RecordBatch]:
    """The rows under `out` with all their columns, in their order, some at a time."""
    with pq.ParquetFile(out, page_checksum_verification=True) as file:
        yield from file.iter_batches(batch_size=table.ROW_GROUP_ROWS)
