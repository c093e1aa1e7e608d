"""What embedding is worth on this machine: against what a user would write, in one run.

Every row is a process of its own, with the same weights on the same images: files in, a table of
vectors out. Beside it reading, decoding, the networks and writing, each alone. Decoding and a
network are the limit: on a CPU, whose cores they share, what both cost; on a GPU the slower one.
"""

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from btpipe import artifact, recipe, runtime
from btpipe.data import index as data_index
from btpipe.data.evaluation import evaluation_batches
from btpipe.data.index import Index
from btpipe.data.sources import synthetic
from btpipe.data.views import Geometry
from btpipe.embed.precisions import Precision
from btpipe.errors import UsageError
from btpipe.events import Finished, Note, Report, Tabled
from btpipe.export import contract, onnx, weights
from btpipe.export.contract import Preprocessing
from btpipe.pretrain import network
from btpipe.recipe.tables import Backbone
from btpipe.road import benchmark
from btpipe.road import embed_worker as worker
from btpipe.road.benchmark import Prepare, Row, number
from btpipe.road.benchmark_worker import Device
from btpipe.road.embed_worker import Load
from btpipe.road.seat import Turn, take_turns

CALIBRATION_IMAGES = 32
DRAWN_SHORTER_SIDE = 400
IMAGES: dict[Device, int] = {"cpu": 64, "cuda": 4096}
"""In a turn, where nobody says otherwise; on a GPU so many that the DataLoader's start is small."""
PARTS = {"read": "read and hash", "decode": "read, decode and resize", "write": "write the table"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What `bench embed` measures: `turns` turns of `images` images.

    `backbone` and `image_size` are of the random network that is measured where no bundle is named.
    """

    images: int
    turns: int
    workers: int
    backbone: Backbone
    image_size: int
    device: Device


def options(
    images: int | None,
    turns: int,
    workers: int,
    backbone: str,
    image_size: int,
    *,
    device: runtime.AskedDevice,
    quick: bool,
) -> Options:
    """As the command line asks for them.

    Raises:
        UsageError: no torchvision ResNet of that name.
        MachineError: "cuda", and the driver shows no GPU.
    """
    found = runtime.resolve_device(device)
    if quick:
        return Options(8, 1, 1, "resnet18", 32, found)
    known = benchmark.parse_backbone(backbone)
    return Options(images or IMAGES[found], turns, workers, known, image_size, found)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A way to compute: its name in the table, and how the bundle is opened for it."""

    name: str
    engine: worker.Engine
    precision: Precision


def run(options: Options, data: Path | None, model: Path | None, report: Report) -> None:
    """Measures and reports both tables.

    Raises:
        UsageError: fewer images in `data` than a turn has, or no bundle under `model`.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="btpipe-") as name:
        folder = Path(name)
        index, source = _images(options, data, folder, report)
        if model is None:
            model, shown = folder / "bundle", f"{options.backbone}, random"
            _make_bundle(index, options, model)
        else:
            shown = str(model)
        bundle = contract.open_bundle(model)
        load = Load(
            folder / "index.parquet", model, options.images, options.workers, options.device
        )
        kinds = _kinds(bundle.precisions, options.device)
        if options.device == "cpu" and "int8" not in bundle.precisions:
            report(Note("no int8 row: name a bundle of btpipe export --precision fp32,int8"))
        if options.device == "cuda" and "fp16" not in bundle.precisions:
            report(Note("no fp16 row: name a bundle of btpipe export --precision fp32,fp16"))
        about = f"{shown} at {bundle.preprocessing.size}, {options.images} images, {source}"
        rows = _take_turns(load, kinds, options)
        report(_whole_table(rows, kinds, options, about))
        report(_parts_table(rows, kinds, options))
    text = f"{options.turns} turns a row, on {benchmark.machine(options.device)}"
    report(Finished("bench embed", text, time.perf_counter() - started))


def _kinds(held: Sequence[str], device: Device) -> list[_Kind]:
    """The ways to compute there, float32 first."""
    onnx_precisions: tuple[Precision, ...] = (
        ("fp32", "tf32", "fp16") if device == "cuda" else ("fp32", "int8")
    )
    kinds = [
        _Kind(f"onnxruntime {precision}", "onnx", precision)
        for precision in onnx_precisions
        if precision in held or precision == "tf32"
    ]
    return [*kinds, _Kind("torch bf16", "torch", "bf16")]


def _take_turns(load: Load, kinds: list[_Kind], options: Options) -> dict[str, Row]:
    """Every row in a process of its own; on a CPU all by turns, on a GPU one after the other."""
    named: dict[str, Prepare] = {"user": functools.partial(worker.user, load, False)}
    if options.device == "cuda":
        named["user fp16"] = functools.partial(worker.user, load, True)
    named["read"] = functools.partial(worker.read_alone, load)
    named["decode"] = functools.partial(worker.decode_alone, load)
    named["write"] = functools.partial(worker.write_alone, load)
    for kind in kinds:
        setting = (load, kind.engine, kind.precision)
        named[f"whole {kind.name}"] = functools.partial(worker.whole, *setting)
        named[f"forward {kind.name}"] = functools.partial(worker.forward_alone, *setting)
    together = [named] if options.device == "cpu" else [{name: named[name]} for name in named]
    taken: dict[str, tuple[Turn, ...]] = {}
    for rows in together:
        taken |= take_turns(
            rows,
            options.turns,
            threads=runtime.cores(),
            has_children=lambda name: name.startswith("user"),
        )
    return {name: Row(name, turns) for name, turns in taken.items()}


def _whole_table(rows: dict[str, Row], kinds: list[_Kind], options: Options, about: str) -> Tabled:
    device, user, first = options.device, rows["user"], rows[f"whole {kinds[0].name}"]
    cells = [("torchvision eager, DataLoader", "1.00", "", *_speed(user, options), "")]
    if "user fp16" in rows:
        row = rows["user fp16"]
        faster = benchmark.faster(row, user, device)
        cells.append(("the same, fp16 autocast", faster, "", *_speed(row, options), ""))
    for kind in kinds:
        row = rows[f"whole {kind.name}"]
        alone = zip(rows["decode"].turns, rows[f"forward {kind.name}"].turns, strict=True)
        shares = [
            limit_seconds(parts, device) / turn.seconds
            for parts, turn in zip(alone, row.turns, strict=True)
        ]
        cells.append(
            (
                f"btpipe, {kind.name}",
                benchmark.faster(row, user, device),
                benchmark.faster(row, first, device),
                *_speed(row, options),
                f"{statistics.median(shares):.2f}",
            )
        )
    columns = (
        "files to vectors",
        "times faster",
        "than our fp32",
        "CPU ms an image",
        "images/s",
        "share of the limit",
    )
    title = f"Embedding: {about}, {benchmark.machine(device)}, {options.turns} turns"
    return Tabled(title, columns, tuple(cells), NOTES[device])


NOTES: dict[Device, str] = {
    "cpu": "Times faster: median ratio of CPU-seconds, rows taking turns. The limit: decoding alone"
    " and the network alone, their CPU-seconds spread over all cores; the share moves with what"
    " else the machine does. Starting a process is not counted.",
    "cuda": "Times faster: median ratio of seconds by the clock, each row alone on the GPU. The"
    " limit: the slower of decoding alone and the network alone. Starting a process is not"
    " counted, but for the DataLoader's.",
}


def _parts_table(rows: dict[str, Row], kinds: list[_Kind], options: Options) -> Tabled:
    named = {PARTS[name]: rows[name] for name in PARTS}
    named |= {f"network, {kind.name}": rows[f"forward {kind.name}"] for kind in kinds}
    cells = tuple((name, *_speed(row, options)) for name, row in named.items())
    return Tabled("Each alone, on all cores", ("part", "CPU ms an image", "images/s"), cells)


def limit_seconds(parts: Sequence[Turn], device: Device) -> float:
    """By the clock, of parts that are done at once: a CPU's share its cores, a GPU's none."""
    if device == "cuda":
        return max(part.seconds for part in parts)
    return sum(part.cpu_seconds for part in parts) / runtime.cores()


def _speed(row: Row, options: Options) -> tuple[str, str]:
    cpu = statistics.median(turn.cpu_seconds for turn in row.turns)
    seconds = statistics.median(turn.seconds for turn in row.turns)
    return number(1000 * cpu / options.images), number(options.images / seconds)


def _images(options: Options, data: Path | None, folder: Path, report: Report) -> tuple[Index, str]:
    """An index with its file in `folder`, and what its images are."""
    shorter_side = 0
    if data is None:
        shorter_side = min(DRAWN_SHORTER_SIDE, 2 * options.image_size)
        (folder / "images").mkdir()
        for i in range(max(options.images, CALIBRATION_IMAGES)):
            path = folder / "images" / f"{i:04d}.jpg"
            path.write_bytes(synthetic.jpeg(i, shorter_side))
    index, _ = data_index.build(data or folder / "images", report)
    if len(index) < options.images:
        raise UsageError(
            f"{len(index)} images", where=data or "", expected=f"{options.images}, as --images says"
        )
    index.save(folder / "index.parquet")
    return index, str(data) if data else f"drawn, shorter side {shorter_side}"


def _make_bundle(index: Index, options: Options, out: Path) -> None:
    """A bundle of a random network whose batch norm has seen images: as fast as a trained one.

    It passes no gate and is for nothing else.
    """
    geometry = Geometry.for_size(options.image_size)
    prepared = Preprocessing(
        geometry.size, geometry.resize, geometry.interpolation, network.MEAN, network.STD
    )
    rows = np.arange(min(len(index), CALIBRATION_IMAGES))
    batches = evaluation_batches(
        index, rows, geometry, batch_size=len(rows), threads=runtime.cores()
    )
    pixels = np.concatenate([batch.pixels for batch in batches])
    described = recipe.Network(backbone=options.backbone)
    torch.manual_seed(0)
    encoder = weights.calibrate(network.encoder(described), prepared, pixels, len(pixels))
    held: tuple[Literal["fp32", "fp16"], ...] = ("fp32", "fp16")
    if options.device == "cpu":
        held = held[:1]
    config = contract.config(
        described.backbone, described.stem, network.features(described), prepared, held
    )
    with artifact.publish(out, contract.KIND, {}) as folder:
        weights.write(encoder.state_dict(), prepared, folder / contract.WEIGHTS)
        for precision in held:
            onnx.write(encoder, prepared, folder / contract.MODELS[precision], precision=precision)
        artifact.write_json(folder / contract.CONFIG, config)
