"""The stage of `benchmarks.gpu` that makes the images which the others read."""

import io
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image

from benchmarks.stage import cores, print_result
from benchmarks.workspace import Workspace
from btpipe.data.sources import synthetic

DRAWN_JPEGS, DRAWN_PNGS = 4096, 10_000
PHOTOS, GOOD_FILES = 84, 60
"""Where no photographs are named: so many drawn ones, and good files among bad ones."""
ORIENTATION, SIDEWAYS = 0x0112, 6
COMMENT = b"\xff\xfe\x00\x06"
"""A JPEG's, of four bytes."""


def stage_prepare(workspace: Workspace) -> None:
    """Draws the images, once, and puts the photographs where a later call finds them."""
    started = time.perf_counter()
    side = 96 if workspace.small else 400
    with ProcessPoolExecutor(cores()) as pool:
        numbers = range(synthetic.DIFFERENT)
        different = list(pool.map(synthetic.jpeg, numbers, [side] * len(numbers)))
    _data(workspace, different)
    done = workspace.work / "drawn" / "done"
    if done.exists():
        print_result("drawn", images="there already")
        return
    workspace.jpegs.mkdir(parents=True, exist_ok=True)
    workspace.pngs.mkdir(exist_ok=True)
    jpegs = 64 if workspace.small else DRAWN_JPEGS
    for i in range(jpegs):
        (workspace.jpegs / f"{i:05d}.jpg").write_bytes(
            with_comment(different[i % len(different)], i)
        )
    draws = np.random.default_rng(0)
    pngs = 64 if workspace.small else DRAWN_PNGS
    for i in range(pngs):
        png = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
        content = io.BytesIO()
        png.save(content, "PNG")
        (workspace.pngs / f"{i:05d}.png").write_bytes(content.getvalue())
    done.touch()
    print_result("drawn", jpegs=jpegs, pngs=pngs, seconds=round(time.perf_counter() - started, 1))


def with_comment(jpeg: bytes, number: int) -> bytes:
    """The same picture in a file of other content: with a comment."""
    return jpeg[:2] + COMMENT + number.to_bytes(4, "big") + jpeg[2:]


def _data(workspace: Workspace, different: Sequence[bytes]) -> None:
    """photos/ and nasty/ in the work folder: those that were named, or drawn ones."""
    kept = workspace.work / "data"
    if kept.exists():
        return
    if workspace.data != kept:
        shutil.copytree(workspace.data, kept)
        return
    for folder, count in ((workspace.photos, PHOTOS), (workspace.nasty, GOOD_FILES)):
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i:03d}.jpg").write_bytes(with_comment(different[i % len(different)], i))
    with Image.open(io.BytesIO(different[0])) as image:
        exif = Image.Exif()
        exif[ORIENTATION] = SIDEWAYS
        image.save(workspace.photos / "sideways.jpg", exif=exif)
    whole = different[1]
    bad = {
        "header": whole[:20],
        "cut": whole[:2000],
        "random": np.random.default_rng(0).bytes(3000),
        "empty": b"",
        "text": b"text",
        "marker": b"\xff\xd8\xff\xdb\0\0" + whole[6:],
    }
    for name, content in bad.items():
        (workspace.nasty / f"bad-{name}.jpg").write_bytes(content)
