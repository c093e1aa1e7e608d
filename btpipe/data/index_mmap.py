"""A large index's table as an Arrow file beside its parquet, which opens without being read.

Parquet is what others open and what counts; its pages must be decoded into memory, in every rank
(1,000,000 images: 300 MB). The Arrow file is mapped: the ranks of a machine share its pages.
"""

import hashlib
import io
from pathlib import Path

import pyarrow as pa

from btpipe import artifact


def write(path: Path, table: pa.Table) -> None:
    """Writes the table, whole or not at all, with its digest.

    Raises:
        MachineError: no space, or no permission.
    """
    plain = table.combine_chunks().replace_schema_metadata(None)
    named = plain.replace_schema_metadata({"content": digest(plain)})
    content = io.BytesIO()
    with pa.ipc.new_file(content, named.schema) as writer:
        writer.write_table(named)
    artifact.write_file(path, content.getvalue())


def digest(table: pa.Table) -> str:
    """sha256 of the table's values."""
    checksum = hashlib.sha256()
    for batch in table.combine_chunks().replace_schema_metadata(None).to_batches():
        checksum.update(batch.serialize())
    return checksum.hexdigest()


def is_whole(path: Path, content: str) -> bool:
    """Whether the mapped table has the content of this digest."""
    table = read(path, content)
    return table is not None and digest(table) == content


def read(path: Path, content: str) -> pa.Table | None:
    """The mapped table; None where there is none, or another one's."""
    if not content or not path.is_file():
        return None
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException):
        return None
    return table if (table.schema.metadata or {}).get(b"content") == content.encode() else None
