"""One nvJPEG for all, NVIDIA's own: DALI asks for it by a name that torchvision takes as well.

torchvision brings a copy of nvJPEG under the same SONAME. The loader gives a library that is asked
for by name the first one that was loaded, so that DALI's version would depend on who was imported
first: another decoder in training than in embedding.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

LIBRARY = "libnvjpeg.*so.1[0-9]"
"""As NVIDIA names it (libnvjpeg.so.13), and as torchvision does (libnvjpeg.36e11081.so.13)."""
OF_NVIDIA = "nvidia/*/lib"
"""Below site-packages: nvidia/cu13/lib for CUDA 13, nvidia/nvjpeg/lib for CUDA 12."""
OF_TORCHVISION = "torchvision.libs"


class _Loaded(ctypes.Structure):
    """The beginning of dl_iterate_phdr(3)'s `struct dl_phdr_info`."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def prefer_nvidias() -> None:
    """Loads NVIDIA's nvJPEG now, before torchvision can load its own; nothing where there is none.

    And keeps nvImageCodec from writing about bad files, unless PYNVIMGCODEC_VERBOSITY is set: they
    are reported by name.
    """
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    for path in choose(_below(OF_NVIDIA), _below(OF_TORCHVISION)):
        with contextlib.suppress(OSError):  # DALI says it when it needs it
            ctypes.CDLL(str(path))


def choose(nvidias: Sequence[Path], torchvisions: Iterable[Path]) -> list[Path]:
    """What of NVIDIA's to load: the only one; of several, that of torchvision's major version."""
    majors = {path.suffix for path in torchvisions}
    return [path for path in nvidias if len(nvidias) == 1 or path.suffix in majors]


def _below(folder: str) -> list[Path]:
    """The libraries in this folder of each place that Python imports from; imports nothing."""
    return [path for entry in sys.path for path in sorted(Path(entry).glob(f"{folder}/{LIBRARY}"))]


def mapped_nvjpegs() -> list[Path]:
    """The nvJPEG libraries in this process, the one first that answers to the name."""
    libraries: list[Path] = []

    def see(loaded: "ctypes._Pointer[_Loaded]", _bytes: int, _data: int | None) -> int:
        path = Path(os.fsdecode(loaded.contents.name or b""))
        if path.match(LIBRARY):
            libraries.append(path)
        return 0

    kinds = (ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(ctypes.CFUNCTYPE(*kinds)(see), None)
    return libraries
