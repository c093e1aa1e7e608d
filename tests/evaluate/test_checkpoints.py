"""Measures of checkpoints that need no labels: their formulas, and what is chosen by them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser, needs_chromium
from PIL import Image
from tiny_run import add_checkpoint, draw_images, make_run
from typer.testing import CliRunner

from btpipe import neighbours, recipe
from btpipe.cli import app
from btpipe.data.index import open_index
from btpipe.data.pipeline import view_pairs
from btpipe.errors import UsageError
from btpipe.evaluate import checkpoints, label_free
from btpipe.evaluate.checkpoint_report import By, CheckpointRow, Selected
from btpipe.events import Event, Note, Rejected, RunStarted, Warned, ignore
from btpipe.export import encoder_source
from btpipe.plot import html, png
from btpipe.pretrain import network

FLOAT32 = 1e-5
"""Cosines in float32, summed in another order."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 3 and 6; the weights of step 6 are half noise."""
    home = tmp_path_factory.mktemp("select")
    draw_images(home / "images", 24)
    folder = make_run(home / "tiny", home / "images", stem="imagenet")
    add_checkpoint(folder, 6, 1.0)
    return folder


def vectors(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 7)).astype(np.float32)


def test_uniformity_and_alignment_are_those_of_the_published_code() -> None:
    x, y = (torch.nn.functional.normalize(torch.from_numpy(vectors(s)), dim=1) for s in (0, 1))
    # Wang and Isola, arXiv 2005.10242, figure 5.
    published = torch.pdist(x).pow(2).mul(-2).exp().mean().log()
    assert label_free.uniformity(3 * x.numpy()) == pytest.approx(float(published), FLOAT32)
    published = (x - y).norm(dim=1).pow(2).mean()
    alignment = label_free.alignment(x.numpy(), 5 * y.numpy()).mean()
    assert alignment == pytest.approx(float(published), FLOAT32)


def test_four_corners_of_a_square_have_the_uniformity_of_its_sides_and_diagonals() -> None:
    square = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    sides, diagonals = 4 * math.exp(-2 * 2), 2 * math.exp(-2 * 4)
    assert label_free.uniformity(square) == pytest.approx(math.log((sides + diagonals) / 6))


def test_retrieval_counts_the_images_whose_other_view_is_the_nearest() -> None:
    first, second = vectors(0), vectors(0) + 0.9 * vectors(1)
    shares = label_free.retrieval(first, second)
    x, y = neighbours.normalize(first), neighbours.normalize(second)
    for i in range(len(x)):
        forward = all(x[i] @ y[i] > x[i] @ y[j] for j in range(len(y)) if j != i)
        backward = all(x[i] @ y[i] > x[j] @ y[i] for j in range(len(x)) if j != i)
        assert shares[i] == (forward + backward) / 2
    assert 0.2 < shares.mean() < 0.95
    assert {0.0, 0.5, 1.0} == set(shares)


def test_a_collapse_is_aligned_and_neither_uniform_nor_retrieved() -> None:
    same = np.ones((20, 7), np.float32)
    assert label_free.alignment(same, same).mean() == 0
    assert label_free.uniformity(same) == pytest.approx(0, abs=FLOAT32)
    assert label_free.retrieval(same, same).mean() == pytest.approx(1 / 20)


def test_pairs_are_the_same_in_every_call_and_each_image_comes_once(run: Path) -> None:
    described, index = recipe.load(run / "recipe.toml"), open_index(run / "index.parquet")
    once, again = (
        view_pairs.read(index, described, 20, CPU, ignore, known_bad={}) for _ in range(2)
    )
    assert len(set(once.rows.tolist())) == len(once.rows) == 20
    assert not torch.equal(once.first, once.second)
    for a, b in ((once.first, again.first), (once.second, again.second)):
        assert torch.equal(a, b)
    fewer = view_pairs.read(index, described, 6, CPU, ignore, known_bad={})
    assert torch.equal(fewer.second, once.second[:6])


def test_images_that_cannot_be_read_are_left_out(run: Path) -> None:
    described, index = recipe.load(run / "recipe.toml"), open_index(run / "index.parquet")
    bad = {row: Rejected(f"{row}.jpg", "decode", "content", "damaged") for row in (0, 5)}
    pairs = view_pairs.read(index, described, 24, CPU, ignore, known_bad=bad)
    assert sorted(pairs.rows) == [row for row in range(24) if row not in bad]
    assert len(pairs.first) == len(pairs.second) == 22


def test_the_measures_are_of_the_encoders_that_export_would_publish(run: Path) -> None:
    selected = checkpoints.measure(run, ignore, by="retrieval", most=20)
    described, index = recipe.load(run / "recipe.toml"), open_index(run / "index.parquet")
    pairs = view_pairs.read(index, described, 20, CPU, ignore, known_bad={})
    assert [row.step for row in selected.rows] == [0, 3, 6]
    assert [row.epoch for row in selected.rows] == [0, 1, 2]
    for row in selected.rows:
        step = row.step or None
        encoder = encoder_source.of_run(run, ignore, untrained=step is None, step=step).encoder
        with torch.no_grad():
            x, y = (
                torch.nn.functional.normalize(encoder(network.normalise(view, torch.float32)))
                for view in (pairs.first, pairs.second)
            )
        cosines, diagonal = x @ y.T, torch.arange(20)
        hits = (cosines.argmax(1) == diagonal).float() + (cosines.argmax(0) == diagonal).float()
        assert row.retrieval == pytest.approx(float(hits.mean() / 2))
        assert row.alignment == pytest.approx(float((x - y).pow(2).sum(1).mean()), 1e-3)
        spread = [torch.pdist(z).pow(2).mul(-2).exp().mean().log() for z in (x, y)]
        assert row.uniformity == pytest.approx(float(sum(spread) / 2), 1e-3)
        assert 1 < row.rank <= 20
    assert selected == checkpoints.measure(run, ignore, by="retrieval", most=20)


def test_the_command_names_a_checkpoint_and_draws_the_curve(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "tiny")
    accuracies = [
        {"event": "KnnJudged", "step": step, "accuracy": accuracy}
        for step, accuracy in ((3, 0.25), (5, 0.99))
    ]
    events = [RunStarted("r", "", 0, 6, 3, 24, 8, 1, "cpu", "fp32", 1, 0.0).record(), *accuracies]
    log = tmp_path / "runs" / "tiny" / "events.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    draw_images(tmp_path / "others", 9)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", "select", "runs/tiny", "--images", "others"])
    assert result.exit_code == 0, result.output
    written = json.loads(Path("runs/tiny/select.json").read_text())
    assert f"btpipe export runs/tiny --step {written['step']}" in result.output
    assert written["images"] == 9
    # kNN is told of the very step only: that of step 5 is of no checkpoint.
    assert [row["knn"] for row in written["rows"]] == [None, 0.25, None]
    assert "View retrieval" in Path("runs/tiny/select.html").read_text()


def test_labelled_images_judge_every_checkpoint_where_they_choose(
    run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(run, folder)
    with pytest.raises(UsageError, match=r"health\.knn"):
        checkpoints.measure(folder, ignore, by="knn", most=4)
    shutil.copy(folder / "index.parquet", folder / "knn.parquet")
    selected = checkpoints.measure(folder, ignore, by="knn", most=4)
    assert all(row.knn is not None and 0 < row.knn <= 1 for row in selected.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--out", "x.svg"], r"\.html or \.png"), ([], "no checkpoint yet")],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(UsageError, match=message):
        app(["eval", "select", str(folder), *arguments], standalone_mode=False)


ROWS = (
    CheckpointRow(0, 0.0, 0.10, 90.0, -2.0, 0.1, None),
    CheckpointRow(100, 1.0, 0.40, 80.0, -2.5, 0.5, 0.50),
    CheckpointRow(200, 2.0, 0.60, 70.0, -2.4, 0.4, 0.70),
    CheckpointRow(300, 3.0, 0.60, 75.0, -2.3, 0.6, 0.65),
)


def chosen(by: By, error: float | None = None) -> Selected:
    return Selected.choose(
        "r", by, ROWS, images=50, own=True, seconds=1.0, errors=lambda _a, _b: error
    )


def test_each_measure_has_its_own_best_and_of_equal_ones_the_later() -> None:
    selected = chosen("retrieval")
    assert selected.best == {
        "retrieval": 300,
        "rank": 100,
        "uniformity": 100,
        "alignment": 200,
        "knn": 200,
    }
    assert (selected.step, selected.next_step, selected.gap) == (300, 200, 0)
    assert chosen("knn").gap == pytest.approx(0.05)


def test_a_measure_by_which_training_made_nothing_better_says_so() -> None:
    assert chosen("retrieval").start_is_better == ""
    assert "does not see" in chosen("rank").start_is_better
    assert "0.100 against 0.400 at step 200" in chosen("alignment").start_is_better


def test_a_lead_within_the_noise_is_called_that() -> None:
    assert "within the noise" in chosen("alignment", 0.1).text
    assert "within the noise" not in chosen("alignment", 0.01).text


def test_a_run_with_one_checkpoint_is_told_how_to_keep_more() -> None:
    only = Selected.choose(
        "r", "retrieval", ROWS[:2], images=5, own=True, seconds=1.0, errors=lambda _a, _b: None
    )
    assert (only.step, only.next_step) == (100, None)
    assert "run.keep_every" in only.text


def test_a_damaged_checkpoint_is_left_out_with_a_warning(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(run, folder)
    weights = folder / "checkpoints" / "step-00000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    events: list[Event] = []
    selected = checkpoints.run(folder, events.append, most=4, out=tmp_path / "x.html")
    assert [row.step for row in selected.rows] == [0, 3]
    assert any(isinstance(event, Warned) and "step 6" in event.text for event in events)
    assert any(isinstance(event, Note) and "--step 3" in event.text for event in events)


def test_a_png_is_drawn(tmp_path: Path) -> None:
    selected = chosen("retrieval")
    png.write_panels(tmp_path / "x.png", selected.title(), selected.panels(), selected.marks())
    assert np.array(Image.open(tmp_path / "x.png").convert("L")).std() > 5


@needs_chromium
def test_a_browser_draws_every_measure_and_the_table(tmp_path: Path) -> None:
    selected = chosen("retrieval")
    html.write_panels(
        tmp_path / "x.html",
        selected.title(),
        selected.text,
        selected.panels(),
        selected.marks(),
        selected.tables()[0],
    )
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "x.html")
        lines = tab.ask("document.querySelectorAll('.scatterlayer .trace').length")
        stars = tab.ask("[...document.querySelectorAll('.annotation')].map((a) => a.textContent)")
        cells = tab.ask("[...document.querySelectorAll('.numbers td')].map((c) => c.textContent)")
        assert (tab.problems, tab.requests) == ([], [])
    assert lines == 5
    assert stars == ["\N{BLACK STAR}"] * 5
    assert isinstance(cells, list)
    assert "60.0*" in cells
