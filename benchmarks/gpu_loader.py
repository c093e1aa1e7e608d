"""Stages of `benchmarks.gpu`: how fast files become views, and each part of it alone."""

import concurrent.futures
import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from nvidia import nvimgcodec
from nvidia.dali import Pipeline, fn, pipeline_def, types

from benchmarks.stage import (
    Rate,
    cores,
    device,
    files_of,
    gpu,
    index_of,
    judged,
    loader_of,
    print_result,
    rate,
    recipe_of,
)
from benchmarks.workspace import Workspace
from btpipe import recipe
from btpipe.data.pipeline import augment_params, decode, prefetch
from btpipe.data.pipeline.decode import BatchDecoder
from btpipe.data.pipeline.train_loader import LoaderSettings

BATCH = 256
PAIRS_PER_SECOND = {224: 2500, 32: 16_000}
"""What training at these pixels is to take from 16 cores."""
HOST_CORES = 16


def stage_decode(workspace: Workspace) -> None:
    """Decoding a batch that is in memory: btpipe's decoder, its settings, and DALI's graph."""
    seconds = 0.3 if workspace.small else 2.5
    files = files_of(workspace.jpegs, 16 if workspace.small else BATCH)
    parsed = [encoded for file in files if (encoded := decode.parse(file))]
    for name, decoder in decoders():
        throughput = rate(functools.partial(decoder.decode, parsed), len(parsed), seconds)
        print_result(
            f"decode alone, {name}",
            images_per_second=round(throughput.per_second),
            **_host(throughput),
        )
    if gpu() is None:
        return
    for share, fancy in ((0.65, True), (1.0, True), (0.65, False)):
        pipeline = _dali_decoder(len(files), share, fancy=fancy)

        def feed(pipeline: Pipeline = pipeline) -> None:
            pipeline.feed_input("encoded", files)
            pipeline.schedule_run()

        def turn(pipeline: Pipeline = pipeline) -> None:
            pipeline.outputs()
            feed(pipeline)

        feed()
        feed()
        throughput = rate(turn, len(files), seconds)
        name = f"decode alone, DALI mixed, hw_decoder_load {share:g}, fancy {int(fancy)}"
        print_result(name, images_per_second=round(throughput.per_second), **_host(throughput))


def decoders() -> list[tuple[str, BatchDecoder]]:
    """btpipe's own, and on a GPU others with less or more hardware, and with plain upsampling."""
    tries: list[tuple[str, BatchDecoder]] = [("as btpipe", decode.batch_decoder(gpu(), cores()))]
    if gpu() is None:
        return tries
    kinds = nvimgcodec.BackendKind
    others = (kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU, kinds.CPU_ONLY)
    for share, fancy in ((0.0, 1), (0.5, 1), (1.0, 1), (0.5, 0)):
        hardware = nvimgcodec.Backend(kinds.HW_GPU_ONLY, load_hint=share)
        backends = [hardware, *(nvimgcodec.Backend(kind) for kind in others)]
        options = f":fancy_upsampling={fancy}"
        decoder = BatchDecoder(gpu(), cores(), backends=backends, options=options)
        tries.append((f"hardware {share:g}, fancy {fancy}", decoder))
    return tries


def _dali_decoder(count: int, share: float, *, fancy: bool) -> Pipeline:
    def graph() -> object:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        return fn.decoders.image(
            encoded,
            device="mixed",
            output_type=types.RGB,
            hw_decoder_load=share,
            jpeg_fancy_upsampling=fancy,
        )

    define = pipeline_def(
        graph, batch_size=count, num_threads=cores(), device_id=gpu(), prefetch_queue_depth=1
    )
    return define()


def stage_loader(workspace: Workspace) -> None:
    """The training loader alone: pairs of views from files, into tensors."""
    cases = (
        ("JPEG 400, 224 pixels", workspace.jpegs, "imagenet-1gpu.toml", 512),
        ("JPEG 400, 224 pixels", workspace.jpegs, "imagenet-1gpu.toml", 256),
        ("PNG 32, 32 pixels", workspace.pngs, "cifar10.toml", 128),
        ("PNG 32, 32 pixels", workspace.pngs, "cifar10.toml", 512),
    )
    with judged() as require:
        for name, folder, file, batch in cases:
            size = 8 if workspace.small else batch
            run_recipe = recipe_of(workspace, file, f"data.threads={cores()}")
            settings = LoaderSettings.sample(run_recipe, size)
            with loader_of(index_of(folder), settings, device()) as loader:
                batches = functools.partial(next, iter(loader))
                throughput = rate(batches, size, 0.5 if workspace.small else 5.0, warm_ups=4)
                require(not loader.rejected, f"good images rejected: {loader.rejected}")
            print_result(
                f"loader alone, {name}, batch {size}",
                pairs_per_second=round(throughput.per_second),
                **_host(throughput),
            )


def stage_host(workspace: Workspace) -> None:
    """The host's share alone: files read and handed over, and the draws, a second and core."""
    seconds = 0.5 if workspace.small else 2.0
    for name, folder in (("JPEG 400", workspace.jpegs), ("PNG 32", workspace.pngs)):
        _readers(name, folder, seconds)
    _drawing(seconds)


def _readers(name: str, folder: Path, seconds: float) -> None:
    """Files through the reading threads and nvImageCodec's parser, and no further."""
    index = index_of(folder)
    rows = np.arange(min(len(index), 1024))
    mean = float(np.mean([index.table["bytes"][int(row)].as_py() for row in rows[:64]]))

    def read(row: int) -> object:
        return decode.parse(np.frombuffer(index.read_bytes(row), np.uint8))

    def action() -> None:
        tasks = enumerate(np.array_split(rows, max(1, len(rows) // BATCH)))
        for _ in prefetch.read_ahead(tasks, read, lambda _, contents: contents, pool):
            pass

    with concurrent.futures.ThreadPoolExecutor(cores() + 2) as pool:
        throughput = rate(action, len(rows), seconds)
    a_core = throughput.per_second / throughput.cores
    print_result(
        f"readers, {name}, {mean / 1000:.1f} kB a file",
        files_per_second_and_core=round(a_core),
        files_per_second=round(throughput.per_second),
        cores=round(throughput.cores, 2),
    )


def _drawing(seconds: float) -> None:
    """Both views' draws of a batch, in one thread, against what training takes of a core."""
    default = recipe.Recipe()
    rows = np.arange(BATCH)
    for size, pairs_per_second in PAIRS_PER_SECOND.items():
        sizes = np.full((BATCH, 2), 32 if size == 32 else 480, np.int64)

        def action(sizes: NDArray[np.int64] = sizes) -> None:
            augment_params.draw_views(default.views, seed=0, epoch=0, images=rows, sizes=sizes)

        throughput = rate(action, BATCH, seconds)
        print_result(
            f"draws for {size} pixels",
            pairs_per_second_and_core=round(throughput.per_second / throughput.cores),
            training_takes=round(pairs_per_second / HOST_CORES),
        )


def _host(throughput: Rate) -> dict[str, float]:
    return {"cores": round(throughput.cores, 2), "this_thread": round(throughput.thread, 2)}
