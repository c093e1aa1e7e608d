"""A bundle in Python: files in, vectors out; a file that is none raises and is named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import draw_images, shared_home

import btpipe
from btpipe.embed.encoder import load
from btpipe.embed.job import embed
from btpipe.errors import UsageError
from btpipe.events import ignore


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_home(tmp_path_factory) / "exports" / "tiny"


def test_files_give_the_vectors_of_an_embedding_job(bundle: Path, tmp_path: Path) -> None:
    paths = sorted(draw_images(tmp_path / "images", 6))
    embed(tmp_path / "images", tmp_path / "v.parquet", bundle, ignore, device="cpu")
    wanted = np.stack(pq.read_table(tmp_path / "v.parquet").column("embedding").to_numpy())
    encoder = load(str(bundle), device="cpu")
    assert np.array_equal(encoder.embed(paths), wanted)
    assert np.array_equal(encoder.embed([str(paths[3])]), wanted[3:4])
    assert encoder.embed([]).shape == (0, encoder.dimension) == (0, 512)


def test_a_bad_path_raises_and_is_named(bundle: Path, tmp_path: Path) -> None:
    (good, damaged) = draw_images(tmp_path / "images", 2)
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "text.jpg").write_text("Dear reader,")
    encoder = load(bundle, device="cpu")
    for bad in (damaged, tmp_path / "text.jpg", tmp_path / "nowhere.jpg"):
        with pytest.raises(UsageError) as refusal:
            encoder.embed([good, bad])
        assert refusal.value.where == str(bad)


def test_load_is_in_the_package_without_torch_and_nothing_heavy_before(bundle: Path) -> None:
    code = (
        "import sys, btpipe\n"
        "assert not {'numpy', 'onnxruntime', 'nvidia'} & set(sys.modules)\n"
        f"encoder = btpipe.load({str(bundle)!r}, device='cpu')\n"
        "assert encoder.dimension == 512\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_in_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lode"):
        btpipe.lode  # noqa: B018
