"""`btpipe bench`: how fast this machine embeds, and what limits it."""

import functools
from pathlib import Path

import event_schema
import pytest
import torch
from tiny_run import draw_images
from typer.testing import CliRunner

from btpipe import runtime
from btpipe.cli import app
from btpipe.errors import UsageError
from btpipe.tools import bench, measured_rows
from btpipe.tools.measured_process import Timing


@pytest.mark.slow
def test_the_quick_benchmark_shows_each_precision_and_each_part() -> None:
    result = CliRunner().invoke(app, ["bench", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    *notes, end = event_schema.read(result.stdout)
    assert end["event"] == "Benchmarked"
    if torch.cuda.is_available():
        kinds = ["onnxruntime fp32", "onnxruntime tf32", "onnxruntime fp16", "torch bf16"]
        assert not notes
    else:
        kinds = ["onnxruntime fp32", "torch bf16"]
        assert "no int8 row" in notes[0]["text"]
    assert [way["name"] for way in end["ways"]] == kinds
    assert end["ways"][0]["times_faster"] == 1
    assert all(0 < way["share_of_limit"] < 2 for way in end["ways"])
    alone = ["read and hash", "read, decode and resize", "write the table"]
    assert [part["name"] for part in end["parts"]] == [*alone, *(f"network, {k}" for k in kinds)]
    assert all(part["cpu_ms"] > 0 for part in end["parts"])


def test_the_limit_is_the_slower_part_on_a_gpu_and_the_sum_over_all_cores_on_a_cpu() -> None:
    decode, network = Timing(seconds=3.0, cpu_seconds=8.0), Timing(seconds=2.0, cpu_seconds=4.0)
    assert measured_rows.limit_seconds([decode, network], "cuda") == 3.0
    assert measured_rows.limit_seconds([decode, network], "cpu") == 12.0 / runtime.cores()


def test_a_gpu_gets_more_images_in_a_turn_unless_somebody_says_how_many() -> None:
    options = functools.partial(
        bench.options, turns=3, backbone="resnet50", image_size=224, device="cpu"
    )
    default = options(None, quick=False)
    assert (default.images, default.device) == (64, "cpu")
    assert bench.IMAGES["cuda"] == 4096
    assert options(9, quick=False).images == 9
    assert options(9, quick=True).images == 8


def test_too_few_images_for_a_turn_are_refused(tmp_path: Path) -> None:
    draw_images(tmp_path, 3)
    result = CliRunner().invoke(app, ["bench", "--quick", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "3 images" in str(result.exception)


def test_an_unknown_backbone_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match="resnet18, resnet34"):
        bench.parse_backbone("resnet19")
