"""A bundle in Python: images in, vectors out; a file that is none raises and is named."""

import dataclasses
import functools
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tiny_run import SIZE, draw_images, shared_home

import btpipe
from btpipe import recipe, runtime
from btpipe.embed import precisions
from btpipe.embed.encoder import CPU_BATCH_IMAGES, Encoder, load
from btpipe.embed.job import embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import MachineError, UsageError
from btpipe.events import ignore
from btpipe.export import contract, onnx_model, weights
from btpipe.runtime import cpu_flags

SAME_FLOATS = 1e-4
"""onnxruntime sums in another order than torch: relative to the longest vector's largest value."""
BF16_COSINE = 0.99
"""bf16 has 8 bits of mantissa; 18 layers of a network that was never trained."""
DRAWN_AGAINST_FILE = 0.999
"""Cosine of a file's vector with that of its pixels by Pillow, whose decoder rounds its own way."""
FIRST_ROW_SECONDS = 5.0


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted((shared_home(tmp_path_factory) / "images").rglob("*.jpg"))


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (37, SIZE, SIZE, 3), np.uint8)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: NDArray[np.float32] = (a * b).sum(axis=1) / lengths
    return result


def test_files_give_the_vectors_of_an_embedding_job(bundle: Path, tmp_path: Path) -> None:
    paths = sorted(draw_images(tmp_path / "images", 6))
    embed(tmp_path / "images", tmp_path / "v.parquet", EncoderConfig(bundle, device="cpu"), ignore)
    expected = np.stack(pq.read_table(tmp_path / "v.parquet").column("embedding").to_numpy())
    encoder = load(str(bundle), device="cpu")
    assert np.array_equal(encoder.embed(paths), expected)
    assert np.array_equal(encoder.embed([str(paths[3])]), expected[3:4])
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


def test_pillow_images_and_arrays_of_any_size_are_embedded_like_their_file(
    bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    encoder = load(bundle, device="cpu")
    opened = [Image.open(path) for path in images[:4]]
    arrays = [np.asarray(image) for image in opened]
    assert len({array.shape for array in arrays}) > 1
    from_files = encoder.embed(images[:4])
    vectors = encoder.embed(opened)
    assert np.array_equal(vectors, encoder.embed(arrays))
    assert (cosines(vectors, from_files) > DRAWN_AGAINST_FILE).all()
    assert np.array_equal(encoder.embed([images[0], arrays[1]]), [from_files[0], vectors[1]])
    lossless = tmp_path / "a.png"
    opened[0].save(lossless)
    assert np.array_equal(encoder.embed([lossless]), vectors[:1])
    grey = opened[0].convert("L")
    assert np.array_equal(encoder.embed([grey]), encoder.embed([grey.convert("RGB")]))
    turned = Image.open(images[0])
    turned.getexif()[0x0112] = 6
    upright = ImageOps.exif_transpose(turned)
    assert upright.size == turned.size[::-1]
    assert np.array_equal(encoder.embed([turned]), encoder.embed([upright]))


def test_arrays_of_another_shape_or_type_are_refused(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    encoder = load(bundle, device="cpu")
    with pytest.raises(UsageError, match=r"image 1 is uint8 \(32, 32\)"):
        encoder.embed([pixels[0], pixels[1, :, :, 0]])
    with pytest.raises(UsageError, match=r"float32 \(37, 32, 32, 3\)"):
        encoder.embed(pixels.astype(np.float32))
    with pytest.raises(UsageError, match="a list of images of any size"):
        encoder.embed(pixels[:, :30])


@pytest.mark.parametrize("engine", ["onnx", "torch", "bf16"])
def test_a_vector_is_the_same_to_the_bit_in_any_batch_on_any_number_of_threads(
    bundle: Path, pixels: NDArray[np.uint8], engine: str
) -> None:
    name: precisions.Engine = "onnx" if engine == "onnx" else "torch"
    precision: precisions.RequestedPrecision = "bf16" if engine == "bf16" else "fp32"
    few = pixels[:19]
    expected = load(bundle, device="cpu", engine=name, precision=precision).embed(few)
    for threads, sizes in ((1, (5,)), (3, (3, 18))):
        encoder = load(bundle, device="cpu", engine=name, precision=precision, threads=threads)
        assert np.array_equal(encoder.embed(few[4:5]), expected[4:5])
        for size in sizes:
            batches = [Batch(few[start : start + size]) for start in range(0, len(few), size)]
            streamed = list(encoder.stream(batches, size))
            assert [batch for batch, _ in streamed] == batches
            matrix = np.concatenate([vectors for _, vectors in streamed])
            assert matrix.dtype == np.float32
            assert np.array_equal(matrix, expected)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    pixels: NDArray[np.uint8]


def test_the_network_works_while_the_next_batches_are_made(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    numbers: list[int] = []

    def batches() -> Iterator[Batch]:
        for _ in range(9):
            numbers.append(len(numbers))
            yield Batch(pixels)

    encoder = load(bundle, device="cpu", threads=2)
    stream = encoder.stream(batches(), len(pixels))
    next(stream)
    assert len(numbers) == 4  # one that is done, two in the network, one ready
    assert len(list(stream)) == 8


def test_torch_in_fp32_is_the_reference_and_bf16_is_near_it(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    encoder = load(bundle, device="cpu", engine="torch", precision="fp32")
    vectors = encoder.embed(pixels)
    described = recipe.Network(backbone="resnet18", stem="small")
    network = weights.load(bundle / "model.safetensors", described)
    reference = onnx_model.Normalized(network, encoder.preprocessing).eval()
    with torch.inference_mode():
        expected = reference(torch.from_numpy(pixels)).numpy()
    scale = SAME_FLOATS * np.abs(expected).max()
    np.testing.assert_allclose(vectors, expected, atol=scale, rtol=0)
    by_onnx = load(bundle, device="cpu", engine="onnx").embed(pixels)
    np.testing.assert_allclose(vectors, by_onnx, atol=scale, rtol=0)
    bf16 = load(bundle, device="cpu", engine="torch", precision="bf16").embed(pixels)
    assert not np.array_equal(bf16, vectors)
    assert cosines(bf16, vectors).min() > BF16_COSINE


def test_a_layer_is_the_mean_of_that_stage_over_its_positions(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    described = recipe.Network(backbone="resnet18", stem="small")
    network = weights.load(bundle / "model.safetensors", described)
    means: dict[str, NDArray[np.float32]] = {}
    stages = {name: network.get_submodule(name) for name in precisions.LAYERS[1:]}
    for name, stage in stages.items():
        stage.register_forward_hook(
            lambda _module, _inputs, maps, name=name: means.update(
                {name: maps.mean((2, 3)).numpy()}
            )
        )
    encoder = load(bundle, device="cpu", engine="torch", precision="fp32")
    with torch.inference_mode():
        onnx_model.Normalized(network, encoder.preprocessing)(torch.from_numpy(pixels))
    assert set(means) == {"layer1", "layer2", "layer3", "layer4"}
    for name in precisions.LAYERS[1:]:
        of_layer = load(bundle, device="cpu", layer=name, precision="fp32")
        assert of_layer.engine == "torch"
        vectors = of_layer.embed(pixels)
        assert vectors.shape == (37, of_layer.dimension) == means[name].shape
        scale = SAME_FLOATS * np.abs(means[name]).max()
        np.testing.assert_allclose(vectors, means[name], atol=scale, rtol=0)


def test_normalized_vectors_have_length_one_and_the_same_direction(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    plain = load(bundle, device="cpu").embed(pixels)
    unit = load(bundle, device="cpu", normalize=True).embed(pixels)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1)[:, None], plain, rtol=1e-5)


def test_what_an_engine_cannot_do_is_refused_with_what_to_do(bundle: Path) -> None:
    for engine, precision, layer, fix in (
        ("onnx", "fp32", "layer3", "--engine torch"),
        ("onnx", "bf16", "pooled", "--engine torch"),
        ("onnx", "int8", "pooled", "--precision int8"),
        ("torch", "int8", "pooled", "--engine onnx"),
        ("torch", "fp16", "pooled", "take bf16"),
    ):
        with pytest.raises(UsageError) as refusal:
            load(
                bundle,
                device="cpu",
                engine=engine,  # type: ignore[arg-type]
                precision=precision,  # type: ignore[arg-type]
                layer=layer,  # type: ignore[arg-type]
            )
        assert fix in refusal.value.fix
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="the driver shows no GPU"):
            load(bundle, device="cuda", engine="torch")


def test_auto_takes_int8_only_from_a_bundle_that_holds_it_and_says_why(bundle: Path) -> None:
    opened = load(bundle, device="cpu")
    assert (opened.engine, opened.precision) == ("onnx", "fp32")
    assert "no int8 model" in opened.why
    both = with_int8(opened.bundle)
    assert precisions.choose(both, "onnx", "fp32", "cpu", yes) == ("fp32", "fp32: asked for")
    chosen, _ = precisions.choose(both, "torch", "auto", "cpu", yes)
    assert chosen == ("bf16" if runtime.cpu_has_bf16() else "fp32")


def test_auto_takes_int8_on_every_cpu_where_it_is_faster_and_the_golden_images_agree(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = load(bundle, device="cpu").bundle
    both = with_int8(opened)
    clipped = dataclasses.replace(both, manifest=opened.manifest)  # of an older bundle
    for flags, held, agrees, why in (
        ("avx2", both, yes, "int8: faster on this CPU"),
        ("avx2 avx512_vnni", both, yes, "int8: faster on this CPU"),
        ("avx2 avx512_vnni", both, no, "fp32: in int8 this CPU does not give"),
        ("avx2", clipped, yes, "fp32: this CPU may clip sums"),
        ("avx2 avx512_vnni", clipped, yes, "int8: faster on this CPU"),
        ("sse4_1", both, yes, "fp32: on this CPU int8 is not known to be faster"),
        ("asimd", both, yes, "fp32: on this CPU int8 is not known to be faster"),
        ("asimd asimddp", both, yes, "int8: faster on this CPU"),
    ):
        monkeypatch.setattr(cpu_flags, "_cpuinfo", functools.partial(str, f"flags : {flags}"))
        chosen, said = precisions.choose(held, "onnx", "auto", "cpu", agrees)
        assert (chosen, said[: len(why)]) == (why.split(":")[0], why), flags


def with_int8(opened: contract.Bundle) -> contract.Bundle:
    """As if it held an int8 model whose gate was passed with exact sums too."""
    gates = {"int8": {"exact": {"centred_cosine": 0.999}}}
    manifest = dataclasses.replace(opened.manifest, origin={"gates": gates})
    return dataclasses.replace(opened, precisions=("fp32", "int8"), manifest=manifest)


def yes(_: contract.Precision) -> bool:
    return True


def no(_: contract.Precision) -> bool:
    return False


def test_auto_on_a_gpu_takes_fp16_where_the_golden_images_agree_and_else_says_tf32(
    bundle: Path,
) -> None:
    opened = load(bundle, device="cpu").bundle
    with_all = dataclasses.replace(opened, precisions=("fp32", "fp16", "int8"))
    assert precisions.choose(with_all, "onnx", "auto", "cuda", yes)[0] == "fp16"
    chosen, why = precisions.choose(with_all, "onnx", "auto", "cuda", no)
    assert (chosen, "does not give the bundle's golden vectors" in why) == ("tf32", True)
    chosen, why = precisions.choose(opened, "onnx", "auto", "cuda", yes)
    assert (chosen, "--precision fp32,fp16" in why) == ("tf32", True)
    assert "int8" not in why
    assert precisions.choose(with_all, "torch", "auto", "cuda", yes)[0] == "bf16"


def test_fp32_never_means_tf32_and_tf32_is_for_gpus(bundle: Path) -> None:
    opened = load(bundle, device="cpu").bundle
    assert precisions.choose(opened, "onnx", "fp32", "cuda", yes)[0] == "fp32"
    assert precisions.model_of(opened, "tf32") == opened.model_of("fp32")
    engines: tuple[precisions.Engine, ...] = ("onnx", "torch")
    for engine in engines:
        with pytest.raises(UsageError, match="tf32 on a CPU"):
            load(bundle, device="cpu", engine=engine, precision="tf32")


def test_small_images_come_in_larger_batches(bundle: Path) -> None:
    assert load(bundle, device="cpu").batch_size == CPU_BATCH_IMAGES


def test_a_configuration_crosses_to_another_process(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    config = EncoderConfig(bundle, device="cpu", threads=1, normalize=True)
    copied = Encoder(pickle.loads(pickle.dumps(config)))
    assert np.array_equal(copied.embed(pixels), Encoder(config).embed(pixels))


def test_load_is_in_the_package_without_torch_and_nothing_heavy_before(bundle: Path) -> None:
    code = (
        "import sys, btpipe\n"
        "assert not {'numpy', 'onnxruntime', 'nvidia'} & set(sys.modules)\n"
        f"encoder = btpipe.load({str(bundle)!r}, device='cpu')\n"
        "assert encoder.dimension == 512\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_row_is_there_in_seconds_and_torch_is_not(
    bundle: Path, images: list[Path]
) -> None:
    code = (
        "import sys, time, btpipe\n"
        f"vectors = btpipe.load({str(bundle)!r}, device='cpu').embed([{str(images[0])!r}])\n"
        "assert vectors.shape == (1, 512)\n"
        "assert 'torch' not in sys.modules\n"
        "print(time.process_time())\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # CPU time as well: by the clock a busy machine is slower.
    assert min(time.monotonic() - started, float(done.stdout)) < FIRST_ROW_SECONDS


def test_an_unknown_name_in_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lode"):
        btpipe.lode  # noqa: B018
