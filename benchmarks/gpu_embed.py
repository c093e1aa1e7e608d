"""Stages of `benchmarks.gpu`: the bundle's gate, the golden images, and embedding jobs."""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.gpu_images import with_comment
from benchmarks.gpu_step import pretrain
from benchmarks.stage import CommandResult, Require, btpipe, gpu, judged, print_result, rate
from benchmarks.workspace import Workspace
from btpipe import neighbours
from btpipe.embed import precisions
from btpipe.embed.encoder import load
from btpipe.export import contract, golden

GOLDEN_COSINE = 0.999
SAME_COSINE = 0.999
"""Between a GPU's vectors and a CPU's, both in float32: decoders differ by half a grey level."""
AGAIN_IMAGES = 300
CALL_IMAGES = 256


def bundle_of(workspace: Workspace) -> Path:
    return workspace.work / "exports" / "gpu"


def stage_export(workspace: Workspace) -> None:
    """`btpipe export --onnx` of the newest run, in fp32 and fp16; the gates tell."""
    if not list(workspace.work.glob("runs/*/checkpoints/step-*")):
        print_result("a run to export", exit_code=pretrain(workspace, 15.0).code)
    with judged() as require:
        out = str(bundle_of(workspace))
        words = ("--images", str(workspace.photos), "--out", out, "--overwrite")
        # Without fp16 where its gate fails: others need it.
        for precision_list in ("fp32,fp16", "fp32"):
            result = btpipe(
                "export", "--onnx", "--precision", precision_list, *words, folder=workspace.work
            )
            print_result(f"export, {precision_list}", exit_code=result.code)
            require(result.code == 0, f"export of {precision_list} ended with {result.code}")
            if result.code == 0:
                break
        gates = contract.open_bundle(bundle_of(workspace)).manifest.origin["gates"]
        assert isinstance(gates, dict)
        for name, gate in gates.items():
            shown = ("provider", "mean_cosine", "min_cosine", "agreement")
            print_result(f"gate, {name}", **{key: gate[key] for key in shown})
        if gpu() is not None and "fp16" in gates:
            require(gates["fp16"]["provider"] == "cuda", "the fp16 gate did not run on the GPU")


def stage_golden(workspace: Workspace) -> None:
    """The least cosine of the golden images on this device, and what "auto" takes."""
    bundle, device = contract.open_bundle(bundle_of(workspace)), _device()
    with judged() as require:
        for precision, cosine in golden.compare(bundle, device=device).items():
            print_result(f"golden images, {precision} on {device}", least_cosine=cosine)
            require(cosine >= GOLDEN_COSINE, f"golden images in {precision}: {cosine:.4f}")
        opened = load(bundle.folder)
        print_result("auto", device=opened.device, precision=opened.precision, why=opened.why)


def _device() -> Literal["cpu", "cuda"]:
    return "cpu" if gpu() is None else "cuda"


def stage_embed(workspace: Workspace) -> None:
    """`btpipe embed` of the drawn images: as the README types it, and in each precision."""
    cases: dict[str, tuple[str, ...]] = {"as the README types it": ()}
    if gpu() is not None:
        cases |= {
            "onnxruntime fp32": ("--precision", "fp32"),
            "onnxruntime tf32": ("--precision", "tf32"),
            "torch": ("--engine", "torch"),
        }
    with judged() as require:
        for name, options in cases.items():
            out = workspace.work / "vectors.parquet"
            _remove(out)
            result = _embed(workspace, workspace.jpegs, out, *options)
            _print_embedding(f"embed, {name}", result)
            require(result.code == 0, f"{name}: ended with {result.code}")


def _embed(workspace: Workspace, source: Path, out: Path, *options: str) -> CommandResult:
    words = (str(source), "--out", str(out), "--model", str(bundle_of(workspace)), *options)
    return btpipe("embed", *words, folder=workspace.work, seconds=80.0)


def _print_embedding(name: str, result: CommandResult) -> None:
    progress, finished = result.of("Progressed"), result.of("Embedded")
    notes = [str(event["text"]) for event in result.of("Note")]
    print_result(
        name,
        exit_code=result.code,
        images_per_second=round(float(str(progress[-1]["images_per_second"]))) if progress else 0,
        data_wait=progress[-1]["data_wait"] if progress else None,
        made=finished[-1] if finished else result.text[-200:],
        precision=notes[:1],
        warnings=len(result.of("Warned")),
    )


def _remove(out: Path) -> None:
    for path in out.parent.glob(f"{out.stem}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def stage_again(workspace: Workspace) -> None:
    """A rerun after one more image; and bad files beside good ones, whose vectors are the CPU's."""
    folder, out = workspace.work / "again", workspace.work / "again.parquet"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _remove(out)
    files = sorted(workspace.jpegs.glob("*"))[:AGAIN_IMAGES]
    for path in files:
        shutil.copy(path, folder)
    with judged() as require:
        _print_embedding("first run", _embed(workspace, folder, out))
        (folder / "new.jpg").write_bytes(with_comment(files[0].read_bytes(), 1_000_000))
        again = _embed(workspace, folder, out)
        _print_embedding("second run, one image more", again)
        counts = [(event["embedded"], event["reused"]) for event in again.of("Embedded")]
        require(counts == [(1, len(files))], f"the second run made something else: {counts}")
        _among_bad_files(workspace, require)


def _among_bad_files(workspace: Workspace, require: Require) -> None:
    bad = sorted(path.name for path in workspace.nasty.iterdir() if path.name.startswith("bad-"))
    tables: list[dict[str, NDArray[np.float32]]] = []
    for device in dict.fromkeys((_device(), "cpu")):
        out = workspace.work / f"nasty-{device}.parquet"
        _remove(out)
        result = _embed(workspace, workspace.nasty, out, "--device", device, "--precision", "fp32")
        _print_embedding(f"bad files, {device}", result)
        rejects = pq.read_table(out.with_name(f"{out.stem}.rejects.parquet"))["path"].to_pylist()
        require(sorted(rejects) == bad, f"{device}: {len(rejects)} rejects of {len(bad)} bad files")
        tables.append(_vectors(out))
    least = min(_cosines(tables[0], tables[-1]), default=0.0)
    print_result("bad files' neighbours, vectors against the CPU's", least_cosine=round(least, 6))
    require(least >= SAME_COSINE, f"vectors differ from the CPU's: cosine {least:.4f}")


def _vectors(table: Path) -> dict[str, NDArray[np.float32]]:
    read = pq.read_table(table)
    rows = np.stack(read["embedding"].to_numpy(zero_copy_only=False))
    return dict(zip(read["path"].to_pylist(), rows, strict=True))


def _cosines(
    first: dict[str, NDArray[np.float32]], second: dict[str, NDArray[np.float32]]
) -> list[float]:
    assert first.keys() == second.keys()
    names = list(first)
    a, b = (neighbours.normalize(np.stack([t[n] for n in names])) for t in (first, second))
    return [float(value) for value in (a * b).sum(axis=1)]


def stage_compare(workspace: Workspace) -> None:
    """The table against `btpipe.load` to the bit; the GPU against the CPU."""
    out = workspace.work / "photos.parquet"
    _remove(out)
    with judged() as require:
        require(_embed(workspace, workspace.photos, out).code == 0, "embed failed")
        table = _vectors(out)
        names = list(table)
        devices: tuple[Literal["auto", "cpu"], ...] = ("auto", "cpu")
        for device in devices:
            encoder = load(bundle_of(workspace), device=device)
            vectors = encoder.embed([workspace.photos / name for name in names])
            same = bool((vectors == np.stack([table[name] for name in names])).all())
            least = min(_cosines(table, dict(zip(names, vectors, strict=True))))
            print_result(
                f"embed against load({device}), {encoder.precision}",
                same_bits=same,
                least_cosine=round(least, 7),
            )
            require(same or device == "cpu", "btpipe.load gives other bits than embed")
            require(least >= GOLDEN_COSINE, f"load({device}) differs: cosine {least:.4f}")


def stage_ort(workspace: Workspace) -> None:
    """onnxruntime's own settings, one by one: images/s with arrays copied, and with bound ones."""
    bundle = contract.open_bundle(bundle_of(workspace))
    size = bundle.preprocessing.size
    shape = (8 if workspace.small else CALL_IMAGES, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    settings: tuple[dict[str, str], ...] = ({},)
    if gpu() is not None:
        onnxruntime.preload_dlls()
        nhwc, search = {"prefer_nhwc": "1"}, {"cudnn_conv_algo_search": "EXHAUSTIVE"}
        settings = ({}, nhwc, search, {**nhwc, **search}, {"use_tf32": "1"})
    for precision in bundle.precisions:
        for extra in settings:
            _option(precisions.model_of(bundle, precision), precision, extra, pixels, workspace)


def _option(
    model: Path, name: str, extra: dict[str, str], pixels: NDArray[np.uint8], workspace: Workspace
) -> None:
    provider = "CPUExecutionProvider" if gpu() is None else "CUDAExecutionProvider"
    options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", **extra}
    provider_options = {} if gpu() is None else options
    about = f"onnxruntime {name}, {extra or 'as btpipe opens it'}"
    try:
        session = onnxruntime.InferenceSession(
            str(model), providers=[(provider, provider_options)], enable_fallback=0
        )
        feed = {session.get_inputs()[0].name: pixels}
        seconds = 0.2 if workspace.small else 1.5
        copied = rate(lambda: session.run(None, feed), len(pixels), seconds)
        bound = session.io_binding()
        memory = "cpu" if gpu() is None else "cuda"
        held = onnxruntime.OrtValue.ortvalue_from_numpy(pixels, memory, 0)
        bound.bind_ortvalue_input(session.get_inputs()[0].name, held)
        bound.bind_output(session.get_outputs()[0].name, memory)

        def run_bound() -> None:
            session.run_with_iobinding(bound)
            bound.synchronize_outputs()

        on_device = rate(run_bound, len(pixels), seconds)
    except Exception as error:  # a setting that this version refuses is a result as well
        print_result(about, refused=str(error)[:200])
        return
    print_result(
        about,
        images_per_second=round(copied.per_second),
        bound=round(on_device.per_second),
        provider=session.get_providers()[0],
    )
