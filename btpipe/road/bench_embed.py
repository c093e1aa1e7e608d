"""What embedding is worth on this machine: against what a user would write, in one run.

The rows take turns in processes of their own, with the same weights on the same images: files in, a
table of vectors out. Beside it decoding alone and the networks alone, which together are the limit.
"""

import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path

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
from btpipe.road.embed_worker import Load
from btpipe.road.seat import take_turns

CALIBRATION_IMAGES = 32
DRAWN_SHORTER_SIDE = 400


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


QUICK = Options(images=8, turns=1, workers=1, backbone="resnet18", image_size=32)


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
        load = Load(folder / "index.parquet", model, options.images, options.workers)
        kinds = [
            _Kind("onnxruntime fp32", "onnx", "fp32"),
            _Kind("torch bf16", "torch", "bf16"),
            *([_Kind("onnxruntime int8", "onnx", "int8")] if "int8" in bundle.precisions else []),
        ]
        if "int8" not in bundle.precisions:
            report(Note("no int8 row: name a bundle of btpipe export --precision fp32,int8"))
        about = f"{shown} at {bundle.preprocessing.size}, {options.images} images, {source}"
        rows = _take_turns(load, kinds, options)
        report(_whole_table(rows, kinds, options, about))
        report(_parts_table(rows, kinds, options))
    text = f"{options.turns} turns a row, on {benchmark.machine('cpu')}"
    report(Finished("bench embed", text, time.perf_counter() - started))


def _take_turns(load: Load, kinds: list[_Kind], options: Options) -> dict[str, Row]:
    """Every row in a process of its own, one after the other, `turns` times."""
    named: dict[str, Prepare] = {
        "user": functools.partial(worker.user, load),
        "decode": functools.partial(worker.decode_alone, load),
    }
    for kind in kinds:
        setting = (load, kind.engine, kind.precision)
        named[f"whole {kind.name}"] = functools.partial(worker.whole, *setting)
        named[f"forward {kind.name}"] = functools.partial(worker.forward_alone, *setting)
    turns = take_turns(
        named, options.turns, threads=runtime.cores(), has_children=lambda name: name == "user"
    )
    return {name: Row(name, taken) for name, taken in turns.items()}


def _whole_table(rows: dict[str, Row], kinds: list[_Kind], options: Options, about: str) -> Tabled:
    user, first = rows["user"], rows[f"whole {kinds[0].name}"]
    cells = [("torchvision eager, DataLoader", "1.00", "", *_speed(user, options), "")]
    for kind in kinds:
        row = rows[f"whole {kind.name}"]
        limit = _limit_seconds(rows["decode"], rows[f"forward {kind.name}"])
        shares = [found / turn.seconds for found, turn in zip(limit, row.turns, strict=True)]
        cells.append(
            (
                f"btpipe, {kind.name}",
                benchmark.faster(row, user, "cpu"),
                benchmark.faster(row, first, "cpu"),
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
    title = f"Embedding: {about}, {benchmark.machine('cpu')}, {options.turns} turns"
    note = (
        "Times faster: median ratio of CPU-seconds, rows taking turns. The limit: decoding alone"
        " and the network alone, their CPU-seconds spread over all cores; the share moves with what"
        " else the machine does. Starting a process is not counted."
    )
    return Tabled(title, columns, tuple(cells), note)


def _parts_table(rows: dict[str, Row], kinds: list[_Kind], options: Options) -> Tabled:
    named = {"decode and resize": rows["decode"]}
    named |= {f"network, {kind.name}": rows[f"forward {kind.name}"] for kind in kinds}
    cells = tuple((name, *_speed(row, options)) for name, row in named.items())
    return Tabled("Each alone, on all cores", ("part", "CPU ms an image", "images/s"), cells)


def _limit_seconds(decode: Row, forward: Row) -> list[float]:
    """By the clock, turn by turn: what both cost together, on all cores at once."""
    cores = runtime.cores()
    return [
        (first.cpu_seconds + second.cpu_seconds) / cores
        for first, second in zip(decode.turns, forward.turns, strict=True)
    ]


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
    config = contract.config(
        described.backbone, described.stem, network.features(described), prepared, ("fp32",)
    )
    with artifact.publish(out, contract.KIND, {}) as folder:
        weights.write(encoder.state_dict(), prepared, folder / contract.WEIGHTS)
        onnx.write(encoder, prepared, folder / contract.MODEL)
        artifact.write_json(folder / contract.CONFIG, config)
