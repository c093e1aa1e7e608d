"""The map as one page of HTML: plotly.js, the points as packed numbers, and small pictures."""

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import artifact
from btpipe.pages import frame, plotly_bundle

SCRIPT, STYLE = (Path(__file__).with_name(name) for name in ("map.js", "map.css"))
POLICY = f"{frame.POLICY} 'unsafe-eval'"
"""plotly.js compiles its WebGL programs by Function(); the network stays shut."""
COSINES = 10_000
"""Cosines are kept as whole numbers of ten-thousandths."""

BODY = """
<div class="bar">
  <label>Map <select id="layout"></select></label>
  <label>Colour <select id="color"><option value="label">label</option>
    <option value="cluster">cluster</option><option value="none">none</option></select></label>
  <input id="search" type="search" placeholder="Search path or label" autocomplete="off"
    aria-label="Search path or label">
  <span id="found" class="muted" aria-live="polite"></span>
  <button id="whole" type="button">Show all</button>
</div>
<main><div id="map"></div><aside id="side"></aside></main>
<div id="card" hidden></div>
"""


@dataclasses.dataclass(frozen=True)
class Points:
    """Vectors as they are drawn, one row each.

    `places` has (n, 2) coordinates by the name of the map, the first one shown first. `nearest` and
    `cosines` are (n, k), of the rows on the page. `root` is the address of
    the folder that the paths are below, if it is here. `thumbnails`: row to WebP in base64. `rows`
    is how many the table holds.
    """

    paths: Sequence[str]
    labels: Sequence[str]
    clusters: NDArray[np.int64]
    places: dict[str, NDArray[np.float32]]
    nearest: NDArray[np.int64]
    cosines: NDArray[np.float32]
    root: str
    thumbnails: dict[int, str]
    rows: int


def write(path: Path, name: str, points: Points) -> None:
    """Writes the page. What draws it stands before the pictures, which are most of it.

    Raises:
        MachineError: no space, or no permission.
    """
    count = len(points.paths)
    about = f"{count:,} images"
    if points.rows > count:
        about += f", evenly chosen of {points.rows:,}"
    pictures = ",".join(points.thumbnails.get(row, "") for row in range(count))
    content = json.dumps(_content(points), ensure_ascii=False).replace("<", "\\u003c")
    plotly = plotly_bundle.script("scattergl")
    body = (
        f"{BODY}<script>{plotly}</script>\n<script>const CONTENT = {content};\n"
        f"{SCRIPT.read_text()}</script>\n"
        f'<script type="text/plain" id="nearest">{_packed(points.nearest, "<i4")}</script>\n'
        f'<script type="text/plain" id="cosines">{_packed(_thousandths(points), "<i2")}</script>\n'
        f'<script type="text/plain" id="pictures">{pictures}</script>\n'
        "<script>document.body.dataset.read = Math.round(performance.now());</script>"
    )
    framed = frame.frame(f"Map of {name}", about, body, style=STYLE.read_text(), policy=POLICY)
    artifact.write_file(path, framed.encode("utf-8", "replace"))


def _content(points: Points) -> dict[str, object]:
    labels = sorted(set(points.labels))
    number = {label: i for i, label in enumerate(labels)}
    return {
        "count": len(points.paths),
        "near": int(points.nearest.shape[1]),
        "unit": COSINES,
        "root": points.root,
        "paths": list(points.paths),
        "labels": labels,
        "label": _packed(np.array([number[label] for label in points.labels]), "<i4"),
        "cluster": _packed(points.clusters, "<i4"),
        "places": {name: _packed(xy.T, "<f4") for name, xy in points.places.items()},
    }


def _thousandths(points: Points) -> NDArray[np.float32]:
    return np.clip(np.round(points.cosines * COSINES), -COSINES, COSINES)


def _packed(values: NDArray[np.generic], kind: str) -> str:
    """The numbers row after row as little-endian `kind`, in base64."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()
