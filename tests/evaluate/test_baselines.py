"""The comparison with baselines, on a small run; and the demo, which must keep its promise."""

import json
import subprocess
import sys
from pathlib import Path

import event_schema
import numpy as np
import pytest
from tiny_run import draw_images, make_run

from btpipe.errors import UsageError
from btpipe.evaluate import baselines, knn, linear_probe
from btpipe.events import Event, Finished, ignore

FLOAT32 = 1e-6
DEMO_SECONDS = 600  # twice what it takes on two quiet cores
PAGE_BYTES = 5_000_000
"""plotly.js alone is 4.8 MB."""


def test_a_run_is_judged_against_its_untrained_twin_and_raw_pixels(tmp_path: Path) -> None:
    draw_images(tmp_path / "train", 24)
    draw_images(tmp_path / "test", 10)
    run, events = make_run(tmp_path / "runs" / "tiny", tmp_path / "train"), list[Event]()
    judged = baselines.compare(run, tmp_path / "test", run / "compare", events.append, k=5)
    scores = (judged.colours, judged.pixels, judged.untrained, judged.pretrained)
    best = max(0.5, *(one.neighbours.top1 for one in scores[:3]))  # two classes of one size
    assert judged.gain == judged.pretrained.neighbours.top1 - best
    assert {one.neighbours.n for one in scores} == {one.linear.n for one in scores} == {10}
    assert not any(isinstance(event, Finished) for event in events)
    # Its tables stay, and give the same number again.
    train, test = (run / "compare" / f"pretrained-{part}.parquet" for part in ("train", "test"))
    assert knn.evaluate(train, test, k=5) == judged.pretrained.neighbours
    assert linear_probe.judge(train, test, run / "s.json", ignore).score == judged.pretrained.linear
    event_schema.read(json.dumps(judged.record()))
    rows = judged.tables()[0].rows
    assert rows[0][0] == "majority class"
    assert rows[-1][1] == f"{100 * judged.pretrained.neighbours.top1:.1f}"
    assert rows[-1][3] == f"{100 * judged.pretrained.linear.top1:.1f}"
    again = baselines.compare(run, tmp_path / "test", run / "compare", ignore, k=5)
    assert again == judged


def test_the_cosine_of_root_histograms_is_the_overlap_of_the_colours() -> None:
    pixels = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    pixels[0, 0] = pixels[1, 0] = (31, 32, 255)  # two of four; the last of a step, the first, ...
    pixels[0, 1] = (64, 0, 0)
    pixels[1, 1] = pixels[2] = (0, 0, 200)
    roots = baselines.root_histograms(pixels)
    assert roots.shape == (3, 512)
    assert roots[0].nonzero()[0].tolist() == [0 * 64 + 1 * 8 + 7, 2 * 64]
    # Bhattacharyya: the sum over colours of sqrt(share here x share there).
    expected = np.array([[1, 0.5, 0], [0.5, 1, np.sqrt(0.5)], [0, np.sqrt(0.5), 1]])
    assert np.abs(roots @ roots.T - expected).max() < FLOAT32


def test_images_without_classes_cannot_be_compared(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 8, labels=("a",))
    run = make_run(tmp_path / "run", tmp_path / "images" / "a")
    with pytest.raises(UsageError, match="a folder of images for each class"):
        baselines.compare(run, tmp_path / "images", run / "compare", ignore)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_the_demo_ends_well_and_tells_what_it_made(tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "btpipe", "demo", "--out", "demo", "--seed", str(seed), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = {event["event"]: event for event in event_schema.read(done.stdout)}
    assert {"Comparison", "Pretrained", "Exported", "Embedded", "Plotted"} <= events.keys()
    assert len(events["DemoDone"]["stages"]) == 6
    assert events["Mapped"]["pictures"] == 2000
    for page in ("map.html", "run.html"):
        assert (tmp_path / "demo" / page).stat().st_size > PAGE_BYTES
        assert f"xdg-open demo/{page}" in events["Note"]["text"]
