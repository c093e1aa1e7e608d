"""Tables of vectors open in LanceDB, Lance and Hugging Face datasets. Run: make test-readers"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_table import DIMENSION, footer, write

from btpipe.embed import arrays, outputs, table

datasets = pytest.importorskip("datasets")
lancedb = pytest.importorskip("lancedb")
lance = pytest.importorskip("lance")

ROWS = 300


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_datasets_opens_the_table(tmp_path: Path, dtype: table.Dtype) -> None:
    rows = write(tmp_path / "v.parquet", ROWS, dtype)
    cache = str(tmp_path / "cache")
    opened = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "v.parquet"), split="train", cache_dir=cache
    )
    assert opened["path"][:] == rows["path"].to_pylist()
    assert opened["label"][:3] == ["a", "b", "a"]
    expected = arrays.matrix(rows["embedding"], DIMENSION)
    assert np.array_equal(opened.with_format("numpy")["embedding"][:], expected)


def test_lancedb_takes_the_table_and_finds_neighbours(tmp_path: Path) -> None:
    rows = write(tmp_path / "v.parquet", ROWS)
    database = lancedb.connect(tmp_path / "database")
    table = database.create_table("vectors", pq.read_table(tmp_path / "v.parquet"))
    vectors = arrays.matrix(rows["embedding"], DIMENSION)
    expected = np.argsort(((vectors - vectors[7]) ** 2).sum(axis=1), kind="stable")[:5]
    neighbours = table.search(vectors[7], vector_column_name="embedding").limit(5).to_list()
    paths = rows["path"].to_pylist()
    assert [row["path"] for row in neighbours] == [paths[i] for i in expected]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_lance_data_set_holds_the_rows_and_the_footer(tmp_path: Path, dtype: table.Dtype) -> None:
    out = tmp_path / "v.lance"
    outputs.check(out)
    assert outputs.footer_of(out) is None
    for count in (0, ROWS, 5):
        rows = write(out, count, dtype)
        outputs.check(out)
        assert outputs.count(out) == count
        metadata = outputs.footer_of(out)
        assert metadata is not None
        assert footer(dtype).metadata().items() <= metadata.items()
        again = pa.Table.from_batches(list(outputs.rows(out)), lance.dataset(str(out)).schema)
        assert again.select(rows.column_names).to_pylist() == rows.to_pylist()
