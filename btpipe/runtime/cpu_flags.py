"""What the CPU computes with: its instructions, as /proc/cpuinfo names them."""

import dataclasses
import platform
from pathlib import Path

COMPUTING_FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx_vnni", "avx512_vnni", "amx_int8"),
    *("asimd", "bf16", "asimddp", "i8mm"),
)
"""Instructions that networks are computed with, of x86-64 and of aarch64."""


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A CPU: its model, and its instructions among `COMPUTING_FLAGS`."""

    model: str
    flags: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.model} ({', '.join(self.flags)})"


def cpu() -> Cpu:
    """This machine's."""
    lines = _cpuinfo().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return Cpu(next(models, platform.machine()), tuple(filter(_has, COMPUTING_FLAGS)))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 (AVX512-BF16 or AMX on x86-64, BF16 on aarch64)."""
    return _has("avx512_bf16", "amx_bf16", "bf16")


def cpu_sums_int8() -> bool:
    """Whether the CPU sums int8 products exactly, four at a time (VNNI or AMX, dot product)."""
    return _has("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")


def cpu_is_faster_in_int8() -> bool:
    """Whether int8 takes less time than float32: docs/measured.md has what AVX2 and VNNI took."""
    return cpu_sums_int8() or _has("avx2")


def _has(*flags: str) -> bool:
    return not set(flags).isdisjoint(_cpuinfo().split())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
