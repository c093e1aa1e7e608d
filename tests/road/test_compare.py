"""The comparison with baselines, on a small run; and the demo, which must keep its promise."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import draw_images, make_run

from btpipe.errors import UsageError
from btpipe.events import Event, Finished, ignore
from btpipe.explore import knn
from btpipe.road import compare

DEMO_SECONDS = 600  # twice what it takes on two quiet cores


def test_a_run_is_judged_against_its_untrained_twin_and_raw_pixels(tmp_path: Path) -> None:
    draw_images(tmp_path / "train", 24)
    draw_images(tmp_path / "test", 10)
    run, seen = make_run(tmp_path / "runs" / "tiny", tmp_path / "train"), list[Event]()
    judged = compare.compare(run, tmp_path / "test", run / "compare", seen.append, k=5)
    best = max(judged.pixels.top1, judged.untrained.top1)
    assert judged.gain == judged.pretrained.top1 - best
    assert {a.n for a in (judged.pixels, judged.untrained, judged.pretrained)} == {10}
    assert not any(isinstance(event, Finished) for event in seen)
    # Its tables stay, and give the same number again.
    train, test = (run / "compare" / f"pretrained-{part}.parquet" for part in ("train", "test"))
    assert knn.evaluate(train, test, k=5).top1 == judged.pretrained.top1
    rows = judged.table("title").rows
    assert rows[0][0] == "majority class"
    assert rows[-1][1] == f"{100 * judged.pretrained.top1:.1f}"
    again = compare.compare(run, tmp_path / "test", run / "compare", ignore, k=5)
    assert again == judged


def test_images_without_classes_cannot_be_compared(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 8, labels=("a",))
    run = make_run(tmp_path / "run", tmp_path / "images" / "a")
    with pytest.raises(UsageError, match="a folder of images for each class"):
        compare.compare(run, tmp_path / "images", run / "compare", ignore)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_the_demo_ends_well_and_prints_its_table(tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "btpipe", "demo", "--out", "demo", "--seed", str(seed)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("majority class", "raw pixels", "untrained encoder", "pretrained encoder"):
        assert row in done.stdout
