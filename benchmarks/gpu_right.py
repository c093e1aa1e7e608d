"""Stages of `benchmarks.gpu`: what the card is, and whether what it computes is right."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.stage import (
    CommandResult,
    btpipe,
    cores,
    device,
    files_of,
    gpu,
    index_of,
    judged,
    loader_of,
    print_result,
    rate,
    synchronize,
)
from benchmarks.workspace import PROJECT, Workspace
from btpipe import runtime
from btpipe.data.pipeline import dali_graphs, decode
from btpipe.data.pipeline.train_loader import LoaderSettings
from btpipe.data.rejects import BadInputError

COPY_BYTES = 2**30
FUZZED = 1000
HEADER_BYTES = 700


def stage_probe(workspace: Workspace) -> None:
    """The machine; a copy within the card; a DALI graph on it."""
    on = device()
    name = torch.cuda.get_device_name() if on.type == "cuda" else "no GPU"
    print_result("machine", card=name, cores=cores(), **_versions())
    if on.type == "cuda" and not workspace.small:
        report = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, check=False)
        headings = ("Driver Version", "JPEG", "SM  ", "Persistence")
        print("\n".join(x for x in report.stdout.splitlines() if any(w in x for w in headings)))
    count = COPY_BYTES // 4 // (1024 if workspace.small else 1)
    source, target = torch.empty(count, device=on), torch.empty(count, device=on)
    copied = rate(lambda: target.copy_(source), 8 * count, 0.3)  # read and written
    print_result("copy", TB_per_second=round(copied.per_second / 1e12, 3))
    pipeline = dali_graphs.evaluation_pipeline(
        dali_graphs.Geometry.for_size(32), batch_size=1, threads=1, gpu=gpu()
    )
    pipeline.build()
    decode.batch_decoder(gpu(), 1)
    print_result("DALI", graph="built", nvjpeg=[str(path) for path in runtime.mapped_nvjpegs()])


def _versions() -> dict[str, object]:
    import nvidia.dali  # noqa: PLC0415 - named by what is there

    versions: dict[str, object] = {"torch": torch.__version__, "DALI": nvidia.dali.__version__}
    try:
        import onnxruntime  # noqa: PLC0415

        versions["onnxruntime"] = onnxruntime.__version__
        versions["providers"] = onnxruntime.get_available_providers()
    except ImportError:
        versions["onnxruntime"] = "none"
    return versions


def stage_doctor(workspace: Workspace) -> None:
    """`btpipe doctor`, which computes and compares on the card."""
    with judged() as require:
        result = btpipe("doctor", folder=workspace.work, json_lines=False)
        broken = _named_behind("not usable:", ", ", result)
        print_result("doctor", exit_code=result.code, broken=broken)
        require(not broken and result.code in (0, 5), f"broken: {broken or result.code}")


def stage_selftest(workspace: Workspace) -> None:
    """`btpipe selftest`."""
    with judged() as require:
        result = btpipe("selftest", folder=workspace.work, json_lines=False)
        failed = _named_behind("the self-test failed:", "; ", result)
        print_result("selftest", exit_code=result.code, failed=failed)
        require(not failed and result.code in (0, 6), f"failed: {failed or result.code}")


def _named_behind(words: str, between: str, result: CommandResult) -> list[str]:
    """What an error of btpipe lists behind these words.

    But for onnxruntime's CUDA provider on a machine whose onnxruntime is one for CPUs: a call that
    is about training alone may run there.
    """
    lists = [line.partition(words)[2] for line in result.text.splitlines() if words in line]
    names = [name.strip() for name in lists[0].split(between)] if lists else []
    provider = "CUDAExecutionProvider" in str(_versions().get("providers"))
    return [name for name in names if provider or not name.startswith("onnxruntime")]


def stage_badfiles(workspace: Workspace) -> None:
    """Junk among good files, through the training loader and as damaged headers in a batch."""
    bad = sorted(path.name for path in workspace.nasty.iterdir() if path.name.startswith("bad-"))
    with judged() as require:
        for threads in (8,) if workspace.small else (2, 8, 16):
            code = _TRAIN_OVER_JUNK.format(folder=str(workspace.nasty), threads=threads)
            result = _python(code)
            bad_lines = [line for line in result.stdout.splitlines() if line.startswith("bad: ")]
            print_result(
                f"loader over junk, {threads} threads",
                exit_code=result.returncode,
                bad=len(bad_lines),
            )
            print(result.stdout[-2000:], result.stderr[-2000:])
            require(result.returncode == 0, f"{threads} threads: ended with {result.returncode}")
            names = sorted(line.removeprefix("bad: ") for line in bad_lines)
            require(names == bad, f"{threads} threads: {len(names)} of {len(bad)} bad files named")
        result = _python(
            _FUZZ.format(folder=str(workspace.photos), count=FUZZED, bytes=HEADER_BYTES)
        )
        print(result.stdout[-2000:], result.stderr[-2000:])
        last = result.stdout.splitlines()[-1:] or [""]
        print_result(
            "damaged headers beside good files", exit_code=result.returncode, result=last[0]
        )
        require(result.returncode == 0, f"damaged headers: ended with {result.returncode}")


def _python(code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path[1:]])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


_TRAIN_OVER_JUNK = """
from pathlib import Path
from benchmarks import gpu_right
gpu_right.train_over(Path({folder!r}), {threads})
"""
_FUZZ = """
from pathlib import Path
from benchmarks import gpu_right
gpu_right.decode_damaged(Path({folder!r}), {count}, {bytes})
"""


def train_over(folder: Path, threads: int) -> None:
    """Every image of a folder through the training loader; prints the bad ones' names."""
    from btpipe import recipe  # noqa: PLC0415 - not of a stage

    index = index_of(folder)
    overrides = ["data.image_size=64", f"data.threads={threads}"]
    run_recipe = recipe.load(PROJECT / "recipes" / "folder.toml", overrides)
    steps = recipe.count_steps(len(index), batch_size=32, epochs=40)
    settings = LoaderSettings.sample(run_recipe, 32, steps)
    index_paths = {path.as_py() for path in index.table["path"]}
    with loader_of(index, settings, device()) as loader:
        for _ in loader:
            pass
        rejected = {index.table["path"][row].as_py() for row in loader.rejected}
    refused = {path.name for path in folder.iterdir()} - index_paths
    for name in sorted(refused | rejected):
        print(f"bad: {name}")


def decode_damaged(folder: Path, count: int, header_bytes: int) -> None:
    """Files of which one to three bytes of the header are changed, beside whole ones."""
    draws = random.Random(0)
    good = [file.tobytes() for file in files_of(folder, 30)]
    decoder = decode.batch_decoder(gpu(), cores())
    refused = rejected = decoded = 0
    for _ in range(count // 16):
        batch: list[decode.Encoded] = []
        for _ in range(16):
            damaged = bytearray(draws.choice(good))
            for _ in range(draws.randint(1, 3)):
                damaged[draws.randrange(min(header_bytes, len(damaged)))] = draws.randrange(256)
            parsed = decode.parse(np.frombuffer(bytes(damaged), np.uint8))
            refused += parsed is None
            whole = decode.parse(np.frombuffer(draws.choice(good), np.uint8))
            batch += [one for one in (parsed, whole) if one]
        images = decoder.decode(batch)
        rejected += sum(isinstance(image, BadInputError) for image in images)
        decoded += sum(not isinstance(image, BadInputError) for image in images)
    synchronize()
    print(f"{refused} kept out, {rejected} rejected, {decoded} decoded")
