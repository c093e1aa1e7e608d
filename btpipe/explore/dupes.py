"""Groups of pictures that are one picture: copied, encoded again, resized, cropped a little.

What is alike is no copy: two pairs of jeans on one wall have a cosine of 0.99. A copy is known by
how near it is beside what else is near. So, without a threshold, two pictures belong together when
each lies in the other's inner circle: its nearest ones, of a cosine of `FLOOR` or more, up to the
last step among the `NEIGHBOURS` nearest where the next one is `1 / RATIO` times as far. Distances
are 1 - cosine; from `SURE` on they are below what float16 tells apart, and always belong together.

A group whose pictures differ has `NEIGHBOURS` - 1 of them at most, or it is not found.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from btpipe.events import Note, Progressed, Report, per_second
from btpipe.explore import blocks, tables
from btpipe.explore.blocks import Half
from btpipe.explore.pictures import Pictures
from btpipe.explore.search import named
from btpipe.explore.tables import Vectors
from btpipe.pages import frame
from btpipe.results import DupesFound

FLOOR = 0.9
RATIO = 1 / 3
SURE = 0.9999
NEIGHBOURS = 16
GROUPS_SHOWN = 300
STYLE = """
section { border-top: 1px solid var(--line); padding: 14px 0 20px; }
h2 { margin: 0 0 10px; }
"""


@dataclasses.dataclass(frozen=True)
class Links:
    """`rows` that belong together with `others`, and the cosine to the likest that each saw."""

    rows: NDArray[np.int64]
    others: NDArray[np.int64]
    cosines: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Groups:
    """`rows` that have a double, with the number of their group and the cosine of the likest other.

    Rows of one group stand together, groups by how alike they are. `exact`: the file's bytes are
    another row's. `keep`: the first of each group, the one with the most pixels.
    """

    rows: NDArray[np.int64]
    group: NDArray[np.int64]
    cosine: NDArray[np.float32]
    exact: NDArray[np.bool_]
    keep: NDArray[np.bool_]

    @property
    def count(self) -> int:
        return int(self.group.max(initial=-1)) + 1


def run(
    path: Path,
    on_event: Report,
    *,
    threshold: float | None = None,
    out: Path | None = None,
    html: Path | None = None,
    images: Path | None = None,
) -> Groups:
    """Finds the groups, writes them as a list, and as a page if asked.

    `threshold`: any two pictures with this cosine or more belong together, instead of the rule.

    Raises:
        UsageError: no such table, or `out` with another ending.
        IntegrityError: not a table of vectors.
        MachineError: no space, or no permission.
    """
    started = time.monotonic()
    out = out or tables.list_path(path, "dupes")
    tables.check_list(out)
    vectors = tables.open_vectors(path, on_event)
    groups = group(vectors, on_event, threshold)
    tables.write_list(out, _list(vectors, groups))
    if html:
        _page(html, vectors, groups, threshold, images)
    seconds, spare = time.monotonic() - started, len(groups.rows) - groups.count
    on_event(DupesFound(seconds, vectors.path, out, html, groups.count, spare, len(vectors)))
    if groups.count and not html:
        on_event(Note("look before you delete anything: --html dupes.html shows the groups"))
    return groups


def group(vectors: Vectors, on_event: Report, threshold: float | None) -> Groups:
    """The groups of a table."""
    same, first = _same_bytes(vectors.column("digest"))
    root = _join(np.arange(len(vectors)), *same)
    exact = np.zeros(len(vectors), bool)
    exact[np.concatenate(same)] = True
    cosine = np.where(exact, np.float32(1), np.float32(-1))
    # Bytes that are another row's are settled: one row of each goes on.
    kept = np.flatnonzero(first)
    unit = vectors.unit if first.all() else vectors.unit[kept]
    on_progress = _CompareMeter(on_event, len(kept))
    link_sets = (
        _near(unit, on_progress) if threshold is None else _above(unit, threshold, on_progress)
    )
    for links in link_sets:
        root = _join(root, kept[links.rows], kept[links.others])
        np.maximum.at(cosine, kept[links.rows], links.cosines)
    return _ordered(vectors, root, cosine, exact)


class _CompareMeter:
    """Reports blocks as pictures done."""

    def __init__(self, on_event: Report, pictures: int) -> None:
        self._on_event, self._pictures, self._started = on_event, pictures, time.monotonic()
        self._last_report = self._started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_report >= 1 or done == total:
            pictures = self._pictures * done // total
            rate = per_second(pictures, now - self._started)
            self._on_event(Progressed("compare", pictures, self._pictures, rate, 0.0))
            self._last_report = now


def _same_bytes(
    digests: Sequence[str | None],
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]:
    """Pairs (first row, row) of equal digests, and which rows are the first of theirs."""
    first_rows: dict[str, int] = {}
    left, right = [], []
    first = np.ones(len(digests), bool)
    for row, digest in enumerate(digests):
        before = first_rows.setdefault(digest, row) if digest else row
        if before != row:
            left.append(before)
            right.append(row)
            first[row] = False
    return (np.array(left, np.int64), np.array(right, np.int64)), first


def _above(
    unit: Half, threshold: float, on_progress: blocks.OnBlock = blocks.no_progress
) -> Iterator[Links]:
    """What joins the rows with a cosine of the threshold or more."""
    steps = len(range(0, len(unit), blocks.ROWS))
    total = steps * (steps + 1) // 2
    for done, (start, other, similar) in enumerate(blocks.upper(unit)):
        mask = similar >= threshold
        if start == other:
            mask = np.triu(mask, 1)
        if mask.any():
            yield _joining(start, other, similar, mask)
        on_progress(done + 1, total)


def _joining(
    start: int, other: int, similar: NDArray[np.float32], mask: NDArray[np.bool_]
) -> Links:
    """The links of a block: each of its rows to the first of its set, with its largest cosine.

    A thousand equal pictures are half a million pairs, and a thousand links.
    """
    names = np.concatenate([start + np.arange(len(mask)), other + np.arange(mask.shape[1])])
    values = np.where(mask, similar, np.float32(-1))
    likest = np.concatenate([values.max(axis=1), values.max(axis=0)])
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    root = _join(np.arange(len(names)), rows, columns + len(mask))
    met = np.concatenate([mask.any(axis=1), mask.any(axis=0)])
    return Links(names[met], names[root][met], likest[met])


def _near(unit: Half, on_progress: blocks.OnBlock) -> Iterator[Links]:
    """What joins the rows that lie in each other's inner circle."""
    indices, cosines = blocks.nearest_others(unit, NEIGHBOURS, on_progress)
    n, k = indices.shape
    if k == 0:
        return
    inside = np.arange(k)[None] < circle(cosines)[:, None]
    left, right = np.repeat(np.arange(n), inside.sum(axis=1)), indices[inside]
    mutual = np.isin(left * n + right, right * n + left)
    yield Links(left[mutual], right[mutual], cosines[inside][mutual])
    sure = cosines >= SURE
    yield Links(np.repeat(np.arange(n), sure.sum(axis=1)), indices[sure], cosines[sure])
    # Where more are equal than a row has neighbours, its neighbours need not be all of them.
    crowd = np.flatnonzero(sure.all(axis=1))
    for links in _above(unit[crowd], SURE):
        yield Links(crowd[links.rows], crowd[links.others], links.cosines)


def circle(cosines: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many of its nearest are in a row's inner circle: falling cosines (n, k) -> (n,).

    The last of the first k - 1 that is `FLOOR` or more and has a next one `1 / RATIO` times as far.
    """
    away = tables.distances(cosines)
    if cosines.shape[1] == 1:  # two pictures: there is nothing else to tell how near is near
        return np.asarray(cosines[:, 0] >= SURE, np.int64)
    steps = (away[:, :-1] <= RATIO * away[:, 1:]) & (cosines[:, :-1] >= FLOOR)
    last = steps.shape[1] - np.argmax(steps[:, ::-1], axis=1)
    return np.where(steps.any(axis=1), last, 0)


def _join(
    root: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Unites the sets of each pair; `root` is the least row of each row's set."""
    root = root.copy()
    while True:
        a, b = root[left], root[right]
        if np.array_equal(a, b):
            return root
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]


def _ordered(
    vectors: Vectors, root: NDArray[np.int64], cosine: NDArray[np.float32], exact: NDArray[np.bool_]
) -> Groups:
    """Groups of two or more: the likest first; in each the largest picture first."""
    sizes = np.bincount(root, minlength=len(root))
    rows = np.flatnonzero(sizes[root] > 1)
    pixels = np.zeros(len(root), np.int64)
    if {"width", "height"} <= set(vectors.rows.column_names):
        width, height = (np.asarray(vectors.rows[name], np.int64) for name in ("width", "height"))
        pixels = width * height
    likest = np.full(len(root), -np.inf, np.float32)
    np.maximum.at(likest, root[rows], cosine[rows])
    order = np.lexsort((rows, -pixels[rows], root[rows], -likest[root[rows]]))
    rows = rows[order]
    keep = np.r_[True, root[rows][1:] != root[rows][:-1]] if len(rows) else np.zeros(0, bool)
    number = np.cumsum(keep) - 1
    return Groups(rows, number, np.minimum(cosine[rows], 1), exact[rows], keep)


def _list(vectors: Vectors, groups: Groups) -> pa.Table:
    paths = [vectors.text("path", row) for row in groups.rows.tolist()]
    return pa.table(
        {
            "group": groups.group + 1,
            "path": pa.array(paths, pa.string()),
            "similarity": groups.cosine,
            "same_bytes": groups.exact,
            "keep": groups.keep,
        }
    )


def _page(
    out: Path, vectors: Vectors, groups: Groups, threshold: float | None, images: Path | None
) -> None:
    pictures = Pictures(vectors, images)
    sections = []
    for number in range(min(groups.count, GROUPS_SHOWN)):
        positions = np.flatnonzero(groups.group == number)
        figures = "".join(
            _figure(vectors, pictures, groups, position) for position in positions.tolist()
        )
        sections.append(
            f'<section><h2>Group {number + 1}</h2><div class="gallery">{figures}</div></section>'
        )
    rule = (
        f"a cosine of {threshold:g} or more"
        if threshold is not None
        else "much nearer to each other than to anything else"
    )
    shown = f", the first {GROUPS_SHOWN} shown" if groups.count > GROUPS_SHOWN else ""
    about = (
        f"{groups.count:,} groups{shown} among {len(vectors):,} pictures of {vectors.path}: {rule}."
        " The number is the cosine to the likest other of the group. Look before you delete."
    )
    body = "".join(sections) or "<p>No picture is there twice.</p>"
    body += f'<p class="muted">{frame.text(pictures.note())}</p>'
    frame.write(out, "Near-duplicates", about, body, style=STYLE)


def _figure(vectors: Vectors, pictures: Pictures, groups: Groups, position: int) -> str:
    row = int(groups.rows[position])
    word = "same bytes" if groups.exact[position] else f"{groups.cosine[position]:.4f}"
    caption = f'<span class="number">{word}</span>{" · largest" if groups.keep[position] else ""}'
    size = f"{vectors.text('width', row)} x {vectors.text('height', row)}"
    return pictures.figure(row, [caption, frame.text(size), *named(vectors, row)])
