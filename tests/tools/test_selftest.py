"""The self-test: it passes here, in time, and names what fails."""

import math
import time

import event_schema
import pytest
import torch
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.errors import NumericsError
from btpipe.tools import selftest_checks, selftest_stages
from btpipe.tools.selftest_checks import Check

GPU = torch.cuda.is_available()
CPU_SECONDS = 300 if GPU else 60
"""The promise of the self-test, in CPU time of this process: wall time moves too much."""


def test_the_self_test_passes_on_this_machine_in_under_a_minute() -> None:
    started = time.process_time()
    result = CliRunner().invoke(app, ["selftest", "--json"])
    assert result.exit_code == 0, result.output
    assert time.process_time() - started < CPU_SECONDS
    (tested,) = event_schema.read(result.stdout)
    names = [check["name"] for check in tested["checks"]]
    of_gpus = ("compiled step, fp64", "compiled step, bf16", "training views", "evaluation view")
    for part in (
        *("loss, gram", "loss, cross", "LARS", "schedule", "step, fp32", "step, bf16"),
        *("masked update", "onnxruntime", "ranks, 1 and 2 CPU processes"),
        *(of_gpus if GPU else ()),
    ):
        assert any(name.startswith(part) for name in names), part
    assert all(check["measured"] <= check["tolerance"] for check in tested["checks"])


@pytest.mark.parametrize("measured", [2e-10, math.inf, math.nan])
def test_what_fails_is_named_with_exit_code_6(measured: float) -> None:
    good = Check("schedule", 1e-16, 1e-10, "")
    bad = Check("loss, gram, float64 on cpu", measured, 1e-10, "")
    selftest_checks.require([good])
    with pytest.raises(NumericsError, match="failed: loss, gram, float64 on cpu\n") as error:
        selftest_checks.require([good, bad])
    assert error.value.exit_code == 6
    (shown,) = selftest_checks.SelfTested(1.0, (good, bad), "CPU", torch.__version__).tables()
    assert [row[3] for row in shown.rows] == ["ok", "FAILED"]


def test_a_difference_is_relative_to_the_largest_value_and_sees_what_is_no_number() -> None:
    expected = torch.tensor([0.0, -200.0])
    assert selftest_checks.difference(torch.tensor([1.0, -200.0]), expected) == 0.005
    assert math.isnan(selftest_checks.difference(torch.tensor([math.nan, -200.0]), expected))


def test_results_that_are_all_zero_are_a_check_that_fails() -> None:
    """What a GPU leaves that computes nothing: the gradient of one rank and of several."""
    zeros = torch.zeros(2)
    assert math.isnan(selftest_checks.relative(0.0, 0.0))
    assert math.isnan(selftest_checks.difference(zeros, zeros))
    assert not Check("ranks", selftest_checks.relative(0.0, 0.0), 1e-10, "").is_ok


def test_an_error_is_a_check_that_fails_and_says_which() -> None:
    def measure() -> float:
        raise RuntimeError("no kernel image is available\nsecond line")

    failed = selftest_checks.tried("compiled step", 1e-10, "gradient", measure)
    assert not failed.is_ok
    assert failed.about == "RuntimeError: no kernel image is available"
    assert selftest_checks.tried("compiled step", 1e-10, "gradient", lambda: 1e-11).is_ok


def test_a_compiler_is_asked_for_gpus_alone() -> None:
    """For a CPU it takes minutes, and proves no GPU."""
    (only,) = selftest_stages.checks(torch.device("cpu"))
    assert (only.name, only.is_ok) == ("onnxruntime on cpu", True)
    assert only.measured > 0  # other arithmetic than the one that it is compared with
