"""One nvJPEG for all: which of two libraries of one name a decoder gets, each in a process."""

import ctypes
import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from btpipe.runtime import nvjpeg

SITE = Path(str(importlib.metadata.distribution("torch").locate_file("")))
THEIRS = sorted(SITE.glob("torchvision.libs/libnvjpeg.*.so.1[0-9]"))
OURS = sorted(SITE.glob("nvidia/*/lib/libnvjpeg.so.1[0-9]"))
DECODER = """
from nvidia import nvimgcodec
nvimgcodec.Decoder(device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY)
"""
DALI = """
import io, numpy
from PIL import Image
from nvidia.dali import fn, pipeline_def, types
content = io.BytesIO()
Image.new("RGB", (64, 64), "teal").save(content, "JPEG")
@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def graph():
    return fn.decoders.image(fn.external_source(name="encoded", ndim=1, dtype=types.UINT8))
pipeline = graph()
pipeline.build()
pipeline.feed_input("encoded", [numpy.frombuffer(content.getvalue(), numpy.uint8)])
pipeline.run()
"""
SHOWN = "from btpipe import runtime\nprint(*runtime.mapped_nvjpegs(), sep='\\n')\n"
TELLING = {"PYNVIMGCODEC_VERBOSITY": "4", "DALI_NVIMGCODEC_LOG_LEVEL": "4"}
"""At which nvImageCodec says what it is with."""
two_of_one_name = pytest.mark.skipif(
    len(OURS) != 1 or len(THEIRS) != 1 or OURS[0].suffix != THEIRS[0].suffix,
    reason="no two libraries of one name here",
)


def version(library: Path) -> str:
    """What an nvJPEG says it is."""
    opened, number, parts = ctypes.CDLL(str(library)), ctypes.c_int(), []
    for part in range(3):
        assert opened.nvjpegGetProperty(part, ctypes.byref(number)) == 0
        parts.append(str(number.value))
    return ".".join(parts)


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if k != "PYNVIMGCODEC_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@two_of_one_name
def test_without_btpipe_a_decoder_gets_the_one_that_torchvision_brought() -> None:
    """The defect itself, so that the next test cannot pass by seeing nothing."""
    assert version(OURS[0]) != version(THEIRS[0])
    output = run(f"import torchvision\n{DALI}", **TELLING).stderr
    assert f"nvJPEG version: {version(THEIRS[0])} " in output


@two_of_one_name
@pytest.mark.parametrize("decoder", [DALI, DECODER], ids=["DALI", "nvImageCodec"])
@pytest.mark.parametrize("imports", ["btpipe, torchvision", "btpipe.pretrain.network", "btpipe"])
def test_decoders_get_nvidias_whoever_is_imported_first(imports: str, decoder: str) -> None:
    done = run(f"import {imports}\n{decoder}{SHOWN}", **TELLING)
    assert f"nvJPEG version: {version(OURS[0])} " in done.stderr
    first, *others = (Path(line).resolve() for line in done.stdout.splitlines())
    assert first == OURS[0].resolve()
    assert set(others) <= {THEIRS[0].resolve()}


def test_of_several_the_one_is_loaded_whose_name_torchvision_takes() -> None:
    both = [Path("nvidia/nvjpeg/lib/libnvjpeg.so.12"), Path("nvidia/cu13/lib/libnvjpeg.so.13")]
    theirs = [Path("torchvision.libs/libnvjpeg.36e11081.so.13")]
    assert nvjpeg.choose(both, theirs) == both[1:]
    assert nvjpeg.choose(both, []) == []
    assert nvjpeg.choose(both[:1], theirs) == both[:1]
    assert nvjpeg.choose([], theirs) == []


def test_a_bad_file_prints_nothing_unless_it_is_asked_for(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((640, 480), 50).convert("RGB").save(content, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(content.getvalue()[:5000])
    code = (
        "import btpipe, pathlib\n"
        "from nvidia import nvimgcodec as codec\n"
        "decoder = codec.Decoder(device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,"
        " backends=[codec.Backend(codec.BackendKind.CPU_ONLY)])\n"
        f"cut = pathlib.Path({str(tmp_path / 'cut.jpg')!r}).read_bytes()\n"
        "assert decoder.decode([b'junk' * 100, cut[:20]]) == [None, None]\n"
        "decoder.decode([cut])\n"
    )
    assert run(code).stderr == ""
    assert "Could not parse" in run(code, PYNVIMGCODEC_VERBOSITY="2").stderr
