"""LARS and the schedule against the published code; the other optimisers' groups."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from btpipe.pretrain import optim, schedule
from btpipe.recipe import Data, Optim, Recipe

PUBLISHED = load_file(Path(__file__).parent / "published.safetensors")
EXACT = 1e-12  # float64; the operations are the same, their grouping is not


def test_lars_equals_the_published_code_over_six_steps() -> None:
    names = ("weight", "zero_weight", "bias")
    parameters = {name: nn.Parameter(PUBLISHED[f"lars.{name}.0"].clone()) for name in names}
    network = nn.Module()
    for name, parameter in parameters.items():
        network.register_parameter(name, parameter)
    recipe = Optim(name="lars", weight_decay=0.01, momentum=0.9, eta=0.001)
    lars = optim.build(recipe, network)
    for step in range(6):
        optim.set_rates(lars, 0.2 * (step + 1), 0.0048 * (step + 1))
        for name, parameter in parameters.items():
            parameter.grad = PUBLISHED[f"lars.grad_{name}.{step}"].clone()
        lars.step()
        for name, parameter in parameters.items():
            expected = PUBLISHED[f"lars.{name}.{step + 1}"]
            torch.testing.assert_close(parameter.detach(), expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("name", ["imagenet", "short", "tiny"])
def test_the_schedule_equals_the_published_code(name: str) -> None:
    epochs, steps_per_epoch, batch_size = (
        int(v) for v in PUBLISHED[f"schedule.{name}.epochs_stepsperepoch_batch"]
    )
    settings = Optim(epochs=epochs, warmup_epochs=10, lr=0.2, bias_lr=0.0048)
    recipe = Recipe(data=Data(batch_size=batch_size), optim=settings)
    images = steps_per_epoch * batch_size + 1  # one that fills no batch
    for step, weights, biases in PUBLISHED[f"schedule.{name}.step_lrweights_lrbiases"].tolist():
        lr, bias_lr = schedule.rates(recipe, int(step), images)
        assert lr == pytest.approx(weights, rel=EXACT, abs=EXACT)
        assert bias_lr == pytest.approx(biases, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(128, 0.7), (256, 0.4), (2048, 0.2), (64, 0.7), (8192, 0.2)]
)
def test_an_automatic_rate_is_the_authors_for_that_batch(batch_size: int, expected: float) -> None:
    automatic = Optim(lr="auto")
    assert schedule.base_lr(automatic, batch_size) == pytest.approx(expected)
    recipe = Recipe(data=Data(batch_size=batch_size), optim=automatic)
    lr, _ = schedule.rates(recipe, 100, images=10 * batch_size)
    assert lr == pytest.approx(expected * batch_size / 256)  # at the end of the warm-up


def test_an_automatic_rate_lies_between_those_of_the_nearest_batches() -> None:
    assert 0.3 < schedule.base_lr(Optim(lr="auto"), 300) < 0.4
    assert schedule.base_lr(Optim(lr=0.3), 300) == 0.3


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_biases_and_batch_norm_take_their_own_rate_and_no_decay(name: str) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    recipe = Optim.model_validate({"name": name, "weight_decay": 0.1})
    optimizer = optim.build(recipe, network)
    optim.set_rates(optimizer, 0.5, 0.25)
    weights, vectors = optimizer.param_groups
    assert [p.ndim for p in weights["params"]] == [2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert (weights["lr"], vectors["lr"]) == (0.5, 0.25)


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_every_optimiser_lowers_a_quadratic(name: str) -> None:
    network = nn.Linear(8, 8, bias=False)
    optimizer = optim.build(Optim.model_validate({"name": name, "eta": 0.05}), network)
    optim.set_rates(optimizer, 0.05, 0.05)
    before = float(network.weight.detach().square().sum())
    for _ in range(20):
        network.weight.grad = 2 * network.weight.detach()
        optimizer.step()
    assert float(network.weight.detach().square().sum()) < 0.9 * before
