"""A model in half or in int8 is published only where it agrees, and only with those that do."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_run import SIZE, draw_images
from torch import nn
from torchvision.models import resnet
from typer.testing import CliRunner

from btpipe import runtime
from btpipe.cli import app
from btpipe.data.index import build
from btpipe.errors import NumericsError, RefusedError, UsageError
from btpipe.events import Event, TextTable, ignore
from btpipe.export import bundle, contract, encoder_source, golden, samples, verify
from btpipe.export.bundle import BundleOptions
from btpipe.export.session import Session

EVERYTHING = BundleOptions(("fp32", "fp16", "int8"), float_input=True, license_name="cc-by-4.0")
SAME_CPU = 1 - 1e-6
"""Cosine of vectors that one CPU makes twice of the same files; nothing but rounding differs."""


@pytest.fixture(scope="module")
def everything(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every model, made by the command."""
    out = tmp_path_factory.mktemp("everything") / "tiny"
    several = ["--precision", "int8", "--precision", "fp32,fp16", "--onnx-input", "float-nchw"]
    command = ["export", str(home / "runs" / "tiny"), "--out", str(out), *several]
    done = CliRunner().invoke(app, [*command, "--license", EVERYTHING.license_name])
    assert done.exit_code == 0, done.output
    return out


def test_every_model_takes_pixels_and_gives_float32_at_any_batch_size(everything: Path) -> None:
    opened = contract.open_bundle(everything)
    assert opened.precisions == ("fp32", "fp16", "int8")
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    for precision in opened.precisions:
        session = Session(opened.model_of(precision), device="cpu")
        whole = session.run(images)
        assert whole.dtype == np.float32
        assert whole.shape == (5, 512)
        assert np.array_equal(session.run(images[:1]), whole[:1])


def test_the_int8_model_computes_in_int8_from_its_first_convolution_to_its_last_mean(
    everything: Path,
) -> None:
    graph = onnx.load(everything / "encoder-int8.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("Conv", "Add", "MaxPool"):
            continue
        origins = [made_by[name].op_type for name in node.input[:2] if name in made_by]
        assert set(origins) == {"DequantizeLinear"}, node
        if node.op_type == "Conv":
            stored, scale, _ = made_by[node.input[1]].input
            assert weights[stored].data_type == onnx.TensorProto.INT8
            assert list(weights[scale].dims) == [weights[stored].dims[0]]
    (division,) = (node for node in graph.node if node.op_type == "Div")
    (subtraction, cast) = (made_by[division.input[0]], made_by[made_by[division.input[0]].input[0]])
    assert (subtraction.op_type, cast.op_type) == ("Sub", "Cast")
    assert list(cast.input) == ["images"]


def test_no_two_products_of_the_int8_model_exceed_16_bits(everything: Path) -> None:
    """CPUs without VNNI add two products in 16 bits before they widen, and clip what exceeds."""
    graph = onnx.load(everything / "encoder-int8.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv":
            stored = onnx.numpy_helper.to_array(weights[made_by[node.input[1]].input[0]])
            assert 2 * 255 * np.abs(stored.astype(int)).max() < 2**15, node.name


def test_the_fp16_model_holds_and_computes_halves(everything: Path) -> None:
    whole, half = (
        (everything / name).stat().st_size for name in ("encoder.onnx", "encoder-fp16.onnx")
    )
    assert half < 0.51 * whole
    graph = onnx.load(everything / "encoder-fp16.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 20
    for node in convolutions:
        assert weights[node.input[1]].data_type == onnx.TensorProto.FLOAT16


def test_each_model_is_one_checked_file_that_says_how_pixels_are_prepared(everything: Path) -> None:
    prepared = contract.open_bundle(everything).preprocessing.text()
    models = sorted(everything.glob("*.onnx"))
    assert len(models) == 4
    for path in models:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert (properties["preprocessing"], properties["license"]) == (prepared, "cc-by-4.0")
        assert str(Path.home()).encode() not in path.read_bytes()


def test_manifest_and_card_have_a_gate_for_each_model_and_the_licence(everything: Path) -> None:
    origin = contract.open_bundle(everything).manifest.origin
    gates = origin["gates"]
    assert isinstance(gates, dict)
    assert list(gates) == ["float-nchw", "fp16", "fp32", "int8"]
    limits = {"fp32": 0.9999, "float-nchw": 0.9999, "fp16": 0.999, "int8": 0.99}
    for name, gate in gates.items():
        assert gate["mean_cosine"] >= gate["min_cosine"]
        assert gate["mean_cosine"] >= limits[name] == gate["thresholds"]["cosine"]
        assert 0 <= gate["label_agreement"] <= 1
        assert (gate["images"], gate["batch_sizes"], gate["provider"]) == (12, [1, 2, 17], "cpu")
    card = (everything / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    for name in ("encoder-fp16.onnx", "encoder-int8.onnx", "encoder-float-nchw.onnx"):
        assert f"| {name} | cpu |" in card
    assert "calibrated on 12 images" in card
    assert str(origin["calibration"]) == str(origin["data"])


@pytest.mark.slow
def test_the_same_run_and_images_give_the_same_bytes_in_int8(
    home: Path, everything: Path, tmp_path: Path
) -> None:
    options = BundleOptions(("int8",), license_name=EVERYTHING.license_name)
    again = bundle.export_run(home / "runs" / "tiny", tmp_path / "tiny", ignore, options=options)
    for name in ("encoder.onnx", "encoder-int8.onnx", "golden/0.jpg"):
        assert (again / name).read_bytes() == (everything / name).read_bytes()


def test_gates_say_what_is_left_without_the_mean_with_exact_sums_and_on_which_cpu(
    everything: Path,
) -> None:
    origin = contract.open_bundle(everything).manifest.origin
    gates, card = origin["gates"], (everything / "README.md").read_text()
    assert isinstance(gates, dict)
    for name, gate in gates.items():
        assert gate.get("centred_cosine", 0) >= gate["thresholds"]["centred_cosine"], name
        assert gate["centred_cosine"] >= gate["min_centred_cosine"]
    exact = gates["int8"].get("exact")
    assert exact["centred_cosine"] >= 0.994
    assert "| encoder-int8.onnx | cpu, exact sums |" in card
    cpu = origin.get("cpu")
    assert isinstance(cpu, dict)
    assert ("avx2" in cpu["flags"]) == ("avx2" in Path("/proc/cpuinfo").read_text())
    assert f"On {cpu['model']} ({', '.join(cpu['flags'])})." in card


def test_nothing_is_said_to_be_for_tensorrt_which_takes_no_such_zero_points(
    everything: Path,
) -> None:
    assert "TensorRT" not in (everything / "README.md").read_text()


def test_vectors_that_are_right_only_in_what_all_images_share_do_not_pass() -> None:
    """What clipped sums did to a trained ResNet-18: cosine 0.9978, and 0.992 without the mean."""
    random = np.random.default_rng(0)
    shared, own = random.normal(size=(2, 64)), random.normal(size=(96, 64))
    references = (10 * shared[0] + own).astype(np.float32)
    errors = random.normal(size=(96, 64))
    pixels = np.zeros((96, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(96)
    chosen = samples.Samples(pixels, np.full(96, -1), pixels)

    def passed(error: float) -> bool:
        wrong = (references + error * errors).astype(np.float32)
        limits = verify.THRESHOLDS["int8"]
        gate = verify.compare(
            references,
            lambda images: wrong[images[:, 0, 0, 0]],
            chosen,
            limits,
            model="x",
            provider="cpu",
        )
        assert gate.mean_cosine > 0.9998
        return gate.passed

    assert passed(0.01)
    assert not passed(0.13)


def test_what_to_do_depends_on_which_models_failed(tmp_path: Path) -> None:
    limits = verify.THRESHOLDS["int8"]
    right = verify.Gate("x", 9, "cpu", 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 8, None, limits)
    wrong = dataclasses.replace(right, centred_cosine=0.95)
    half, whole = (dataclasses.replace(wrong, model=contract.MODELS[n]) for n in ("fp16", "fp32"))
    clipped, coarse = (
        dataclasses.replace(wrong, model=contract.MODELS["int8"], exact=exact)
        for exact in (right, wrong)
    )
    for failed, what, fix in (
        ([half, coarse], "encoder-fp16.onnx and encoder-int8.onnx do not give", "leave fp16 out"),
        ([half, coarse], "", "calibrate it on more images"),
        ([clipped], "encoder-int8.onnx does not give", "another kind of CPU"),
        ([whole, clipped], "encoder.onnx and encoder-int8.onnx do not give", "report the table"),
    ):
        with pytest.raises(NumericsError) as refusal:
            verify.require(verify.Gates((*failed, right), runtime.cpu()), tmp_path)
        assert refusal.value.what.startswith(what)
        assert fix in refusal.value.fix


def test_images_to_calibrate_on_and_to_judge_with_share_no_content(tmp_path: Path) -> None:
    paths = draw_images(tmp_path, 40)
    for path in paths[::4]:  # twins of every fourth, under another name
        (path.parent / f"twin-{path.name}").write_bytes(path.read_bytes())
    index, _ = build(tmp_path)
    prepared = encoder_source.preprocessing_of(SIZE)
    chosen = samples.choose(index, prepared, ignore, calibrate=True)
    judged = {picture.tobytes() for picture in chosen.pixels}
    calibrating = {picture.tobytes() for picture in chosen.calibration}
    assert len(judged) + len(calibrating) == 40
    assert not judged & calibrating
    assert sorted(set(chosen.labels.tolist())) == [0, 1]
    draw_images(tmp_path / "few", 2)
    few, _ = build(tmp_path / "few")
    with pytest.raises(UsageError, match="another one for int8"):
        samples.choose(few, prepared, ignore, calibrate=True)


class Drifting(nn.Conv2d):
    """A convolution that computes with another weight than its state says."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        changed = self.weight.clone()
        changed[0] = 10 * self.weight.abs().max()
        return nn.functional.conv2d(images, changed, self.bias, self.stride, self.padding)


@pytest.mark.slow
def test_a_weight_that_changes_before_the_trace_fails_in_every_precision(
    home: Path, tmp_path: Path
) -> None:
    source = encoder_source.of_run(home / "runs" / "tiny", ignore)
    state = source.encoder.state_dict()
    blocks(source.encoder)[0].bn2.weight.data.fill_(1)
    blocks(source.encoder)[0].conv1.__class__ = Drifting
    assert all(torch.equal(state[name], t) for name, t in source.encoder.state_dict().items())
    table = refused(source, home, tmp_path, BundleOptions(("fp32", "fp16", "int8")), "encoder.onnx")
    assert [row[-1] for row in table.rows] == ["NO", "NO", "NO"]


def refused(
    source: encoder_source.EncoderSource,
    home: Path,
    folder: Path,
    options: BundleOptions,
    model: str,
) -> TextTable:
    """Publishing fails with 6 for this model and leaves nothing; returns the table, a row each."""
    index, _ = build(home / "images")
    chosen = samples.choose(index, source.preprocessing, ignore, calibrate=True)
    origin = source.origin | {"models": options.models, "license": ""}
    events: list[Event] = []
    out = folder / "exports" / "bad"
    with pytest.raises(NumericsError, match=model) as refusal:
        bundle.publish(source, chosen, out, origin, events.append, options)
    assert refusal.value.exit_code == 6
    assert list(out.parent.iterdir()) == []
    (table,) = [table for event in events for table in event.tables()]
    (exact,) = [row for row in table.rows if row[1] == "cpu, exact sums"] or [()]
    assert bool(exact) == ("int8" in options.precisions)
    rows = tuple(row for row in table.rows if row is not exact)
    assert [row[0] for row in rows] == options.models
    return dataclasses.replace(table, rows=rows)


@pytest.mark.parametrize(
    ("precision", "factor"), [pytest.param("fp16", 1e7, marks=pytest.mark.slow), ("int8", 1e5)]
)
def test_weights_that_only_float32_can_hold_fail_in_the_lower_precision_alone(
    home: Path, tmp_path: Path, precision: contract.Precision, factor: float
) -> None:
    """One channel larger, and what reads it smaller by as much: the same function in float32."""
    source = encoder_source.of_run(home / "runs" / "tiny", ignore)
    for block in blocks(source.encoder):
        with torch.no_grad():
            block.bn2.weight.fill_(1)  # an untrained block's is 0: nothing comes out of it
            block.bn1.weight[0] *= factor
            block.bn1.bias[0] = factor
            block.conv2.weight[:, 0] /= factor
    table = refused(source, home, tmp_path, BundleOptions((precision,)), contract.MODELS[precision])
    assert [row[-1] for row in table.rows] == ["yes", "NO"]


def blocks(encoder: nn.Module) -> list[resnet.BasicBlock]:
    return [module for module in encoder.modules() if isinstance(module, resnet.BasicBlock)]


def test_a_bundle_of_other_models_is_not_replaced_unasked(home: Path, everything: Path) -> None:
    run = home / "runs" / "tiny"
    with pytest.raises(RefusedError, match=r"encoder-int8\.onnx") as refusal:
        bundle.export_run(run, everything, ignore)
    assert "--overwrite" in str(refusal.value)
    touched = everything.stat().st_mtime_ns
    bundle.export_run(run, everything, ignore, options=EVERYTHING)
    assert everything.stat().st_mtime_ns == touched


def test_unknown_precisions_and_licences_are_refused() -> None:
    assert bundle.parse_precisions(["int8,fp16", "fp16"]) == ("fp16", "int8")
    with pytest.raises(UsageError, match="--precision int4"):
        bundle.parse_precisions(["fp32, int4"])
    with pytest.raises(UsageError, match="--license"):
        BundleOptions(license_name="as you like: it\n")


def test_a_process_of_its_own_reproduces_the_golden_vectors_from_the_bundle_alone(
    everything: Path,
) -> None:
    code = (
        "import json, sys, pathlib\n"
        "from btpipe.export import contract, golden\n"
        "opened = contract.open_bundle(pathlib.Path(sys.argv[1]))\n"
        "print(json.dumps(golden.compare(opened)))\n"
        "golden.require(golden.compare(opened), opened)\n"
        "assert 'torch' not in sys.modules\n"
    )
    run = [sys.executable, "-c", code, str(everything)]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    least = json.loads(output)
    assert set(least) == {"fp32", "fp16", "int8"}
    assert all(value >= SAME_CPU for value in least.values()), least


def test_another_preprocessing_than_where_it_was_exported_is_found_by_the_golden_images(
    everything: Path,
) -> None:
    opened = contract.open_bundle(everything)
    wrong = dataclasses.replace(opened.preprocessing, size=SIZE, mean=(0.5, 0.5, 0.5))
    assert golden.compare(dataclasses.replace(opened, preprocessing=wrong)) == golden.compare(
        opened
    ), "the mean is inside the model"
    turned = everything / "golden" / "1.jpg"
    content = turned.read_bytes()
    try:
        turned.write_bytes((everything / "golden" / "0.jpg").read_bytes())
        with pytest.raises(NumericsError, match="other vectors than where it was exported"):
            golden.require(golden.compare(opened), opened)
    finally:
        turned.write_bytes(content)


@pytest.mark.slow
def test_killed_while_exporting_nothing_is_published_and_the_rest_is_swept(
    home: Path, tmp_path: Path
) -> None:
    run, out = home / "runs" / "tiny", tmp_path / "exports" / "tiny"
    command = [sys.executable, "-m", "btpipe", "export", str(run), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("exports/tiny.tmp-*/encoder.onnx")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = out.parent.iterdir()
    assert ".tmp-" in left.name
    bundle.export_run(run, out, ignore)
    assert list(out.parent.iterdir()) == [out]
    contract.open_bundle(out)


def test_images_of_another_size_are_prepared_at_the_field_of_view_of_256_to_224(
    everything: Path,
) -> None:
    for size, resize in ((224, 256), (160, 183), (64, 73), (32, 37), (288, 329)):
        assert encoder_source.preprocessing_of(size).resize == resize
    for size in (*range(32, 513), 846):  # timm computes its resize from the share that is kept
        prepared = encoder_source.preprocessing_of(size)
        config = contract.config("resnet18", "imagenet", 512, prepared, ["fp32"])
        share = config["pretrained_cfg"]
        assert isinstance(share, dict)
        assert math.floor(size / share["crop_pct"]) == prepared.resize, size
    written = json.loads((everything / "config.json").read_text())
    assert written["pretrained_cfg"]["crop_pct"] == SIZE / 37
    assert written["preprocessing"]["resize"] == 37
