"""search, dupes and outliers: what they find, write, show and refuse."""

import csv
import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import vector_table
from numpy.typing import NDArray
from PIL import Image

from btpipe import neighbours
from btpipe.embed import job
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import RefusedError, UsageError
from btpipe.events import Event, ignore
from btpipe.explore import dupes, outliers, search
from btpipe.pages import frame

NOISE = 0.02


@pytest.fixture(scope="module")
def embedded(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("look") / "vectors.parquet"
    job.embed(home / "images", out, EncoderConfig(home / "exports" / "tiny"), ignore)
    return out


def scattered(count: int, dimension: int = 32, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).normal(size=(count, dimension))
    return neighbours.normalize(drawn)


def near(vector: NDArray[np.float32], seed: int, by: float = NOISE) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).normal(size=vector.shape) / np.sqrt(len(vector))
    return np.asarray(vector + by * noise, np.float32)


def groups(path: Path) -> list[list[str]]:
    with path.with_name(f"{path.stem}.dupes.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = dict.fromkeys(row["group"] for row in rows)
    return [sorted(row["path"] for row in rows if row["group"] == number) for number in numbers]


def test_a_picture_finds_itself_first_and_a_row_finds_others(home: Path, embedded: Path) -> None:
    image = sorted((home / "images").rglob("*.jpg"))[5]
    model = home / "exports" / "tiny"
    nearest = search.run(embedded, str(image), ignore, k=3, model=model)
    paths = pq.read_table(embedded)["path"].to_pylist()
    assert str(image).endswith(paths[int(nearest.rows[0])])
    assert nearest.cosines[0] > 1 - 1e-3
    by_row = search.run(embedded, str(nearest.rows[0]), ignore, k=3)
    by_path = search.run(embedded, paths[int(nearest.rows[0])], ignore, k=3)
    assert by_row.rows.tolist() == by_path.rows.tolist()
    assert nearest.rows[0] not in by_row.rows
    assert by_row.rows[:2].tolist() == nearest.rows[1:].tolist()


def test_another_bundle_than_the_tables_is_refused(home: Path, tmp_path: Path) -> None:
    table = vector_table.write(tmp_path / "v.parquet", scattered(3), bundle="c" * 64)
    image = next((home / "images").rglob("*.jpg"))
    with pytest.raises(RefusedError, match="which made"):
        search.run(table, str(image), ignore, model=home / "exports" / "tiny")
    assert RefusedError.exit_code == 4


def test_a_query_that_names_nothing_says_what_it_may_be(embedded: Path) -> None:
    with pytest.raises(UsageError, match="a row from 0 to 23"):
        search.run(embedded, "24", ignore)
    image = embedded.parent / "new.png"
    Image.new("RGB", (40, 40)).save(image)
    with pytest.raises(UsageError, match="--model BUNDLE"):
        search.run(embedded, str(image), ignore)


def test_planted_copies_are_found_and_lookalikes_are_not(tmp_path: Path) -> None:
    base = scattered(200)
    copies = [near(base[3], 1), near(base[3], 2), near(base[50], 3)]
    # A crowd: thirty that are as alike as the copies, none nearer to one than to the next.
    crowd = [near(base[100], 10 + i, by=0.1) for i in range(30)]
    vectors = np.stack([*base, *copies, *crowd]).astype(np.float32)
    path = vector_table.write(tmp_path / "v.parquet", vectors)
    dupes.run(path, ignore)
    assert sorted(groups(path)) == [["200.jpg", "201.jpg", "3.jpg"], ["202.jpg", "50.jpg"]]
    dupes.run(path, ignore, threshold=0.9)
    assert [len(group) for group in sorted(groups(path), key=len)] == [2, 3, 31]


def test_a_threshold_joins_every_pair_at_or_above_it(tmp_path: Path) -> None:
    degrees = np.radians([0, 10, 20, 60, 65, 120])
    vectors = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)
    path = vector_table.write(tmp_path / "v.parquet", vectors)
    dupes.run(path, ignore, threshold=float(np.cos(np.radians(11))))
    assert groups(path) == [["3.jpg", "4.jpg"], ["0.jpg", "1.jpg", "2.jpg"]]  # the likest first


def test_equal_bytes_are_a_group_and_the_largest_picture_is_kept(tmp_path: Path) -> None:
    base = scattered(60)
    vectors = np.stack([*base, base[7], near(base[7], 1)])
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(62)]
    digests[60] = digests[7]
    sizes = [(10, 10)] * 61 + [(20, 20)]
    path = vector_table.write(tmp_path / "v.parquet", vectors, digests=digests, sizes=sizes)
    result = dupes.run(path, ignore, out=tmp_path / "list.parquet")
    rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
    assert [row["path"] for row in rows] == ["61.jpg", "7.jpg", "60.jpg"]
    assert [row["same_bytes"] for row in rows] == [False, True, True]
    assert [row["keep"] for row in rows] == [True, False, False]
    assert result.count == 1


def test_thousands_of_equal_pictures_are_one_group(tmp_path: Path) -> None:
    vectors = np.concatenate([np.repeat(scattered(1, seed=9), 2100, axis=0), scattered(50)])
    path = vector_table.write(tmp_path / "v.parquet", vectors)
    for threshold in (None, 0.99):
        result = dupes.run(path, ignore, threshold=threshold)
        assert (result.count, len(result.rows)) == (1, 2100)


def test_a_table_without_doubles_has_an_empty_list(tmp_path: Path) -> None:
    path = vector_table.write(tmp_path / "v.parquet", scattered(40))
    assert dupes.run(path, ignore, html=tmp_path / "d.html").count == 0
    assert groups(path) == []
    assert "No picture is there twice" in (tmp_path / "d.html").read_text()
    lone = vector_table.write(tmp_path / "one.parquet", scattered(1))
    assert dupes.run(lone, ignore).count == 0


def test_the_planted_stranger_comes_first_with_its_mean_distance(tmp_path: Path) -> None:
    cloud = np.stack([near(scattered(1)[0], i, by=0.3) for i in range(50)])
    vectors = np.stack([*cloud[:20], -cloud[0], *cloud[20:]]).astype(np.float32)
    path = vector_table.write(tmp_path / "v.parquet", vectors)
    events: list[Event] = []
    ranking = outliers.run(path, events.append, k=4)
    assert ranking.rows[0] == 20
    unit = neighbours.normalize(vectors).astype(np.float64)
    distances = 1 - unit @ unit.T
    np.fill_diagonal(distances, np.inf)
    expected = np.sort(distances, axis=1)[:, :4].mean(axis=1)
    np.testing.assert_allclose(ranking.distance, expected[ranking.rows], atol=2e-3)  # of float16
    (table,) = [table for event in events for table in event.tables()]
    assert table.rows[0][1] == "20.jpg"
    assert "does not mean wrong" in table.note
    with (tmp_path / "v.outliers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 51


def test_pages_show_the_pictures_and_ask_for_nothing(home: Path, embedded: Path) -> None:
    out = embedded.parent / "page.html"
    outliers.run(embedded, ignore, top=5, html=out, images=home / "images")
    text = out.read_text()
    assert text.count('src="data:image/jpeg;base64,') == 5
    assert not re.search(r'(?:src|href)="(?!data:|file:)', text)
    assert "default-src 'none'" in text
    search.run(embedded, "0", ignore, k=4, html=out, images=home / "images")
    assert out.read_text().count('src="data:image/jpeg;base64,') == 5
    assert "not shown" not in out.read_text()


def test_a_path_is_text_in_a_page_and_a_lost_picture_is_said(tmp_path: Path) -> None:
    paths = ["<script>alert(1)</script>.jpg", "b.jpg", "c.jpg"]
    table = vector_table.write(tmp_path / "v.parquet", scattered(3), paths=paths)
    outliers.run(table, ignore, html=tmp_path / "o.html")
    text = (tmp_path / "o.html").read_text()
    assert "<script>alert" not in text
    assert "3 pictures are not shown" in text


def test_pictures_inside_a_tar_or_another_folder_are_found(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (400, 200), "red").save(content, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("x/1.jpg")
        member.size = len(content.getvalue())
        tar.addfile(member, io.BytesIO(content.getvalue()))
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "a.tar").rename(moved / "a.tar")
    (moved / "2.jpg").write_bytes(content.getvalue())
    paths = ["a.tar::x/1.jpg", "2.jpg", "3.jpg"]
    table = vector_table.write(tmp_path / "v.parquet", scattered(3), paths=paths, root=tmp_path)
    outliers.run(table, ignore, html=tmp_path / "o.html", images=moved)
    text = (tmp_path / "o.html").read_text()
    assert text.count("data:image/jpeg") == 2
    assert "1 pictures are not shown" in text


def test_pictures_are_looked_for_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "shoes").mkdir()
    for row in range(3):
        Image.new("RGB", (30, 30)).save(tmp_path / "shoes" / f"{row}.jpg")
    table = vector_table.write(tmp_path / "v.parquet", scattered(3), root="shoes")
    outliers.run(table, ignore, html=tmp_path / "o.html")
    assert (tmp_path / "o.html").read_text().count("data:image/jpeg") == 3


def test_a_thumbnail_is_small_and_never_enlarged() -> None:
    with Image.open(io.BytesIO(frame.thumbnail(Image.new("RGBA", (640, 320))))) as small:
        assert small.size == (160, 80)
    with Image.open(io.BytesIO(frame.thumbnail(Image.new("L", (20, 30))))) as same:
        assert same.size == (20, 30)
