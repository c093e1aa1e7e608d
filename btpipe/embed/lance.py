"""Vectors as a Lance data set, where the package is installed. No two have equal bytes."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from btpipe import artifact
from btpipe.embed import table
from btpipe.errors import UsageError

if TYPE_CHECKING:
    import lance


def require() -> None:
    """Passes where the package is.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("lance") is None:
        raise UsageError(
            "vectors as .lance need a package that is not here",
            expected="pylance",
            fix="pip install pylance, or choose another ending for --out",
        )


def write(temporary: Path, footer: table.Footer, parts: Iterable[pa.Table]) -> None:
    """Streams parts into a data set, and fsyncs its files."""
    import lance  # noqa: PLC0415 - an optional package

    columns = table.schema(footer)
    batches = (batch for part in parts for batch in part.to_batches())
    lance.write_dataset(
        pa.RecordBatchReader.from_batches(columns, batches), str(temporary.absolute())
    )
    for path in (*temporary.rglob("*"), temporary):
        artifact.fsync_path(path)


def footer_of(out: Path) -> Mapping[str, str] | None:
    """The footer in a data set's schema; None where nothing is there.

    Raises:
        IntegrityError: one that btpipe did not write.
    """
    if not out.exists():
        return None
    return table.parse_footer(_open(out).schema.metadata, out)


def count(out: Path) -> int:
    """Rows of a data set."""
    return int(_open(out).count_rows())


def rows(out: Path) -> Iterator[pa.RecordBatch]:
    """The rows in their order, some at a time."""
    yield from _open(out).to_batches(batch_size=table.ROW_GROUP_ROWS)


def _open(out: Path) -> "lance.LanceDataset":
    import lance  # noqa: PLC0415

    return lance.dataset(str(out.absolute()))
