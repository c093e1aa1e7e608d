"""How many images a second this machine embeds, and which part of it is the limit.

Every row is a process of its own: files in, a table of vectors out, by each precision that the
bundle holds. Beside it reading, decoding, the networks and writing, each alone. Decoding and a
network are the limit: on a CPU, whose cores they share, what both cost; on a GPU the slower one.
What others reach on the same images is measured by `benchmarks/`.
"""

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from btpipe import artifact, recipe, runtime
from btpipe.data.index import Index, build
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.eval_loader import evaluation_batches
from btpipe.data.sources import synthetic
from btpipe.embed.precisions import Precision
from btpipe.errors import UsageError
from btpipe.events import Note, Report
from btpipe.export import contract, onnx_model, weights
from btpipe.export.contract import Preprocessing
from btpipe.pretrain import network
from btpipe.recipe.tables import Backbone
from btpipe.tools import bench_cases
from btpipe.tools.bench_cases import Work
from btpipe.tools.measured_process import Timing, take_turns
from btpipe.tools.measured_rows import (
    Benchmarked,
    Device,
    Measurement,
    Part,
    Prepare,
    Way,
    about,
    limit_seconds,
    machine,
    part_of,
    times_faster,
)

CALIBRATION_IMAGES = 32
DRAWN_SHORTER_SIDE = 400
IMAGES: dict[Device, int] = {"cpu": 64, "cuda": 4096}
"""In a turn, where nobody says otherwise."""
PARTS = {"read": "read and hash", "decode": "read, decode and resize", "write": "write the table"}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is measured: `turns` turns of `images` images.

    `backbone` and `image_size` are of the random network that is measured where no bundle is named.
    """

    images: int
    turns: int
    backbone: Backbone
    image_size: int
    device: Device


def options(
    images: int | None,
    turns: int,
    backbone: str,
    image_size: int,
    *,
    device: runtime.AskedDevice,
    quick: bool,
) -> BenchOptions:
    """As the command line asks for them.

    Raises:
        UsageError: no torchvision ResNet of that name.
        MachineError: "cuda", and the driver shows no GPU.
    """
    used = runtime.resolve_device(device)
    if quick:
        return BenchOptions(8, 1, "resnet18", 32, used)
    return BenchOptions(images or IMAGES[used], turns, parse_backbone(backbone), image_size, used)


def parse_backbone(text: str) -> Backbone:
    """The name of a torchvision ResNet.

    Raises:
        UsageError: another name.
    """
    for name in get_args(Backbone):
        if name == text:
            return name  # type: ignore[no-any-return]
    raise UsageError(f"--backbone {text}", expected=", ".join(get_args(Backbone)))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to compute: its name in the table, and how the bundle is opened for it."""

    name: str
    engine: bench_cases.Engine
    precision: Precision


def run(options: BenchOptions, data: Path | None, model: Path | None, on_event: Report) -> None:
    """Measures and reports both tables.

    Raises:
        UsageError: fewer images in `data` than a turn has, or no bundle under `model`.
    """
    started = time.perf_counter()
    with prepare(options, data, model, on_event) as setting:
        rows = take(parts(setting), options, lambda _: False)
    first, ways = rows[f"whole {setting.kinds[0].name}"], []
    for kind in setting.kinds:
        row = rows[f"whole {kind.name}"]
        part = part_of(kind.name, row, options.images)
        two = times_faster(row, first, options.device), share_of_limit(rows, kind, options)
        ways.append(Way(part.name, part.cpu_ms, part.images_per_second, *two))
    on_event(
        Benchmarked(
            seconds=time.perf_counter() - started,
            network=setting.network,
            image_size=setting.image_size,
            images=options.images,
            source=setting.source,
            machine=machine(options.device),
            turns=options.turns,
            ways=tuple(ways),
            parts=tuple(parts_of(rows, setting, options)),
            note=NOTES[options.device],
        )
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """A bundle, images and ways to compute, and what the first two are called."""

    work: Work
    kinds: tuple[Kind, ...]
    network: str
    image_size: int
    source: str

    def about(self, options: BenchOptions) -> str:
        """The same in a table's title."""
        images = about(self.network, self.image_size, options.images, self.source)
        return f"{images}, {machine(options.device)}, {options.turns} turns"


@contextlib.contextmanager
def prepare(
    options: BenchOptions, data: Path | None, model: Path | None, on_event: Report
) -> Iterator[Setting]:
    """The images and the bundle, drawn and random where none are named, as long as this is open.

    Raises:
        UsageError: fewer images in `data` than a turn has, or no bundle under `model`.
    """
    with tempfile.TemporaryDirectory(prefix="btpipe-") as name:
        folder = Path(name)
        index, source = _images(options, data, folder, on_event)
        shown = str(model)
        if model is None:
            model, shown = folder / "bundle", f"{options.backbone}, random"
            _make_bundle(index, options, model)
        bundle = contract.open_bundle(model)
        if options.device == "cpu" and "int8" not in bundle.precisions:
            on_event(Note("no int8 row: name a bundle of btpipe export --precision fp32,int8"))
        if options.device == "cuda" and "fp16" not in bundle.precisions:
            on_event(Note("no fp16 row: name a bundle of btpipe export --precision fp32,fp16"))
        work = Work(folder / "index.parquet", model, options.images, options.device)
        kinds = _kinds(bundle.precisions, options.device)
        yield Setting(work, kinds, shown, bundle.preprocessing.size, source)


def _kinds(held: Sequence[str], device: Device) -> tuple[Kind, ...]:
    """The ways to compute there, float32 first."""
    onnx_precisions: tuple[Precision, ...] = (
        ("fp32", "tf32", "fp16") if device == "cuda" else ("fp32", "int8")
    )
    kinds = [
        Kind(f"onnxruntime {precision}", "onnx", precision)
        for precision in onnx_precisions
        if precision in held or precision == "tf32"
    ]
    return (*kinds, Kind("torch bf16", "torch", "bf16"))


def parts(setting: Setting) -> dict[str, Prepare]:
    """Files to vectors and the network by each kind ("whole NAME", "forward NAME"), and `PARTS`."""
    work = setting.work
    named: dict[str, Prepare] = {
        "read": functools.partial(bench_cases.read_alone, work),
        "decode": functools.partial(bench_cases.decode_alone, work),
        "write": functools.partial(bench_cases.write_alone, work),
    }
    for kind in setting.kinds:
        arguments = (work, kind.engine, kind.precision)
        named[f"whole {kind.name}"] = functools.partial(bench_cases.whole, *arguments)
        named[f"forward {kind.name}"] = functools.partial(bench_cases.forward_alone, *arguments)
    return named


def take(
    named: Mapping[str, Prepare], options: BenchOptions, has_children: Callable[[str], bool]
) -> dict[str, Measurement]:
    """Every row in a process of its own; on a CPU all by turns, on a GPU one after the other."""
    together = [named] if options.device == "cpu" else [{name: named[name]} for name in named]
    taken: dict[str, tuple[Timing, ...]] = {}
    for rows in together:
        taken |= take_turns(rows, options.turns, threads=runtime.cores(), has_children=has_children)
    return {name: Measurement(name, turns) for name, turns in taken.items()}


NOTES: dict[Device, str] = {
    "cpu": "Times faster: median ratio of CPU-seconds, rows taking turns. The limit: decoding alone"
    " and the network alone, their CPU-seconds spread over all cores; the share moves with what"
    " else the machine does. Starting a process is not counted.",
    "cuda": "Times faster: median ratio of seconds by the clock, each row alone on the GPU. The"
    " limit: the slower of decoding alone and the network alone. Starting a process is not"
    " counted, but for the DataLoader's.",
}


def share_of_limit(rows: Mapping[str, Measurement], kind: Kind, options: BenchOptions) -> float:
    """How near files-to-vectors comes to its parts: median over turns, 1 is the limit."""
    whole = rows[f"whole {kind.name}"]
    alone = zip(rows["decode"].turns, rows[f"forward {kind.name}"].turns, strict=True)
    shares = [
        limit_seconds(turns, options.device) / turn.seconds
        for turns, turn in zip(alone, whole.turns, strict=True)
    ]
    return statistics.median(shares)


def parts_of(
    rows: Mapping[str, Measurement], setting: Setting, options: BenchOptions
) -> list[Part]:
    """Every part alone."""
    named = {PARTS[name]: rows[name] for name in PARTS}
    named |= {f"network, {kind.name}": rows[f"forward {kind.name}"] for kind in setting.kinds}
    return [part_of(name, row, options.images) for name, row in named.items()]


def _images(
    options: BenchOptions, data: Path | None, folder: Path, on_event: Report
) -> tuple[Index, str]:
    """An index with its file in `folder`, and what its images are."""
    shorter_side = 0
    if data is None:
        shorter_side = min(DRAWN_SHORTER_SIDE, 2 * options.image_size)
        (folder / "images").mkdir()
        for i in range(max(options.images, CALIBRATION_IMAGES)):
            path = folder / "images" / f"{i:04d}.jpg"
            path.write_bytes(synthetic.jpeg(i, shorter_side))
    index, _ = build(data or folder / "images", on_event)
    if len(index) < options.images:
        raise UsageError(
            f"{len(index)} images", where=data or "", expected=f"{options.images}, as --images says"
        )
    index.save(folder / "index.parquet")
    return index, str(data) if data else f"drawn, shorter side {shorter_side}"


def _make_bundle(index: Index, options: BenchOptions, out: Path) -> None:
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
            onnx_model.write(
                encoder, prepared, folder / contract.MODELS[precision], precision=precision
            )
        artifact.write_json(folder / contract.CONFIG, config)
