"""Ranks, alarms and neighbours beside a run: right, raised by real causes alone, and harmless."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import NETWORK, logged, weights
from tiny_run import draw_images

from btpipe import events, neighbours, recipe
from btpipe.data.index import open_index
from btpipe.errors import NumericsError, UsageError
from btpipe.pretrain import checkpoint, folder, health, launch, loss, network, nonfinite, step
from btpipe.pretrain.alarms import Alarms
from btpipe.pretrain.run import TrainingRun
from btpipe.recipe import Recipe
from btpipe.runtime import Runtime

RECIPE = (
    NETWORK
    + """[optim]
name = "{optimizer}"
epochs = {epochs}
warmup_epochs = {warmup}
lr = 0.002
bias_lr = 0.002
[run]
precision = "{precision}"
log_steps = 1
[health]
steps = 4
"""
)
STILL = """
[[views]]
scale = [1.0, 1.0]
ratio = [1.0, 1.0]
flip = 0.0
gray = 0.0
jitter = { probability = 0.0 }
blur = { probability = 0.0 }
solarize = { probability = 0.0 }
"""
"""A view that draws nothing: the image itself."""
IMAGES = 34
STEPS_PER_EPOCH = 4
ROUNDING = 1e-4  # relative, of a rank from float32 vectors that two processes computed


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health-images")
    draw_images(folder, IMAGES)
    return folder


def describe(
    images: Path,
    *settings: str,
    epochs: int = 3,
    optimizer: str = "adamw",
    precision: str = "fp32",
    views: str = "",
) -> Recipe:
    warmup = min(1, epochs - 1)
    text = RECIPE.format(epochs=epochs, optimizer=optimizer, precision=precision, warmup=warmup)
    path = images.parent / f"{images.name}-recipe.toml"
    path.write_text(text + views)
    return recipe.load(path, (f"data.train={images}", *settings))


def pretrain(run: Path, recipe: Recipe, devices: str = "1") -> Path:
    launch.pretrain(run, recipe, devices=devices, mode="auto")
    return run


def alarms(run: Path) -> list[str]:
    return [str(event["about"]) for event in logged(run, "Alarm")]


def step_done(at: int, **changes: float) -> events.StepDone:
    """A step of a healthy run, but for `changes`."""
    healthy: dict[str, float] = {
        "epoch": 1.0,
        "loss": 300.0,
        "on_diagonal": 200.0,
        "off_diagonal": 2000.0,
        "mean_diagonal": 0.5,
        "off_diagonal_rms": 0.2,
        "dead_dimensions": 0,
        "overflows": 0,
        "lr": 0.1,
        "bias_lr": 0.1,
        "images_per_second": 10.0,
        "data_wait": 0.0,
        "eta_seconds": 10.0,
    }
    return events.StepDone(step=at, **(healthy | changes))  # type: ignore[arg-type]


def test_ranks_are_measured_when_due_and_at_the_end(tmp_path: Path, images: Path) -> None:
    run = pretrain(tmp_path / "run", describe(images, "health.steps=5"))
    measured = logged(run, "RanksMeasured")
    assert [event["step"] for event in measured] == [5, 10, 12]
    for event in measured:
        assert event["rows"] == 8
        assert 1 < event["encoder"] <= 8
        assert 1 < event["projector"] <= 8


def test_two_processes_measure_the_ranks_of_one(tmp_path: Path, images: Path) -> None:
    one = pretrain(tmp_path / "one", describe(images, epochs=1))
    two = pretrain(tmp_path / "two", describe(images, epochs=1), devices="2")
    for alone, shared in zip(
        logged(one, "RanksMeasured"), logged(two, "RanksMeasured"), strict=True
    ):
        assert shared["rows"] == alone["rows"] == 8
        for name in ("encoder", "projector"):
            assert shared[name] == pytest.approx(alone[name], rel=ROUNDING)


def test_the_ranks_are_those_of_the_first_view_evenly_chosen() -> None:
    random = torch.Generator().manual_seed(0)
    z1, z2, features = (torch.randn(n, 40, generator=random) for n in (1536, 1536, 3072))
    ranks = health.effective_ranks(network.ViewEmbeddings((z1, z2), features), 7)
    assert ranks is not None
    chosen = np.arange(1024) * 1536 // 1024
    assert ranks.step == 7
    assert ranks.rows == 1024
    assert ranks.projector == pytest.approx(neighbours.effective_rank(z1.numpy()[chosen]))
    assert ranks.encoder == pytest.approx(neighbours.effective_rank(features.numpy()[chosen]))


def test_vectors_that_are_not_finite_are_not_measured() -> None:
    z = torch.ones(8, 4)
    z[3, 1] = float("nan")
    assert health.effective_ranks(network.ViewEmbeddings((z, z), torch.ones(16, 4)), 1) is None


def test_a_step_at_which_nothing_is_due_reads_no_number(tmp_path: Path, images: Path) -> None:
    """Tensors without values stand for a device: whoever waited for a number would fail."""
    recipe = describe(images)
    folder.prepare(tmp_path / "run", recipe, events.ignore)
    index = open_index(tmp_path / "run" / folder.INDEX)
    device = torch.device("cpu")
    core = step.build(recipe, device)
    state = checkpoint.State(5, recipe.digest, index.fingerprint)
    run = TrainingRun(recipe, tmp_path / "run", Runtime(device), events.ignore, core, state, index)
    nothing = torch.empty(8, 32, device="meta")
    flags = nonfinite.Flags(nothing, nothing)
    terms = loss.Terms(nothing, nothing, nothing, nothing)
    outcome = step.Outcome(terms, network.ViewEmbeddings((nothing, nothing), nothing), flags)
    watched = health.HealthMonitor(run, lambda: False)
    watched.stepped(outcome, None)
    run.state = checkpoint.State(8, recipe.digest, index.fingerprint)
    with pytest.raises(RuntimeError, match="meta"):
        watched.stepped(outcome, None)


@pytest.mark.parametrize(
    ("optimizer", "seed"), [pytest.param("adamw", 5, marks=pytest.mark.slow), ("lars", 6)]
)
def test_a_healthy_run_raises_no_alarm(
    tmp_path: Path, images: Path, optimizer: str, seed: int
) -> None:
    settings = (f"seed={seed}", "health.steps=1")
    run = pretrain(tmp_path / "run", describe(images, *settings, optimizer=optimizer))
    assert len(logged(run, "RanksMeasured")) == 12
    assert alarms(run) == []


def test_a_rate_far_too_high_is_called_a_collapse(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("optim.lr=1e4", "optim.bias_lr=2e3", "health.steps=1", "data.batch_size=16")
    run = pretrain(tmp_path / "run", describe(images, *settings, optimizer="lars", epochs=8))
    assert "collapse" in alarms(run)
    assert "alarm: collapse, step" in capsys.readouterr().err


def test_views_that_draw_nothing_are_called_too_alike(tmp_path: Path, images: Path) -> None:
    run = pretrain(tmp_path / "run", describe(images, views=STILL + STILL, epochs=2))
    assert alarms(run) == ["views too alike"]


def test_a_projector_with_dead_units_is_told_once(tmp_path: Path, images: Path) -> None:
    recipe, run = describe(images), tmp_path / "run"
    folder.prepare(run, recipe, events.ignore)
    core = step.build(recipe, torch.device("cpu"))
    with torch.no_grad():
        core.network.state_dict()["projector.3.weight"][:8] = 0
    index = open_index(run / folder.INDEX)
    checkpoint.save(run, checkpoint.State(0, recipe.digest, index.fingerprint), core, recipe.run)
    pretrain(run, recipe)
    assert [event["dead_dimensions"] for event in logged(run, "StepDone")] == [8] * 12
    assert alarms(run) == ["dead dimensions"]


def test_overflows_in_fp16_are_told_before_they_end_the_run(tmp_path: Path, images: Path) -> None:
    settings = ("optim.lr=20000", "optim.warmup_epochs=14", "loss.scale=1e-3")
    recipe = describe(images, *settings, precision="fp16", epochs=15)
    with pytest.raises(NumericsError, match="not finite"):
        pretrain(tmp_path / "run", recipe)
    assert "overflow" in alarms(tmp_path / "run")


def test_an_alarm_is_told_again_only_after_it_cleared() -> None:
    monitor = Alarms(batch_size=128, features=512, dimension=512)
    raised = [
        len(monitor.update(step_done(at, dead_dimensions=dead), None))
        for at, dead in enumerate([0, 60, 70, 60, 0, 60])
    ]
    assert raised == [0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"off_diagonal_rms": 0.95}, "collapse"),
        ({"dead_dimensions": 300}, "collapse"),
        ({"dead_dimensions": 52}, "dead dimensions"),
        ({"mean_diagonal": 0.96}, "views too alike"),
    ],
)
def test_each_number_has_its_alarm(changes: dict[str, float], about: str) -> None:
    monitor = Alarms(batch_size=128, features=512, dimension=512, early_steps=100)
    assert monitor.update(step_done(50), None) == []
    (alarm,) = monitor.update(step_done(50, **changes), None)
    assert alarm.about == about
    assert alarm.step == 50


def test_numbers_of_healthy_runs_raise_no_alarm() -> None:
    """What 3,068 photographs and the drawn samples came to, at their extremes."""
    monitor = Alarms(batch_size=128, features=512, dimension=512, early_steps=100)
    assert (
        monitor.update(step_done(20, mean_diagonal=0.5), events.RanksMeasured(20, 80.8, 93.6, 128))
        == []
    )
    high = {"mean_diagonal": 0.97, "off_diagonal_rms": 0.73}  # alike once it has learned
    assert monitor.update(step_done(200, **high), events.RanksMeasured(200, 55.4, 31.4, 128)) == []
    assert monitor.update(None, events.RanksMeasured(300, 145.2, 100.0, 1024)) == []


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_small_batches_correlate_by_chance_without_an_alarm(batch_size: int) -> None:
    random = np.random.default_rng(0)
    monitor = Alarms(batch_size=batch_size, features=512, dimension=64)
    z = random.normal(size=(2, batch_size, 64))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    off = (z[0].T @ z[1] / batch_size)[~np.eye(64, dtype=bool)]
    ranks = [neighbours.effective_rank(random.normal(size=(batch_size, 64))) for _ in range(2)]
    measured = events.RanksMeasured(1, ranks[0], ranks[1], batch_size)
    assert (
        monitor.update(step_done(1, off_diagonal_rms=float((off**2).mean() ** 0.5)), measured) == []
    )


def test_the_search_for_a_loss_scale_is_no_alarm_but_frequent_overflows_are() -> None:
    monitor = Alarms(batch_size=128, features=512, dimension=512)
    searched = [monitor.update(step_done(at, overflows=min(at, 8)), None) for at in range(2, 60, 2)]
    assert not any(searched)
    raised = [
        monitor.update(step_done(at, overflows=8 + (at - 60) // 3), None) for at in range(62, 90, 2)
    ]
    assert [alarm.about for alarms_now in raised for alarm in alarms_now] == ["overflow"]


def test_judging_by_neighbours_does_not_change_the_training(tmp_path: Path, images: Path) -> None:
    plain = pretrain(tmp_path / "plain", describe(images))
    settings = (f"health.knn={images}", "health.knn_epochs=1", "health.steps=1")
    judged = pretrain(tmp_path / "judged", describe(images, *settings))
    assert weights(judged) == weights(plain)
    judgements = logged(judged, "KnnJudged")
    assert [event["step"] for event in judgements] == [4, 8, 12]
    for event in judgements:
        assert event["images"] == IMAGES
        assert event["neighbours"] == 20
        assert 0 <= event["accuracy"] <= 1
        assert event["seconds"] > 0


@pytest.mark.slow
def test_the_other_rank_waits_while_the_first_one_judges(tmp_path: Path, images: Path) -> None:
    settings = (f"health.knn={images}",)
    plain = pretrain(tmp_path / "plain", describe(images, epochs=1), devices="2")
    judged = pretrain(tmp_path / "judged", describe(images, *settings, epochs=1), devices="2")
    assert len(logged(judged, "KnnJudged")) == 1
    assert weights(judged) == weights(plain)


def test_pictures_of_two_colours_are_told_apart(tmp_path: Path) -> None:
    """So that the accuracy is of these images and these labels: chance would give a half."""
    from PIL import Image  # noqa: PLC0415 - drawn here only

    random = np.random.default_rng(1)
    for i in range(40):
        colour = np.array([200, 40, 40] if i % 2 else [40, 40, 200])
        pixels = np.clip(colour + random.normal(0, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
        path = tmp_path / "labelled" / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "labelled" / "red" / "39.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    settings = (f"health.knn={tmp_path / 'labelled'}",)
    run = pretrain(tmp_path / "run", describe(tmp_path / "labelled", *settings, epochs=1))
    (judgement,) = logged(run, "KnnJudged")
    assert judgement["images"] == 39
    assert judgement["accuracy"] > 0.9


def test_a_folder_that_cannot_judge_is_refused_before_anything_is_made(
    tmp_path: Path, images: Path
) -> None:
    draw_images(tmp_path / "one", 4, labels=("cat",))
    draw_images(tmp_path / "loose" / "deep", 4)
    (tmp_path / "loose" / "a.jpg").write_bytes((tmp_path / "one" / "cat" / "000.jpg").read_bytes())
    for name, message in (
        ("nowhere", "health.knn = .*nowhere.*: no such folder or file"),
        ("one", "'cat' is the only class"),
        ("loose", "health.knn: a.jpg has no label"),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            pretrain(tmp_path / "run", describe(images, f"health.knn={tmp_path / name}"))
        assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()
