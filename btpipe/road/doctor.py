"""What btpipe needs of this machine, and what to type where it is missing.

"broken" stops some command of btpipe, "look" costs speed or comfort. What can be tried in a second
is tried: DALI decodes a picture, onnxruntime runs a model, a file is written and renamed.
"""

import dataclasses
import importlib
import io
import platform
import resource
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import btpipe
from btpipe import artifact, runtime
from btpipe.errors import MachineError
from btpipe.events import Finished, Report, Tabled

Verdict = Literal["ok", "look", "broken"]
RUN_BYTES = 5 * 2**30
"""Free disk for a run: three checkpoints of ResNet-50 and its 8192 projector take 4.2 GB."""
MEMORY_BYTES = 4 * 2**30
OPEN_FILES = 1024
SHARED = Path("/dev", "shm")
SHARED_BYTES = 2**30
"""Of it: NCCL exchanges through it between GPUs, and containers often give 64 MiB."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `to_do` where it is not as it should be."""

    name: str
    found: str
    verdict: Verdict = "ok"
    to_do: str = ""


def run(report: Report, folder: Path) -> None:
    """Looks at everything and reports one table. `folder` is where runs and tables go.

    Raises:
        MachineError: something is broken.
    """
    started = time.monotonic()
    found = examine(folder)
    rows = tuple((f.name, f.found, f.verdict, f.to_do) for f in found)
    report(Tabled("What btpipe finds here", ("", "found", "", "what to do"), rows))
    broken = [finding for finding in found if finding.verdict == "broken"]
    if broken:
        raise MachineError(
            f"not usable: {', '.join(finding.name for finding in broken)}",
            expected="what the table says",
            fix=next((finding.to_do for finding in broken if finding.to_do), ""),
        )
    looks = sum(finding.verdict == "look" for finding in found)
    text = f"{len(found)} things looked at, {looks} to look at"
    report(Finished("doctor", text, time.monotonic() - started))


def examine(folder: Path) -> list[Finding]:
    """Every finding, the processor first."""
    steps: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("processor", _processor),
        ("memory", _memory),
        ("Python", _python),
        ("torch", _torch),
        ("GPU", _gpu),
        ("DALI", _dali),
        ("onnxruntime", _onnxruntime),
        ("compiler", _compiler),
        ("disk", lambda: _disk(folder)),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
    )
    return [_tried(name, look) for name, look in steps]


def _tried(name: str, look: Callable[[], Finding]) -> Finding:
    """What a look says; a library that cannot even be loaded says it by raising anything."""
    try:
        return look()
    except Exception as error:
        text = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {text[0] if text else ''}"
        return Finding(name, said, "broken", "install btpipe anew: pip install --force-reinstall .")


def _processor() -> Finding:
    cores, quota = runtime.cores(), _cpu_quota()
    kinds = ["bf16"] * runtime.cpu_has_bf16() + ["int8"] * runtime.cpu_has_int8()
    found = f"{cores} cores, {platform.machine()}{', fast in ' if kinds else ''}{', '.join(kinds)}"
    if quota is not None and quota < cores:
        to_do = f"--set data.threads={max(1, round(quota))}, or raise the container's CPU limit"
        return Finding("processor", f"{found}; {quota:g} cores allowed", "look", to_do)
    return Finding("processor", found)


def _cpu_quota() -> float | None:
    """Cores that a container may keep busy, where it is limited (cgroup v2)."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if allowed == "max" else int(allowed) / int(period)


def _memory() -> Finding:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    found = f"{_size(free)} free"
    if free < MEMORY_BYTES:
        return Finding("memory", found, "look", "smaller data.batch_size, or run.micro_batch")
    return Finding("memory", found)


def _python() -> Finding:
    return Finding("Python", f"{platform.python_version()}, btpipe {btpipe.__version__}")


def _torch() -> Finding:
    torch = importlib.import_module("torch")
    vision = importlib.import_module("torchvision").__version__
    importlib.import_module("torchvision.models")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"
    return Finding("torch", f"{torch.__version__}{cuda}; torchvision {vision}")


def _gpu() -> Finding:
    driver = Path("/proc/driver/nvidia/version")
    counted = runtime.gpu_count()
    if not counted:
        if driver.exists():
            fix = "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
            return Finding("GPU", "a driver, but no GPU to use", "look", fix)
        return Finding("GPU", "none: training and embedding run on the CPU")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        to_do = f"update the driver to one for CUDA {torch.version.cuda}, or install another torch"
        return Finding("GPU", f"{counted}, which torch cannot use", "broken", to_do)
    names = sorted({torch.cuda.get_device_name(i) for i in range(counted)})
    free, total = torch.cuda.mem_get_info(0)
    memory = f"{_size(free)} of {_size(total)} free on the first"
    return Finding("GPU", f"{counted} x {', '.join(names)}; {memory}")


def _dali() -> Finding:
    """Decodes a picture, on the CPU."""
    decoding = importlib.import_module("btpipe.data.decoding")
    pillow = importlib.import_module("PIL.Image")
    array = importlib.import_module("numpy")
    content = io.BytesIO()
    pillow.new("RGB", (48, 32), "teal").save(content, "JPEG")
    decoded = decoding.decode(array.frombuffer(content.getvalue(), array.uint8), None)
    if isinstance(decoded, str) or decoded.shape != (32, 48, 3):
        raise RuntimeError(f"a JPEG became {decoded if isinstance(decoded, str) else 'another'}")
    installed = [f"{n} {v}" for n in runtime.DALI_PACKAGES if (v := runtime.package_version(n))]
    version = importlib.import_module("nvidia.dali").__version__
    return Finding("DALI", f"{', '.join(installed) or f'DALI {version}'}: decodes")


def _onnxruntime() -> Finding:
    """Runs a model of one operator, on the CPU; names the providers."""
    engine = importlib.import_module("onnxruntime")
    helper = importlib.import_module("onnx.helper")
    array = importlib.import_module("numpy")
    value = [helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = engine.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": array.array([-1, 2], array.float32)})
    if made.tolist() != [0, 2]:
        raise RuntimeError(f"max(x, 0) of -1 and 2 gave {made.tolist()}")
    providers = engine.get_available_providers()
    found = f"{engine.__version__}: {', '.join(p.removesuffix('Provider') for p in providers)}"
    both = [n for n in ("onnxruntime", "onnxruntime-gpu") if runtime.package_version(n)]
    if len(both) == 2:
        fix = "pip uninstall onnxruntime; then pip install --force-reinstall onnxruntime-gpu"
        return Finding("onnxruntime", f"{found}; two packages over each other", "broken", fix)
    if runtime.gpu_count() and "CUDAExecutionProvider" not in providers:
        fix = "pip uninstall onnxruntime; pip install onnxruntime-gpu"
        return Finding("onnxruntime", found, "look", fix)
    return Finding("onnxruntime", found)


def _compiler() -> Finding:
    """What torch.compile needs: a C++ compiler, and Python's headers."""
    builder = importlib.import_module("torch._inductor.cpp_builder")
    try:
        found = str(builder.get_cpp_compiler())
    except Exception:
        fix = "apt install g++, or --set run.compile=off"
        return Finding("compiler", "no C++ compiler: torch.compile cannot work", "look", fix)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        fix = "apt install python3-dev, or --set run.compile=off"
        return Finding("compiler", f"{found}; no Python.h: no torch.compile", "look", fix)
    return Finding("compiler", f"{found}, Python.h")


def _disk(folder: Path) -> Finding:
    """Writes, syncs and renames a file."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            artifact.write_file(Path(scratch, "probe"), b"btpipe")
    except OSError as error:
        fix = "go to a folder that you may write to"
        return Finding("disk", f"{folder.resolve()}: {error.strerror}", "broken", fix)
    free = shutil.disk_usage(folder).free
    found = f"{_size(free)} free in {folder.resolve()}"
    if free < RUN_BYTES:
        return Finding("disk", found, "look", f"a run of ResNet-50 wants {_size(RUN_BYTES)}")
    return Finding("disk", found)


def _shared_memory() -> Finding:
    size = shutil.disk_usage(SHARED).total
    found = f"{SHARED} of {_size(size)}"
    if size < SHARED_BYTES and runtime.gpu_count() > 1:
        return Finding("shared memory", found, "look", "start the container with --shm-size=8g")
    return Finding("shared memory", found)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} at a time"
    if soft < OPEN_FILES:
        return Finding("open files", found, "look", f"ulimit -n {min(hard, 65_536)}")
    return Finding("open files", found)


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
