"""Every ending holds the same rows and the same footer, streamed; readers open the tables."""

import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tiny_table import DIMENSION, footer, part, write

from btpipe.embed import arrays, outputs, table
from btpipe.errors import IntegrityError, UsageError

ENDINGS = (".parquet", "", ".npy", ".safetensors")
FEW_BYTES, MANY_BYTES = 96 * 2**20, 480 * 2**20
KEPT_BYTES = 120 * 2**20
"""What writing `MANY_BYTES` rather than `FEW_BYTES` may add to a process: allocators' whims."""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read_again_row_for_row(
    tmp_path: Path, ending: str, dtype: table.Dtype
) -> None:
    for rows in (0, 1, 1500):
        out = tmp_path / f"v{rows}{ending}"
        expected = write(out, rows, dtype)
        outputs.check(out)  # what is there may be replaced
        assert outputs.count(out) == rows
        assert footer(dtype).metadata() == outputs.footer_of(out)
        content = pa.Table.from_batches(list(outputs.rows(out)), table.schema(footer(dtype)))
        assert content.equals(expected)
    shorter = write(tmp_path / f"v1500{ending}", 3, dtype)
    content = pa.Table.from_batches(list(outputs.rows(tmp_path / f"v1500{ending}")))
    assert content.equals(shorter)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_bytes_do_not_depend_on_how_the_rows_came(tmp_path: Path, ending: str) -> None:
    def content(out: Path) -> list[bytes]:
        whole = out.rglob("*.parquet") if out.is_dir() else [out, *outputs.companions(out)]
        return [path.read_bytes() for path in sorted(whole)]

    write(tmp_path / f"a{ending}", 5000, piece=5000)
    write(tmp_path / f"b{ending}", 5000, piece=617)
    assert content(tmp_path / f"a{ending}") == content(tmp_path / f"b{ending}")


def test_a_folder_is_cut_into_files_at_a_fixed_number_of_rows(tmp_path: Path) -> None:
    rows = outputs.FILE_ROWS + 5
    write(tmp_path / "v", rows, piece=9000)
    files = sorted((tmp_path / "v").iterdir())
    assert [file.name for file in files] == ["part-000000.parquet", "part-000001.parquet"]
    assert [table.count(file) for file in files] == [outputs.FILE_ROWS, 5]
    assert len(pq.read_table(tmp_path / "v")) == rows
    assert len(pl.read_parquet(tmp_path / "v")) == rows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_and_safetensors_open_the_matrices(tmp_path: Path, dtype: table.Dtype) -> None:
    rows = write(tmp_path / "v.npy", 1234, dtype)
    write(tmp_path / "v.safetensors", 1234, dtype)
    expected = arrays.matrix(rows["embedding"], DIMENSION)
    assert expected.dtype == dtype
    assert expected.shape == (1234, DIMENSION)
    matrix = np.load(tmp_path / "v.npy")
    assert matrix.dtype == dtype
    assert np.array_equal(matrix, expected)
    assert np.array_equal(load_file(tmp_path / "v.safetensors")["embedding"], expected)
    with safetensors.safe_open(tmp_path / "v.safetensors", "numpy") as file:
        assert file.metadata() == footer(dtype).metadata()
    ids = pd.read_parquet(tmp_path / "v.npy.ids.parquet")
    assert ids["path"].tolist() == rows["path"].to_pylist()
    columns = ["path", "path_bytes", "digest", "bytes", "mtime_ns", "width", "height", "label"]
    assert list(ids) == columns


def test_a_matrix_and_rows_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for ending in (".npy", ".safetensors"):
        out = tmp_path / f"v{ending}"
        write(out, 10)
        whole = out.read_bytes()
        out.write_bytes(whole[:-8])
        with pytest.raises(IntegrityError, match="is no matrix"):
            outputs.footer_of(out)
        out.write_bytes(b"Dear reader,")
        with pytest.raises(IntegrityError, match="is no matrix"):
            outputs.footer_of(out)
        write(tmp_path / f"w{ending}", 11)
        out.write_bytes((tmp_path / f"w{ending}").read_bytes())
        with pytest.raises(IntegrityError, match="of other vectors"):
            outputs.footer_of(out)
        arrays.ids_path(out).unlink()
        with pytest.raises(IntegrityError, match="is missing"):
            outputs.footer_of(out)


def test_a_matrix_takes_its_name_only_when_its_rows_are_there(tmp_path: Path) -> None:
    write(tmp_path / "v.npy", 10)
    temporary = tmp_path / "beside"
    outputs.write(tmp_path / "v.npy", temporary, footer(), [part(0, 4)])
    temporary.unlink()  # a kill between two renames leaves the same: rows without a matrix
    with pytest.raises(FileNotFoundError):
        outputs.take_place(tmp_path / "v.npy", temporary)
    assert outputs.footer_of(tmp_path / "v.npy") is None


def test_names_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("Dear reader,")
    for name in ("v.csv", "v.parquet.gz", "taken"):
        with pytest.raises(UsageError, match="not a name for a table"):
            outputs.check(tmp_path / name)
    for ending in (".parquet", ".npy"):
        (tmp_path / f"folder{ending}").mkdir()
        with pytest.raises(UsageError, match="a folder of that name is there"):
            outputs.check(tmp_path / f"folder{ending}")
    with pytest.raises(IntegrityError, match="other things than vectors"):
        outputs.footer_of(tmp_path / "letters")
    (tmp_path / "empty").mkdir()
    assert outputs.footer_of(tmp_path / "empty") is None
    assert outputs.footer_of(tmp_path / "nowhere") is None


def test_lance_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lance'] = None\n"
        "from pathlib import Path\n"
        "from btpipe.embed import outputs\n"
        "from btpipe.errors import UsageError\n"
        "try:\n    outputs.check(Path('v.lance'))\n"
        "except UsageError as error:\n    assert 'pip install pylance' in error.fix\n"
        "else:\n    raise SystemExit('passed')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_pandas_and_polars_open_the_table(tmp_path: Path) -> None:
    for dtype in table.TYPES:
        out = tmp_path / f"{dtype}.parquet"
        rows = write(out, 50, dtype)
        expected = arrays.matrix(rows["embedding"], DIMENSION)
        frame = pd.read_parquet(out)
        assert np.array_equal(np.stack(frame["embedding"].to_list()), expected)
        polars = pl.read_parquet(out)
        assert polars["path"].to_list() == rows["path"].to_pylist()
        assert np.array_equal(polars["embedding"].to_numpy(), expected)


def test_duckdb_finds_neighbours_by_cosine(tmp_path: Path) -> None:
    rows = write(tmp_path / "v.parquet", 50)
    vectors = arrays.matrix(rows["embedding"], DIMENSION).astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = np.argsort(-(unit @ unit[7]), kind="stable")[:5]
    vector = f"embedding::FLOAT[{DIMENSION}]"
    answer = query(
        f"with q as (select {vector} as v from '{tmp_path}/v.parquet' where path like '%000007%')"
        f" select path, array_cosine_similarity({vector}, q.v) as s from '{tmp_path}/v.parquet', q"
        " order by s desc limit 5"
    )
    paths = rows["path"].to_pylist()
    assert [path for path, _ in answer] == [paths[i] for i in nearest]
    assert answer[0][1] == pytest.approx(1)


def test_duckdb_reads_a_folder_of_tables(tmp_path: Path) -> None:
    write(tmp_path / "v", 50)
    (count,) = query(f"select count(*) from '{tmp_path}/v/*.parquet'")[0]
    assert count == 50


def query(text: str) -> list[tuple[object, ...]]:
    relation = duckdb.sql(text)
    assert relation is not None
    return relation.fetchall()


@pytest.mark.parametrize(
    "ending",
    [".npy", *(pytest.param(e, marks=pytest.mark.slow) for e in ENDINGS if e != ".npy")],
)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, ending: str) -> None:
    def peak_bytes(written: int) -> int:
        code = f"import tiny_table; tiny_table.stream({str(tmp_path / f'v{ending}')!r}, {written})"
        folder = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    few = peak_bytes(FEW_BYTES)
    out = tmp_path / f"v{ending}"
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert peak_bytes(MANY_BYTES) - few < KEPT_BYTES


def test_rows_of_a_matrix_are_mapped_and_not_read(tmp_path: Path) -> None:
    write(tmp_path / "v.safetensors", 5000)
    matrix: NDArray[np.floating] = arrays.open_matrix(tmp_path / "v.safetensors")
    assert isinstance(matrix, np.memmap)
