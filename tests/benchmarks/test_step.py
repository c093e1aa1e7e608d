"""The benchmark: the published formulation is the published one, and what is measured is true."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.step import QUICK, core_kinds, default_core, parse_grid, run
from benchmarks.step_cases import Sizes
from btpipe.errors import MachineError, UsageError
from btpipe.events import Event
from btpipe.pretrain import step
from btpipe.reference import barlow_twins
from btpipe.tools import measured_process, measured_rows
from btpipe.tools.measured_rows import Compared

PUBLISHED = load_file(Path(__file__).parent.parent / "pretrain" / "published.safetensors")
EXACT = 1e-12  # float64; the same operations as those that made the numbers
SINGLE = 1e-3  # float32 through a resnet18 and batch norm over 4 images, relative
TINY = Sizes("resnet18", 32, 4, 16)
MEBIBYTE = 2**20


@pytest.mark.parametrize("i", range(5))
def test_the_loss_to_compare_with_is_the_published_one(i: int) -> None:
    z1, z2 = (PUBLISHED[f"loss.{i}.z{k}"].clone().requires_grad_() for k in (1, 2))
    lambd = float(PUBLISHED[f"loss.{i}.lambda"])
    value = barlow_twins.Loss(z1.shape[1], lambd).double()(z1, z2)
    value.backward()
    expected = [PUBLISHED[f"loss.{i}.{name}"] for name in ("value", "grad_z1", "grad_z2")]
    torch.testing.assert_close([value, z1.grad, z2.grad], expected, rtol=EXACT, atol=EXACT)


def test_the_lars_to_compare_with_is_the_published_one() -> None:
    network = nn.Module()
    for name in ("weight", "zero_weight", "bias"):
        network.register_parameter(name, nn.Parameter(PUBLISHED[f"lars.{name}.0"].clone()))
    lars = barlow_twins.optimizer_for(network, weight_decay=0.01, momentum=0.9, eta=0.001)
    for turn in range(6):
        for group, rate in zip(lars.param_groups, (0.2, 0.0048), strict=True):
            group["lr"] = rate * (turn + 1)
        for name, parameter in network.named_parameters():
            parameter.grad = PUBLISHED[f"lars.grad_{name}.{turn}"].clone()
        lars.step()
        for name, parameter in network.named_parameters():
            expected = PUBLISHED[f"lars.{name}.{turn + 1}"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["imagenet", "short", "tiny"])
def test_the_schedule_to_compare_with_is_the_published_one(name: str) -> None:
    epochs, steps_per_epoch, batch_size = (
        int(v) for v in PUBLISHED[f"schedule.{name}.epochs_stepsperepoch_batch"]
    )
    for at, *expected in PUBLISHED[f"schedule.{name}.step_lrweights_lrbiases"].tolist():
        rates = barlow_twins.learning_rates(
            int(at),
            epochs=epochs,
            warmup_epochs=10,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch_size,
            lr=0.2,
            bias_lr=0.0048,
            final_ratio=0.001,
        )
        assert rates == pytest.approx(tuple(expected), rel=EXACT, abs=EXACT)


def test_both_steps_make_the_same_update_from_the_same_weights() -> None:
    recipe = TINY.recipe()
    core = step.build(
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": "fp32"})}),
        torch.device("cpu"),
    )
    baseline = barlow_twins.Network(TINY.backbone, TINY.widths, recipe.loss.lambd)
    baseline.load_state_dict(core.network.state_dict(), strict=False)
    settings = recipe.optim
    trainer = barlow_twins.Trainer(
        baseline,
        barlow_twins.optimizer_for(
            baseline, settings.weight_decay, settings.momentum, settings.eta
        ),
    )
    pixels = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=pixels)
    value = trainer.step(views[0], views[1], 0.5, 0.1)
    outcome = step.update(core, [*views], 0.5, 0.1)
    torch.testing.assert_close(value, outcome.terms.total(recipe.loss.lambd), rtol=SINGLE, atol=0.0)
    ours = core.network.state_dict()
    for name, tensor in baseline.state_dict().items():
        if name in ours:
            torch.testing.assert_close(ours[name], tensor, rtol=SINGLE, atol=SINGLE, msg=name)


def hold_64_mebibytes() -> measured_process.Prepared:
    memory = measured_process.PeakMemory(torch.device("cpu"), beside_bytes=16 * MEBIBYTE)

    def action() -> None:
        torch.ones(64 * MEBIBYTE // 4)

    return measured_process.Prepared(action, memory)


def sleep_and_count() -> measured_process.Prepared:
    def action() -> None:
        time.sleep(0.3)
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    return measured_process.Prepared(action, measured_process.PeakMemory(torch.device("cpu")))


def end_at_once() -> measured_process.Prepared:
    raise SystemExit(3)


def end_unless_it_computes_as_pretrain() -> measured_process.Prepared:
    if not torch.backends.cudnn.benchmark:
        raise SystemExit("cudnn.benchmark is off, which runtime.start switches on")
    return sleep_and_count()


def test_what_is_measured_searches_for_algorithms_as_pretrain_does() -> None:
    mine = measured_process.MeasuredProcess(
        "searches", end_unless_it_computes_as_pretrain, threads=1
    )
    prepared = mine.prepare()
    mine.close()
    assert prepared


def test_what_only_torch_gives_back_counts_at_its_peak_and_all_else_as_it_is() -> None:
    context_and_dali, torch_now, torch_peak = 900, 300, 5000
    in_use = context_and_dali + torch_now
    peak = measured_process.peak_in_use(in_use, torch_peak_bytes=torch_peak, torch_bytes=torch_now)
    assert peak == context_and_dali + torch_peak


def test_the_step_that_pretrain_runs_is_among_the_rows_of_a_gpu() -> None:
    assert default_core("cuda") == ("bf16", True)
    kinds = core_kinds("cuda", compiled=False)
    assert kinds == [("fp32", False), ("bf16", False), ("bf16", True)]
    assert len(core_kinds("cuda", compiled=True)) == 4
    assert default_core("cpu") in core_kinds("cpu", compiled=False)
    assert not any(compiled for _, compiled in core_kinds("cpu", compiled=False))


def test_a_seat_measures_the_memory_of_its_own_action() -> None:
    mine = measured_process.MeasuredProcess("holds 64 MiB", hold_64_mebibytes, threads=1)
    assert mine.prepare()
    peak_bytes = mine.peak_bytes()
    mine.close()
    assert 47 * MEBIBYTE < peak_bytes < 60 * MEBIBYTE  # 64 - 16, and a little of the process


def test_cpu_seconds_leave_out_what_the_process_waits() -> None:
    mine = measured_process.MeasuredProcess("sleeps", sleep_and_count, threads=1)
    assert mine.prepare()
    turn = mine.measure()
    mine.close()
    assert turn is not None
    assert 0.1 <= turn.cpu_seconds < 0.2
    assert turn.seconds >= 0.4


def test_a_seat_that_ends_is_named() -> None:
    mine = measured_process.MeasuredProcess("ends at once", end_at_once, threads=1)
    with pytest.raises(MachineError, match="'ends at once' ended \\(exit code 3\\)"):
        mine.prepare()
    mine.close()


def test_the_ratio_is_the_median_over_turns_that_were_taken_together() -> None:
    base = measured_rows.Measurement(
        "published", tuple(measured_process.Timing(9.0, s) for s in (2.0, 8.0, 4.0))
    )
    row = measured_rows.Measurement(
        "core", tuple(measured_process.Timing(1.0, s) for s in (1.0, 2.0, 1.0))
    )
    assert measured_rows.faster(row, base, "cpu") == "4.00"
    assert measured_rows.faster(row, base, "cuda") == "9.00"
    assert measured_rows.faster(measured_rows.Measurement("no memory"), base, "cpu") == "-"


@pytest.mark.parametrize("grid", ["64", "64xA", "1x64", "x", "64x"])
def test_a_grid_that_means_nothing_is_refused(grid: str) -> None:
    with pytest.raises(UsageError, match="--grid"):
        parse_grid(grid)
    assert parse_grid("64,256x8192") == ((64, 256), (8192,))


@pytest.mark.slow
def test_the_quick_benchmark_shows_its_three_tables() -> None:
    events: list[Event] = []
    run(QUICK, events.append, compiled=False, loss_only=False)
    steps, losses, lars = (event.table for event in events if isinstance(event, Compared))
    assert [row[0] for row in losses.rows] == ["published", "gram", "cross"]
    for table in (steps, losses, lars):
        assert table.rows[0][table.columns.index("times faster")] == "1.00"
