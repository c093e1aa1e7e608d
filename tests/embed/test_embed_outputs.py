"""`btpipe embed` with every ending, engine and type: the vectors of the Python API, to the bit."""

from pathlib import Path

import event_schema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from tiny_run import draw_images
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.embed import arrays, outputs
from btpipe.embed.encoder import load
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import RefusedError, UsageError
from btpipe.events import ignore

FEW, MANY = 6, 9


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images", FEW)
    return tmp_path / "images"


def run(images: Path, out: Path, bundle: Path, *options: str) -> list[event_schema.Record]:
    """`btpipe embed` in the command line's own words; what it tells a machine."""
    words = ["embed", str(images), "--out", str(out), "--model", str(bundle), "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, *options, "--json"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return event_schema.read(result.stdout)


def rows(out: Path) -> pa.Table:
    return pa.Table.from_batches(list(outputs.rows(out)))


def vectors(out: Path) -> NDArray[np.floating]:
    metadata = outputs.footer_of(out)
    assert metadata is not None
    return arrays.matrix(rows(out)["embedding"], int(metadata["btpipe.dimension"]))


@pytest.mark.parametrize("ending", ["", ".npy"])
def test_another_ending_holds_the_rows_of_the_table_and_is_rerun_like_one(
    images: Path, bundle: Path, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"v{ending}"
    run(images, out, bundle)
    draw_images(images, MANY)  # the first ones again, with another time of change
    *_, summary = run(images, out, bundle)
    assert (summary["embedded"], summary["reused"], summary["dropped"]) == (MANY - FEW, FEW, 0)
    paths = rows(out)["path"].to_pylist()
    assert paths == sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    encoder = load(bundle, device="cpu")
    assert np.array_equal(vectors(out), encoder.embed([images / path for path in paths]))
    assert run(images, out, bundle)[-1]["nothing_to_do"]
    rejects = pq.read_table(tmp_path / f"v{ending}.rejects.parquet")
    assert rejects.num_rows == 0
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"engine": "torch", "precision": "fp32", "layer": "layer2"}, marks=pytest.mark.slow
        ),
        {"engine": "torch", "precision": "bf16", "normalize": True},
        {"normalize": True},
    ],
)
def test_the_python_api_gives_the_vectors_of_the_table(
    images: Path, bundle: Path, tmp_path: Path, options: dict[str, str | bool]
) -> None:
    words = [
        word
        for key, value in options.items()
        for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]
    out = tmp_path / "v.parquet"
    run(images, out, bundle, *words, "--batch-size", "4")
    encoder = load(bundle, device="cpu", **options)  # type: ignore[arg-type]
    paths = [images / path for path in rows(out)["path"].to_pylist()]
    assert np.array_equal(vectors(out), encoder.embed(paths))
    footer = outputs.footer_of(out)
    assert footer is not None
    for key, value in options.items():
        assert footer[f"btpipe.{key}"] == str(value).lower()


def test_float16_halves_the_table_and_auto_says_what_it_chose(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.safetensors"
    events = run(images, out, bundle, "--dtype", "float16")
    notes = [event["text"] for event in events if event["event"] == "Note"]
    assert notes[0].startswith("fp32: the bundle has no int8 model")
    paths = [images / path for path in rows(out)["path"].to_pylist()]
    expected = load(bundle, device="cpu").embed(paths).astype(np.float16)
    assert vectors(out).dtype == np.float16
    assert np.array_equal(vectors(out), expected)


def test_vectors_made_otherwise_are_not_mixed_into_a_table(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    embed(images, out, EncoderConfig(bundle, device="cpu"), ignore)
    before = out.read_bytes()
    with pytest.raises(RefusedError):
        embed(images, out, EncoderConfig(bundle, device="cpu", normalize=True), ignore)
    with pytest.raises(RefusedError):
        embed(images, out, EncoderConfig(bundle, device="cpu"), ignore, JobOptions(dtype="float16"))
    assert out.read_bytes() == before


def test_what_stands_beside_a_matrix_must_not_be_an_input(bundle: Path, tmp_path: Path) -> None:
    (image,) = draw_images(tmp_path / "images", 1)
    listed = tmp_path / "v.npy.ids.parquet"
    pq.write_table(pa.table({"image": [image.read_bytes()]}), listed)
    with pytest.raises(UsageError, match="is one of the inputs"):
        embed(listed, tmp_path / "v.npy", EncoderConfig(bundle, device="cpu"), ignore)
