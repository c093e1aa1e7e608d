"""What must hold and what must be fast on a GPU, in stages that fail alone.

    python -m benchmarks.gpu a 450    is training right, and how fast
    python -m benchmarks.gpu b 220    are export and embedding right, and how fast
    python -m benchmarks.gpu all 600 --small    both in small: on a CPU, or on a GPU without results

Each stage is a process of its own with its own limit and log; the ones that decide most come first.
The table of all numbers is printed last, and written to OUT/gpu-CALL.json for docs/measured.md.
Stages of a call that was cut off can be run by name: `python -m benchmarks.gpu stage loader`.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.workspace import MARK, PROJECT, Failed, Workspace

SPARE_SECONDS = 3.0
SHORTEST_SECONDS = 8.0
"""A stage with less time left is left out."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A function `stage_NAME` of a module, and its seconds: at most, and as planned on an H100."""

    name: str
    module: str
    limit: float
    planned: float
    decides: str


TRAINING = (
    Stage("probe", "gpu_right", 30, 12, "card, driver, cores, bandwidth, do DALI's kernels load"),
    Stage("prepare", "gpu_images", 40, 15, "drawn JPEGs of 400 x 533 and PNGs of 32 pixels"),
    Stage("doctor", "gpu_right", 40, 15, "what the card computes is what a CPU computes"),
    Stage("badfiles", "gpu_right", 45, 25, "junk ends no process, every bad file is named"),
    Stage("pixels", "gpu_pixels", 60, 35, "decoders and views, GPU against CPU; repeatable"),
    Stage("decode", "gpu_loader", 50, 30, "images/s and cores of decoding alone"),
    Stage("loader", "gpu_loader", 50, 35, "pairs/s of files to views alone"),
    Stage(
        "resnet", "gpu_step", 150, 100, "ResNet-50: pairs/s, compiled, eager, published; profile"
    ),
    Stage("pretrain", "gpu_step", 110, 85, "btpipe pretrain, killed once and resumed"),
    Stage("selftest", "gpu_right", 90, 60, "every part against the published formulation"),
    Stage("cifar", "gpu_step", 90, 45, "ResNet-18 at 32 pixels: GPU ms against host ms"),
    Stage("grouped", "gpu_step", 110, 70, "batch norm of all views in one pass"),
    Stage("host", "gpu_loader", 25, 12, "files and draws a second and core"),
)
EMBEDDING = (
    Stage("probe", "gpu_right", 30, 12, "card, driver, cores, providers"),
    Stage("prepare", "gpu_images", 40, 2, "as in a, where it is not there yet"),
    Stage("doctor", "gpu_right", 40, 15, "as in a, with onnxruntime on the card"),
    Stage("export", "gpu_embed", 90, 40, "btpipe export --onnx, fp32 and fp16; the gates"),
    Stage("golden", "gpu_embed", 40, 15, "the golden images in fp16, fp32 and tf32 on this card"),
    Stage("embed", "gpu_embed", 90, 55, "btpipe embed: images/s of each engine and precision"),
    Stage("again", "gpu_embed", 40, 25, "one image more; bad files: vectors equal the CPU's"),
    Stage("compare", "gpu_embed", 40, 20, "embed against btpipe.load; GPU against CPU"),
    Stage("ort", "gpu_embed", 60, 40, "options of onnxruntime: images/s, copied and bound"),
)
CALLS = {"a": TRAINING, "b": EMBEDDING, "all": (*TRAINING, *EMBEDDING[3:])}


@dataclasses.dataclass(frozen=True)
class StageResult:
    """How a stage ended: "ok", "red", "over time" or "left out"; its seconds, and its results."""

    stage: Stage
    how: str
    seconds: float
    results: list[dict[str, object]]


def run(call: str, seconds: float, workspace: Workspace, out: Path) -> list[StageResult]:
    """Runs a call's stages one after the other, within so many seconds."""
    end, stage_results = time.monotonic() + seconds, []
    for stage in CALLS[call]:
        limit = min(stage.limit, end - time.monotonic() - SPARE_SECONDS)
        if limit < SHORTEST_SECONDS:
            stage_results.append(StageResult(stage, "left out", 0.0, []))
            continue
        stage_results.append(one(stage, limit, workspace, out / f"gpu-{call}-{stage.name}.log"))
        print(
            f"[{stage.name}] {stage_results[-1].how}, {stage_results[-1].seconds:.0f} s", flush=True
        )
    return stage_results


def one(stage: Stage, limit: float, workspace: Workspace, log: Path) -> StageResult:
    """A stage in a process group of its own."""
    words = ["stage", stage.name, "--work", str(workspace.work), "--data", str(workspace.data)]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, *["--small"] * workspace.small]
    started = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            how = "ok" if child.wait(limit) == 0 else "red"
        except subprocess.TimeoutExpired:
            how = "over time"
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    results = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    if how != "ok":
        results += [{"name": "log", "line": line[:200]} for line in lines[-4:]]
    return StageResult(stage, how, time.monotonic() - started, results)


def show(stage_results: list[StageResult]) -> None:
    """All numbers, stage by stage."""
    for stage_result in stage_results:
        stage = stage_result.stage
        about = f"{stage_result.how}, {stage_result.seconds:.0f} s of {stage.planned:.0f} planned"
        print(f"\n## {stage.name} ({about}): {stage.decides}")
        for result in stage_result.results:
            values = [f"{key} {value}" for key, value in result.items() if key != "name"]
            print(f"{result['name']}: {', '.join(values)}")


def write(call: str, stage_results: list[StageResult], out: Path) -> None:
    """The same as JSON."""
    record = {
        "call": call,
        "python": platform.python_version(),
        "stages": [
            {"name": e.stage.name, "how": e.how, "seconds": e.seconds, "results": e.results}
            for e in stage_results
        ],
    }
    (out / f"gpu-{call}.json").write_text(json.dumps(record, indent=1))


def main() -> int:
    """0 where every stage is ok, 1 where one is not."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("call", choices=[*CALLS, "stage", "list"])
    parser.add_argument("seconds", nargs="?", default="600", help="of the call, or a stage's name")
    parser.add_argument(
        "--data", type=Path, default=None, help="holds photos/ and nasty/; else drawn"
    )
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "gpu")
    parser.add_argument("--out", type=Path, default=Path("build", "gpu"))
    parser.add_argument("--small", action="store_true", help="sizes of a dry run")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(work, (arguments.data or work / "data").resolve(), arguments.small)
    if arguments.call == "list":
        for name in ("a", "b"):
            for stage in CALLS[name]:
                times = f"{stage.planned:3.0f} s planned, {stage.limit:3.0f} at most"
                print(f"{name} {stage.name:9} {times}: {stage.decides}")
        return 0
    if arguments.call == "stage":
        stage = next(s for s in (*TRAINING, *EMBEDDING) if s.name == arguments.seconds)
        module = importlib.import_module(f"benchmarks.{stage.module}")
        try:
            getattr(module, f"stage_{stage.name}")(workspace)
        except Failed as failed:
            print(f"RED: {failed}")
            return 1
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    stage_results = run(arguments.call, float(arguments.seconds), workspace, arguments.out)
    show(stage_results)
    write(arguments.call, stage_results, arguments.out)
    return 0 if all(e.how == "ok" for e in stage_results) else 1


if __name__ == "__main__":
    sys.exit(main())
