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
from btpipe.tools.finding import REINSTALL, MachineFinding, Value, readable_bytes, tried

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


def run(on_event: Report, folder: Path, model: Path | None = None) -> None:
    """Looks at everything and reports it. `folder` is where runs and tables go, `model` a bundle.

    Raises:
        MachineError: something is broken.
    """
    started = time.monotonic()
    findings = examine(folder)
    if model is not None:
        findings.append(tried("golden images", lambda: _golden(model), "btpipe verify BUNDLE"))
    looks = sum(finding.verdict != "ok" for finding in findings)
    on_event(MachineExamined(time.monotonic() - started, tuple(findings), looks))
    broken = [finding for finding in findings if finding.verdict == "broken"]
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


def _golden(folder: Path) -> MachineFinding:
    """Embeds a bundle's golden images as a job with default settings would."""
    # Here: a library that is broken is a finding.
    from btpipe.embed.encoder import load  # noqa: PLC0415
    from btpipe.export import golden  # noqa: PLC0415

    encoder = load(folder)
    least = encoder.golden_cosine()
    with_numbers = ", ".join(f"{name} {cosine:.6f}" for name, cosine in least.items())
    golden.require(least, encoder.bundle)
    found = f"{folder} on {encoder.device}: least cosine {with_numbers or 'unknown, none shipped'}"
    return MachineFinding("golden images", found, values=least)


def _processor() -> MachineFinding:
    cores, quota = runtime.cores(), _cpu_quota()
    kinds = ["bf16"] * runtime.cpu_has_bf16() + ["int8"] * runtime.cpu_is_faster_in_int8()
    text = f"{cores} cores, {platform.machine()}{', fast in ' if kinds else ''}{', '.join(kinds)}"
    allowed = cores if quota is None else quota
    values = {"cores": cores, "allowed_cores": allowed, "fast_in": tuple(kinds)}
    if allowed < cores:
        text += f"; {allowed:g} cores allowed"
        to_do = f"--set data.threads={max(1, round(allowed))}, or raise the container's CPU limit"
        return MachineFinding("processor", text, "look", to_do, values)
    return MachineFinding("processor", text, values=values)


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
    text, values = f"{readable_bytes(free)} free", {"free_bytes": free}
    if free < MEMORY_BYTES:
        to_do = "smaller data.batch_size, or run.micro_batch"
        return MachineFinding("memory", text, "look", to_do, values)
    return MachineFinding("memory", text, values=values)


def _python() -> MachineFinding:
    values = {"python": platform.python_version(), "btpipe": btpipe.__version__}
    text = f"{values['python']}, btpipe {btpipe.__version__}"
    return MachineFinding("Python", text, values=values)


def _torch() -> MachineFinding:
    torch = importlib.import_module("torch")
    vision = importlib.import_module("torchvision").__version__
    importlib.import_module("torchvision.models")
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"
    text = f"{torch.__version__}{cuda}; torchvision {vision}"
    values = {"torch": str(torch.__version__), "torchvision": str(vision)}
    return MachineFinding("torch", text, values={**values, "cuda": torch.version.cuda or ""})


def _dali() -> MachineFinding:
    """Makes the evaluation view of pictures, on the CPU."""
    pixels = importlib.import_module("btpipe.tools.gpu_pixels").evaluation_views(None)
    if pixels.std() < CONTRAST:
        raise RuntimeError(f"JPEGs became pixels of {pixels.mean():.0f} +- {pixels.std():.1f}")
    installed = [f"{n} {v}" for n in runtime.DALI_PACKAGES if (v := runtime.package_version(n))]
    version = importlib.import_module("nvidia.dali").__version__
    text = f"{', '.join(installed) or f'DALI {version}'}: decodes"
    values: dict[str, Value] = {"dali": version, "packages": tuple(installed)}
    nvjpeg = next(iter(runtime.mapped_nvjpegs()), None)
    if nvjpeg:
        values["nvjpeg"] = str(nvjpeg.resolve()).rpartition("-packages/")[2]
        text += f"; nvJPEG is {values['nvjpeg']}"
    if nvjpeg and nvjpeg.parent.name == "torchvision.libs" and runtime.gpu_count():
        fix = (
            "pip install --force-reinstall nvidia-nvjpeg, or nvidia-nvjpeg-cu12: DALI's is not used"
        )
        return MachineFinding("DALI", text, "look", fix, values)
    return MachineFinding("DALI", text, values=values)


def _onnxruntime() -> MachineFinding:
    """Runs a model of one operator, on the CPU; names the providers."""
    engine = importlib.import_module("onnxruntime")
    array = importlib.import_module("numpy")
    model = doctor_gpu.model("Relu", {}, (2,), (2,))
    session = engine.InferenceSession(model, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": array.array([-1, 2], array.float32)})
    if result.tolist() != [0, 2]:
        raise RuntimeError(f"max(x, 0) of -1 and 2 gave {result.tolist()}")
    providers = tuple(p.removesuffix("Provider") for p in engine.get_available_providers())
    text = f"{engine.__version__}: {', '.join(providers)}"
    values = {"onnxruntime": engine.__version__, "providers": providers}
    folders = [runtime.package_folder(name) for name in ("onnxruntime", "onnxruntime-gpu")]
    if folders[0] is not None and folders[0] == folders[1]:
        fix = "pip uninstall onnxruntime; then pip install --force-reinstall onnxruntime-gpu"
        text += "; two packages over each other"
        return MachineFinding("onnxruntime", text, "broken", fix, values)
    return MachineFinding("onnxruntime", text, values=values)


def _compiler() -> MachineFinding:
    """What torch.compile needs: a C++ compiler, and Python's headers."""
    builder = importlib.import_module("torch._inductor.cpp_builder")
    try:
        path = str(builder.get_cpp_compiler())
    except Exception:
        fix = f"apt install g++, or {EAGER}"
        return MachineFinding("compiler", "no C++ compiler: torch.compile cannot work", "look", fix)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        fix = f"apt install python3-dev, or {EAGER}"
        text = f"{path}; no Python.h: no torch.compile"
        return MachineFinding("compiler", text, "look", fix, {"compiler": path})
    return MachineFinding("compiler", f"{path}, Python.h", values={"compiler": path})


def _disk(folder: Path) -> MachineFinding:
    """Writes, syncs and renames a file."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            artifact.write_file(Path(scratch, "probe"), b"btpipe")
    except OSError as error:
        fix = "go to a folder that you may write to"
        return MachineFinding("disk", f"{folder.resolve()}: {error.strerror}", "broken", fix)
    free = shutil.disk_usage(folder).free
    text = f"{readable_bytes(free)} free in {folder.resolve()}"
    values: dict[str, Value] = {"free_bytes": free, "folder": str(folder.resolve())}
    if free < RUN_BYTES:
        to_do = f"a run of ResNet-50 wants {readable_bytes(RUN_BYTES)}"
        return MachineFinding("disk", text, "look", to_do, values)
    return MachineFinding("disk", text, values=values)


def _shared_memory() -> MachineFinding:
    size = shutil.disk_usage(SHARED).total
    text, values = f"{SHARED} of {readable_bytes(size)}", {"bytes": size}
    if size < SHARED_BYTES and runtime.gpu_count() > 1:
        to_do = "start the container with --shm-size=8g"
        return MachineFinding("shared memory", text, "look", to_do, values)
    return MachineFinding("shared memory", text, values=values)


def _open_files() -> MachineFinding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text, values = f"{soft} at a time", {"limit": soft, "hard_limit": hard}
    if soft < OPEN_FILES:
        to_do = f"ulimit -n {min(hard, 65_536)}"
        return MachineFinding("open files", text, "look", to_do, values)
    return MachineFinding("open files", text, values=values)
