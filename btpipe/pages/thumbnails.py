"""Small pictures for a page, made in threads until they fill what they may."""

import base64
import concurrent.futures
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from btpipe import runtime
from btpipe.events import Progressed, Report, per_second
from btpipe.pages import frame

Read = Callable[[int], Path | bytes]
"""What opens a row's picture: its file or content; OSError or KeyError where there is none."""

SIDES = ((4_000, 128), (7_500, 96), (0, 64))
"""(rows up to which it is taken, pixels of the longer side): about 20 MB of text in all."""
QUALITY = 60
CHUNK = 64
REPORT_SECONDS = 1.0


def make(
    count: int, read: Read, on_event: Report, most_bytes: int = frame.THUMBNAIL_BYTES
) -> dict[int, str]:
    """Row to WebP in base64, for as many rows as go into `most_bytes` of text.

    Where not all do, those that do are spread evenly; a picture that cannot be read has none.
    """
    side = next(side for rows, side in SIDES if count <= rows or not rows)
    order = np.random.default_rng(0).permutation(count).tolist()
    thumbnails: dict[int, str] = {}
    total_bytes, started = 0, time.monotonic()
    last_report = started
    with concurrent.futures.ThreadPoolExecutor(runtime.cores(), "btpipe-thumbnail") as pool:
        for done, (row, text) in enumerate(_drawn(order, read, side, pool)):
            if total_bytes + len(text) + 1 > most_bytes:
                break
            if text:
                thumbnails[row], total_bytes = text, total_bytes + len(text) + 1
            now = time.monotonic()
            if now - last_report > REPORT_SECONDS:
                last_report, speed = now, per_second(done, now - started)
                on_event(Progressed("thumbnails", done, count, speed, 0.0))
    return thumbnails


def _drawn(
    rows: Sequence[int], read: Read, side: int, pool: concurrent.futures.Executor
) -> Iterator[tuple[int, str]]:
    """(row, text) in the order of `rows`, a few ahead."""
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        yield from zip(chunk, pool.map(lambda row: _one(read, row, side), chunk), strict=True)


def _one(read: Read, row: int, side: int) -> str:
    try:
        content = read(row)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            picture.draft("RGB", (2 * side, 2 * side))
            small = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=QUALITY, method=2)
    return base64.b64encode(out.getvalue()).decode()
