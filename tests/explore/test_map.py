"""The map: where points lie, what is in the page, and that a browser shows it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import browser, needs_chromium
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.embed import table
from btpipe.errors import UsageError
from btpipe.events import ignore
from btpipe.explore import layout, map_page
from btpipe.explore import map as mapping
from btpipe.pages import thumbnails

ROUNDING = 2e-3
"""Of principal components: the vectors are kept in float16."""
COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
CLASS = 40


def grouped(dimension: int = 16) -> NDArray[np.float32]:
    """`CLASS` vectors round each of three directions."""
    random = np.random.default_rng(0)
    centres = np.eye(dimension)[:3]
    noise = random.normal(0, 0.05, (3 * CLASS, dimension))
    return (np.repeat(centres, CLASS, axis=0) + noise).astype(np.float32)


def write_table(home: Path, vectors: NDArray[np.float32]) -> Path:
    """`v.parquet` and the pictures of its rows in `pictures/`, one folder for each class."""
    paths = [f"{name}/{i:02d} ä#.png" for name in COLORS for i in range(CLASS)]
    for path in paths:
        file = home / "pictures" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), COLORS[file.parent.name]).save(file)
    count, dimension = vectors.shape
    footer = table.Footer("b", "i", "p", "fp32", "pictures", dimension)
    listed = pa.table(
        {
            "path": paths,
            "path_bytes": pa.nulls(count, pa.binary()),
            "bytes": pa.array([1000] * count, pa.int64()),
            "mtime_ns": pa.array([10**18] * count, pa.int64()),
            "width": pa.array([40] * count, pa.int32()),
            "height": pa.array([30] * count, pa.int32()),
            "label": [path.split("/")[0] for path in paths],
        }
    )
    rows = table.rows(footer, listed, ["0"] * count, vectors)
    table.write(home / "v.parquet", table.schema(footer), [rows])
    return home / "v.parquet"


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    return write_table(tmp_path, grouped())


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    rows = grouped()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    projection = layout.principal(rows.astype(np.float16), 2)
    np.testing.assert_allclose(np.abs(projection), np.abs(u[:, :2] * s[:2]), atol=ROUNDING)


def test_components_beyond_the_dimension_are_zero() -> None:
    assert not layout.principal(np.ones((5, 2), np.float32), 4)[:, 2:].any()


def test_clusters_are_the_groups_and_the_largest_is_first() -> None:
    vectors = np.concatenate([grouped(), grouped()[:CLASS]])
    numbers = layout.clusters(vectors, 3)
    assert set(numbers[:CLASS]) == set(numbers[3 * CLASS :]) == {0}
    groups = [set(numbers[i * CLASS : (i + 1) * CLASS]) for i in range(3)]
    assert all(len(group) == 1 for group in groups)
    assert set.union(*groups) == {0, 1, 2}


def test_equal_vectors_have_clusters_too() -> None:
    assert set(layout.clusters(np.ones((6, 3), np.float32), 4)) <= {0, 1, 2, 3}


def test_pictures_fill_what_they_may_and_no_more(vectors: Path) -> None:
    root = vectors.parent / "pictures"
    files = sorted(root.rglob("*.png"))
    addresses = thumbnails.make(len(files), lambda row: files[row].read_bytes(), ignore, 2_000)
    assert 0 < len(addresses) < len(files)
    assert sum(len(text) + 1 for text in addresses.values()) <= 2_000


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    addresses = thumbnails.make(2, lambda _: (tmp_path / "broken.png").read_bytes(), ignore)
    assert addresses == {}


def test_of_too_many_rows_some_are_drawn_and_the_page_says_so(vectors: Path) -> None:
    out = vectors.parent / "map.html"
    mapping.make(vectors, out, ignore, most=30, images=vectors.parent / "pictures")
    text = out.read_text()
    assert "30 images, evenly chosen of 120" in text


def test_a_name_that_is_no_page_is_refused(vectors: Path) -> None:
    with pytest.raises(UsageError, match="html"):
        mapping.make(vectors, vectors.with_name("map.png"), ignore)


def test_a_path_that_looks_like_html_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>document.body.dataset.evil=1</script>.png"
    points = map_page.Points(
        paths=[evil, "b.png"],
        labels=["<img src=x onerror=alert(1)>", ""],
        clusters=np.zeros(2, np.int64),
        places={"pca": np.array([[0, 0], [1, 1]], np.float32)},
        nearest=np.array([[1], [0]]),
        cosines=np.full((2, 1), 0.5, np.float32),
        root="",
        thumbnails={},
        rows=2,
    )
    map_page.write(tmp_path / "map.html", evil, points)
    text = (tmp_path / "map.html").read_text()
    assert "dataset.evil=1</script>" not in text
    assert "<img src=x" not in text


@needs_chromium
def test_a_browser_draws_the_points_shows_pictures_and_neighbours(
    vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = vectors.parent
    monkeypatch.chdir(home)
    result = CliRunner().invoke(app, ["map", "v.parquet", "--out", "map.html", "--clusters", "3"])
    assert result.exit_code == 0, result.output
    with browser(home / "profile") as tab:
        tab.open(home / "map.html")
        box = tab.ask("(b => [b.x, b.y, b.width, b.height])($('map').getBoundingClientRect())")
        assert isinstance(box, list)
        screen = tab.pixels()[int(box[1]) :, int(box[0]) : int(box[0] + box[2]) - 130]
        for color in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
            assert (np.abs(screen.astype(int) - color).max(axis=2) < 40).sum() > 200, color
        # Where plotly says that the first point of the first class lies.
        row = tab.ask("traces[0][0]")
        script = (
            "(f => [f.xaxis._offset + f.xaxis.l2p(places.pca.x[traces[0][0]]),"
            " f.yaxis._offset + f.yaxis.l2p(places.pca.y[traces[0][0]])])($('map')._fullLayout)"
        )
        offset = tab.ask(script)
        assert isinstance(offset, list)
        x, y = box[0] + offset[0], box[1] + offset[1]
        tab.mouse("Moved", x - 3, y)
        tab.mouse("Moved", x, y)
        tab.wait_for("!$('card').hidden && $('card').querySelector('img').naturalWidth > 0")
        hovered = str(tab.ask("$('card').innerText"))
        tab.click(x, y)
        tab.wait_for("document.querySelectorAll('#side .row').length === 10")
        ring = (np.abs(tab.pixels().astype(int) - (255, 45, 45)).max(axis=2) < 60).sum()
        near = tab.ask("[...document.querySelectorAll('#side .row')].map((r) => +r.dataset.row)")
        tab.ask("$('search').value = 'GREEN/07'; $('search').oninput()")
        tab.wait_for("$('found').textContent === '1 found'")
        tab.ask("$('color').value = 'cluster'; void $('color').onchange()")
        tab.wait_for("$('map').data.filter((t) => t.showlegend !== false).length === 3")
        assert (tab.problems, tab.requests) == ([], [])
    assert ring > 30, "the chosen point is not marked"
    assert hovered.split("/", maxsplit=1)[0] in COLORS
    rows = grouped()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    chosen = unit @ unit.T
    np.fill_diagonal(chosen, -1)
    assert isinstance(near, list)
    assert isinstance(row, int)
    hovered_row = next(
        i for i in range(len(rows)) if set(near) <= set(np.argsort(-chosen[i])[:12].tolist())
    )
    assert hovered_row // CLASS == row // CLASS


@needs_chromium
def test_the_map_is_dark_where_the_system_is(vectors: Path) -> None:
    out = vectors.parent / "map.html"
    mapping.make(vectors, out, ignore, images=vectors.parent / "pictures")
    with browser(vectors.parent / "profile", dark=True) as tab:
        tab.open(out)
        assert np.median(tab.pixels()) < 40
        assert tab.problems == []
