"""What btpipe needs of this machine, and what to type where it is missing.

"broken" stops some command of btpipe, "look" costs speed or comfort. What can be tried in a second
is tried: DALI decodes a picture, onnxruntime runs a model, a file is written and renamed. What GPUs
compute is compared with the CPU.
"""

import dataclasses
import importlib
import platform
import resource
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import btpipe
from btpipe import artifact, runtime
from btpipe.errors import MachineError
from btpipe.events import Finished, Report, TextTable
from btpipe.tools import doctor_gpu
from btpipe.tools.finding import REINSTALL, MachineFinding, readable_bytes, tried

RUN_BYTES = 5 * 2**30
"""Free disk for a run: three checkpoints of ResNet-50 and its 8192 projector take 4.2 GB."""
MEMORY_BYTES = 4 * 2**30
OPEN_FILES = 1024
CONTRAST = 20
"""Grey levels, the standard deviation of drawn pictures (51) must be above."""
EAGER = "--set run.compile=off (with --accept-change run.compile where the run has begun)"
SHARED = Path("/dev", "shm")
SHARED_BYTES = 2**30
"""Of it: NCCL exchanges through it between GPUs, and containers often give 64 MiB."""


@dataclasses.dataclass(frozen=True)
class MachineExamined(Finished):
    """What was found here; the command fails where something of it is broken."""

    job = "doctor"

    findings: tuple[MachineFinding, ...]
    to_look_at: int

    @property
    def text(self) -> str:
        return f"{len(self.findings)} things looked at, {self.to_look_at} to look at"

    def tables(self) -> list[TextTable]:
        """A row for each."""
        rows = tuple((f.name, f.found, f.verdict, f.to_do) for f in self.findings)
        return [TextTable("What btpipe finds here", ("", "found", "", "what to do"), rows)]


def run(report: Report, folder: Path) -> None:
    """Looks at everything and reports it. `folder` is where runs and tables go.

    Raises:
        MachineError: something is broken.
    """
    started = time.monotonic()
    found = examine(folder)
    looks = sum(finding.verdict != "ok" for finding in found)
    report(MachineExamined(time.monotonic() - started, tuple(found), looks))
    broken = [finding for finding in found if finding.verdict == "broken"]
    if broken:
        raise MachineError(
            f"not usable: {', '.join(finding.name for finding in broken)}",
            expected="what the table says",
            fix=next((finding.to_do for finding in broken if finding.to_do), ""),
        )


def examine(folder: Path) -> list[MachineFinding]:
    """Every finding, the processor first."""
    libraries: tuple[tuple[str, Callable[[], MachineFinding]], ...] = (
        ("processor", _processor),
        ("memory", _memory),
        ("Python", _python),
        ("torch", _torch),
        ("GPU", doctor_gpu.gpus),
        ("DALI", _dali),
        ("onnxruntime", _onnxruntime),
    )
    system: tuple[tuple[str, Callable[[], MachineFinding]], ...] = (
        ("compiler", _compiler),
        ("disk", lambda: _disk(folder)),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
    )
    return [
        *(tried(name, look, REINSTALL) for name, look in libraries),
        *doctor_gpu.computed(),
        *(tried(name, look, REINSTALL) for name, look in system),
    ]


def _processor() -> MachineFinding:
    cores, quota = runtime.cores(), _cpu_quota()
    kinds = ["bf16"] * runtime.cpu_has_bf16() + ["int8"] * runtime.cpu_has_int8()
    found = f"{cores} cores, {platform.machine()}{', fast in ' if kinds else ''}{', '.join(kinds)}"
    if quota is not None and quota < cores:
        to_do = f"--set data.threads={max(1, round(quota))}, or raise the container's CPU limit"
        return MachineFinding("processor", f"{found}; {quota:g} cores allowed", "look", to_do)
    return MachineFinding("processor", found)


def _cpu_quota() -> float | None:
    """Cores that a container may keep busy, where it is limited (cgroup v2)."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if allowed == "max" else int(allowed) / int(period)


def _memory() -> MachineFinding:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    found = f"{readable_bytes(free)} free"
    if free < MEMORY_BYTES:
        return MachineFinding(
            "memory", found, "look", "smaller data.batch_size, or run.micro_batch"
        )
    return MachineFinding("memory", found)


def _python() -> MachineFinding:
    return MachineFinding("Python", f"{platform.python_version()}, btpipe {btpipe.__version__}")


def _torch() -> MachineFinding:
    torch = importlib.import_module("torch")
    vision = importlib.import_module("torchvision").__version__
    importlib.import_module("torchvision.models")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"
    return MachineFinding("torch", f"{torch.__version__}{cuda}; torchvision {vision}")


def _dali() -> MachineFinding:
    """Makes the evaluation view of pictures, on the CPU."""
    made = importlib.import_module("btpipe.tools.gpu_pixels").evaluation_views(None)
    if made.std() < CONTRAST:
        raise RuntimeError(f"JPEGs became pixels of {made.mean():.0f} +- {made.std():.1f}")
    installed = [f"{n} {v}" for n in runtime.DALI_PACKAGES if (v := runtime.package_version(n))]
    version = importlib.import_module("nvidia.dali").__version__
    found = f"{', '.join(installed) or f'DALI {version}'}: decodes"
    nvjpeg = next(iter(runtime.mapped_nvjpegs()), None)
    if nvjpeg:
        found += f"; nvJPEG is {str(nvjpeg.resolve()).rpartition('-packages/')[2]}"
    if nvjpeg and nvjpeg.parent.name == "torchvision.libs" and runtime.gpu_count():
        fix = (
            "pip install --force-reinstall nvidia-nvjpeg, or nvidia-nvjpeg-cu12: DALI's is not used"
        )
        return MachineFinding("DALI", found, "look", fix)
    return MachineFinding("DALI", found)


def _onnxruntime() -> MachineFinding:
    """Runs a model of one operator, on the CPU; names the providers."""
    engine = importlib.import_module("onnxruntime")
    array = importlib.import_module("numpy")
    model = doctor_gpu.model("Relu", {}, (2,), (2,))
    session = engine.InferenceSession(model, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": array.array([-1, 2], array.float32)})
    if made.tolist() != [0, 2]:
        raise RuntimeError(f"max(x, 0) of -1 and 2 gave {made.tolist()}")
    providers = engine.get_available_providers()
    found = f"{engine.__version__}: {', '.join(p.removesuffix('Provider') for p in providers)}"
    folders = [runtime.package_folder(name) for name in ("onnxruntime", "onnxruntime-gpu")]
    if folders[0] is not None and folders[0] == folders[1]:
        fix = "pip uninstall onnxruntime; then pip install --force-reinstall onnxruntime-gpu"
        return MachineFinding(
            "onnxruntime", f"{found}; two packages over each other", "broken", fix
        )
    return MachineFinding("onnxruntime", found)


def _compiler() -> MachineFinding:
    """What torch.compile needs: a C++ compiler, and Python's headers."""
    builder = importlib.import_module("torch._inductor.cpp_builder")
    try:
        found = str(builder.get_cpp_compiler())
    except Exception:
        fix = f"apt install g++, or {EAGER}"
        return MachineFinding("compiler", "no C++ compiler: torch.compile cannot work", "look", fix)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        fix = f"apt install python3-dev, or {EAGER}"
        return MachineFinding("compiler", f"{found}; no Python.h: no torch.compile", "look", fix)
    return MachineFinding("compiler", f"{found}, Python.h")


def _disk(folder: Path) -> MachineFinding:
    """Writes, syncs and renames a file."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            artifact.write_file(Path(scratch, "probe"), b"btpipe")
    except OSError as error:
        fix = "go to a folder that you may write to"
        return MachineFinding("disk", f"{folder.resolve()}: {error.strerror}", "broken", fix)
    free = shutil.disk_usage(folder).free
    found = f"{readable_bytes(free)} free in {folder.resolve()}"
    if free < RUN_BYTES:
        return MachineFinding(
            "disk", found, "look", f"a run of ResNet-50 wants {readable_bytes(RUN_BYTES)}"
        )
    return MachineFinding("disk", found)


def _shared_memory() -> MachineFinding:
    size = shutil.disk_usage(SHARED).total
    found = f"{SHARED} of {readable_bytes(size)}"
    if size < SHARED_BYTES and runtime.gpu_count() > 1:
        return MachineFinding(
            "shared memory", found, "look", "start the container with --shm-size=8g"
        )
    return MachineFinding("shared memory", found)


def _open_files() -> MachineFinding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} at a time"
    if soft < OPEN_FILES:
        return MachineFinding("open files", found, "look", f"ulimit -n {min(hard, 65_536)}")
    return MachineFinding("open files", found)
