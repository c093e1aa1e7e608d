"""Tables of vectors, opened: what is kept beside them, and when it is made anew."""

import os
from pathlib import Path

import numpy as np
import pytest
import vector_table
from numpy.typing import NDArray

from btpipe import neighbours
from btpipe.embed import table
from btpipe.errors import IntegrityError, UsageError
from btpipe.events import Event, Note, ignore
from btpipe.explore import tables

HALF = 1e-3
"""float16 has 11 bits."""
LARGE = tables.MEMORY_BYTES // 2 // 2048 + 1
"""Rows of 2048 numbers that are kept in a file."""


def drawn(count: int, dimension: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.unit-*.npy"))


@pytest.mark.parametrize("name", ["v.parquet", "v.npy", "v.safetensors", "folder"])
def test_every_format_opens_as_unit_vectors_with_its_rows(tmp_path: Path, name: str) -> None:
    vectors = drawn(20, 8)
    path = vector_table.write(tmp_path / name, vectors, labels=["a", "b"] * 10)
    opened = tables.open_vectors(path, ignore)
    np.testing.assert_allclose(opened.unit, neighbours.normalize(vectors), atol=HALF)
    assert opened.unit.dtype == np.float16
    assert opened.column("label") == ["a", "b"] * 10
    assert opened.text("path", 3) == "3.jpg"
    assert tables.bundle_of(opened) == vector_table.BUNDLE
    assert kept(tmp_path) == []


def test_a_large_table_is_mapped_from_a_file_that_is_written_once(tmp_path: Path) -> None:
    path = vector_table.write(tmp_path / "v.parquet", drawn(LARGE, 2048))
    events: list[Event] = []
    first = tables.open_vectors(path, events.append)
    (file,) = kept(tmp_path)
    assert [str(file) in note.text for note in events if isinstance(note, Note)] == [True]
    before = file.stat().st_mtime_ns
    second = tables.open_vectors(path, events.append)
    assert isinstance(second.unit, np.memmap)
    assert (file.stat().st_mtime_ns, len(events)) == (before, 1)
    assert np.array_equal(first.unit, second.unit)

    changed = drawn(LARGE, 2048, seed=1)
    vector_table.write(path, changed)
    third = tables.open_vectors(path, ignore)
    np.testing.assert_allclose(third.unit[:9], neighbours.normalize(changed[:9]), atol=HALF)
    assert len(kept(tmp_path)) == 1
    assert kept(tmp_path) != [file]


def test_beside_a_table_that_is_read_only_the_file_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "read-only"
    folder.mkdir()
    path = vector_table.write(folder / "v.parquet", drawn(LARGE, 2048))
    folder.chmod(0o500)
    tables.open_vectors(path, ignore)
    folder.chmod(0o700)
    assert kept(folder) == []
    assert len(kept(tmp_path / "home" / ".cache" / "btpipe" / "vectors")) == 1


@pytest.mark.parametrize("name", ["v.parquet", "v.npy", "folder"])
def test_cells_of_a_large_table_are_those_of_its_columns(tmp_path: Path, name: str) -> None:
    path = vector_table.write(tmp_path / name, drawn(table.ROW_GROUP_ROWS + 10, 2))
    opened, rows = tables.open_vectors(path, ignore), [0, 4095, 4096, 4105]
    assert [opened.text("path", row) for row in rows] == [f"{row}.jpg" for row in rows]
    assert [opened.text("label", row) for row in rows] == [""] * 4
    taken = opened.take(np.array([4096, 3]))
    assert taken.column("path") == ["4096.jpg", "3.jpg"]
    assert taken.text("path", 1) == "3.jpg"
    assert np.array_equal(taken.unit, opened.unit[[4096, 3]])


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such table"):
        tables.open_vectors(tmp_path / "none.parquet", ignore)
    (tmp_path / "text.parquet").write_text("a,b")
    with pytest.raises(IntegrityError, match="not a table"):
        tables.open_vectors(tmp_path / "text.parquet", ignore)
    empty = vector_table.write(tmp_path / "empty.parquet", drawn(0, 4))
    with pytest.raises(UsageError, match="holds no vectors"):
        tables.open_vectors(empty, ignore)
    holed = drawn(4, 4)
    holed[2, 1] = np.nan
    path = vector_table.write(tmp_path / "holed.parquet", holed)
    with pytest.raises(IntegrityError, match="the first is row 2"):
        tables.open_vectors(path, ignore)


def test_a_list_is_named_by_its_ending() -> None:
    assert tables.list_path(Path("x/v.parquet"), "dupes") == Path("x/v.dupes.csv")
    with pytest.raises(UsageError, match=r"\.csv or \.parquet"):
        tables.check_list(Path("dupes.txt"))
