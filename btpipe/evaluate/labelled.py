"""Vectors with labels: from class folders, a column of the table, or a list beside it."""

import csv
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe.embed import arrays, outputs
from btpipe.errors import IntegrityError, RefusedError, UsageError

BUNDLE_KEY = b"btpipe.bundle"
EMBEDDING = "embedding"

COLUMN = "label"
LISTED = ("path", "label")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Where labels come from: the column `column` of the table, or the list `file`."""

    column: str = COLUMN
    file: Path | None = None

    @property
    def needed(self) -> str:
        """The column of the table that says which label is a row's."""
        return LISTED[0] if self.file else self.column


def _listed(file: Path) -> dict[str, str]:
    """Labels by path, from a CSV with the columns path and label.

    Raises:
        UsageError: no such file, other columns, or two labels for one path.
    """
    if not file.is_file():
        raise UsageError("no such list of labels", where=file, expected="a CSV: path,label")
    label_of: dict[str, str] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as content:
            lines = csv.DictReader(content)
            if not set(LISTED) <= set(lines.fieldnames or ()):
                expected = "a first line that names the columns path and label"
                raise UsageError("is no list of labels", where=file, expected=expected)
            for line in lines:
                path, label = line["path"], line["label"]
                if label_of.setdefault(path, label) != label:
                    raise UsageError(f"two labels for {path}", where=file, expected="one")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"is no CSV ({error})", where=file, expected="path,label") from error
    return label_of


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Labelled rows; `keys` tell images apart, `left_out` counts the rows without a label."""

    bundle: str
    labels: list[str]
    keys: list[str]
    embeddings: NDArray[np.floating]
    left_out: int = 0

    @property
    def names(self) -> dict[str, int]:
        """A number for each class."""
        return {name: i for i, name in enumerate(sorted(set(self.labels)))}

    def numbered(self, names: Mapping[str, int]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        """Vectors and class numbers."""
        numbers = [names[label] for label in self.labels]
        return self.embeddings, np.array(numbers, dtype=np.int64)

    def divided(self, path: Path, share: float, seed: int) -> tuple["Labelled", "Labelled"]:
        """The rows to find neighbours among, and the share of rows to judge.

        Raises:
            UsageError: one of them is empty.
        """
        draws = [hashlib.sha256(f"{seed} {key}".encode()).digest()[:8] for key in self.keys]
        judged = np.array([int.from_bytes(draw) < share * 2**64 for draw in draws])
        if judged.all() or not judged.any():
            raise UsageError(
                f"--split {share:g} of {len(judged)} rows leaves one side without a row",
                where=path,
                fix="take another share or --seed, or name a table with --test",
            )
        return self._taken(~judged), self._taken(judged)

    def _taken(self, chosen: NDArray[np.bool_]) -> "Labelled":
        rows = np.flatnonzero(chosen).tolist()
        return dataclasses.replace(
            self,
            labels=[self.labels[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            embeddings=self.embeddings[chosen],
        )


def sides(
    vectors: Path, test: Path | None, labels: Labels, split: float, seed: int
) -> tuple[Labelled, Labelled, int]:
    """The rows to train on, the rows to judge, and how many without a label are left out of both.

    Judged are those of the table `test`, or a share `split` of `vectors`.

    Raises:
        UsageError, RefusedError, IntegrityError: as `knn.judge`.
    """
    if test is None:
        whole = read(vectors, labels)
        return *whole.divided(vectors, split, seed), whole.left_out
    train_rows, test_rows = pair(vectors, test, labels)
    return train_rows, test_rows, train_rows.left_out + test_rows.left_out


def pair(vectors: Path, test: Path, labels: Labels) -> tuple[Labelled, Labelled]:
    """Two tables that may be compared: to find neighbours in, and to judge.

    Raises:
        UsageError, RefusedError, IntegrityError: as `knn.evaluate`.
    """
    train_rows, test_rows = read(vectors, labels), read(test, labels)
    if vectors.samefile(test):
        raise UsageError(
            "each image would be its own neighbour", where=test, expected="a table of other images"
        )
    if train_rows.bundle != test_rows.bundle:
        raise RefusedError(
            f"vectors of bundle {test_rows.bundle or 'unknown'}",
            where=test,
            expected=f"those of {train_rows.bundle or 'unknown'}, as in {vectors}",
            fix="embed both with the same --model",
        )
    if train_rows.embeddings.shape[1] != test_rows.embeddings.shape[1]:
        raise RefusedError(
            f"vectors of {test_rows.embeddings.shape[1]} numbers",
            where=test,
            expected=f"{train_rows.embeddings.shape[1]}, as in {vectors}",
        )
    unknown = sorted(set(test_rows.labels) - set(train_rows.labels))
    if unknown:
        raise UsageError(
            f"classes without one neighbour to name them: {_some(unknown)}",
            where=test,
            expected=f"classes of {vectors}: {_some(sorted(set(train_rows.labels)))}",
            fix="give both folders the same class folders",
        )
    return train_rows, test_rows


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


def read(path: Path, source: Labels) -> Labelled:
    """Labels and vectors of a table, and the digest of the bundle that made them."""
    if not path.exists():
        raise UsageError("no such table of vectors", where=path, fix="make it: btpipe embed")
    try:
        table, bundle = _columns(path)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"cannot be read: {error}", where=path) from error
    if EMBEDDING not in table.column_names or not pa.types.is_fixed_size_list(
        table.schema.field(EMBEDDING).type
    ):
        raise IntegrityError(
            "is not a table of vectors", where=path, expected="made by btpipe embed"
        )
    if table.num_rows == 0:
        raise UsageError("holds no vectors", where=path, fix="embed a folder with images")
    labels = _labels(path, table, source)
    left_out = labels.count(None)
    if left_out == len(labels) or (left_out and not source.file):
        raise UsageError(
            f"{left_out} of {table.num_rows} rows have no label",
            where=path,
            fix="embed a folder with one folder of images for each class",
        )
    flat = table[EMBEDDING].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = flat.reshape(table.num_rows, -1)
    arrays.require_finite(vectors, path)
    key = next((name for name in ("digest", "path") if name in table.column_names), None)
    keys = table[key].to_pylist() if key else [str(row) for row in range(table.num_rows)]
    rows = [row for row, label in enumerate(labels) if label is not None]
    return Labelled(
        bundle,
        [label for label in labels if label is not None],
        [keys[row] for row in rows],
        vectors[rows] if left_out else vectors,
        left_out,
    )


def _columns(path: Path) -> tuple[pa.Table, str]:
    """The whole table, in any format that vectors are written in, and its bundle's digest."""
    if path.suffix == ".parquet" and path.is_file():
        with pq.ParquetFile(path.absolute(), page_checksum_verification=True) as file:
            bundle = (file.schema_arrow.metadata or {}).get(BUNDLE_KEY, b"").decode()
            return file.read(), bundle
    footer = outputs.footer_of(path) or {}
    return pa.Table.from_batches(outputs.rows(path)), footer.get(BUNDLE_KEY.decode(), "")


def _labels(path: Path, table: pa.Table, source: Labels) -> list[str | None]:
    """A label for each row, None where there is none.

    Raises:
        UsageError: the table has no such column, or the list cannot be read.
    """
    if source.needed not in table.column_names:
        others = [name for name in table.column_names if name != EMBEDDING]
        if source == Labels():
            raise IntegrityError(
                "is not a table of vectors", where=path, expected="made by btpipe embed"
            )
        raise UsageError(
            f"no column {source.needed!r}", where=path, expected=f"one of {', '.join(others)}"
        )
    values = table[source.needed].cast(pa.string()).to_pylist()
    if source.file is None:
        return list(values)
    label_of = _listed(source.file)
    return [label_of.get(value) for value in values]
