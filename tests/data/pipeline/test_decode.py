"""Files in a batch: what may enter one, and that a bad one costs neither process nor neighbours."""

import io
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.nvimgcodec import Backend, BackendKind
from PIL import Image

from btpipe.data.pipeline import decode
from btpipe.data.rejects import BadInputError

FUZZED = 1000
HEADER_BYTES = 700
BATCH = 40
DIFFERENT = 8


def encoded(
    kind: str, seed: int = 0, size: tuple[int, int] = (120, 90), **options: object
) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    image = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
    mode = str(options.pop("mode", "RGB"))
    image.convert(mode).save(content, kind, **options)
    return content.getvalue()


def array(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)


@pytest.fixture(scope="module")
def decoder() -> decode.BatchDecoder:
    return decode.BatchDecoder(None, threads=8)


def pixels_of(image: decode.Pixels) -> NDArray[np.uint8]:
    return np.asarray(image)


def test_a_thousand_damaged_headers_beside_good_files_cost_no_process_and_no_neighbour(
    decoder: decode.BatchDecoder,
) -> None:
    # In a DALI graph of such batches one of these files ends the process.
    draws = random.Random(0)
    kinds = [encoded("JPEG", i, (533, 400), quality=90) for i in range(DIFFERENT)]
    good = [(content, decode.decode(array(content))) for content in kinds]
    kinds += [encoded("PNG", i, (120, 90)) for i in range(DIFFERENT)]
    refused = rejected = 0
    for _ in range(FUZZED // (BATCH // 2)):
        spoilt = []
        for _ in range(BATCH // 2):
            content = bytearray(draws.choice(kinds))
            for _ in range(draws.randint(1, 3)):
                content[draws.randrange(min(HEADER_BYTES, len(content)))] = draws.randrange(256)
            spoilt.append(decode.parse(array(bytes(content))))
        refused += sum(file is None for file in spoilt)
        neighbours = [decode.parse(array(good[i % DIFFERENT][0])) for i in range(BATCH // 2)]
        entering = [file for pair in zip(neighbours, spoilt, strict=True) for file in pair if file]
        images = decoder.decode(entering)
        reasons = [image.reason for image in images if isinstance(image, BadInputError)]
        assert all(reasons), "a reason without words"
        rejected += len(reasons)
        for i, neighbour in enumerate(neighbours):
            assert neighbour
            image = images[entering.index(neighbour)]
            assert not isinstance(image, BadInputError)
            np.testing.assert_array_equal(pixels_of(image), good[i % DIFFERENT][1])
    assert refused > FUZZED // 20
    assert rejected


def test_the_batch_gives_the_pixels_of_the_file_alone(decoder: decode.BatchDecoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        encoded("JPEG", 1, exif=exif),
        encoded("JPEG", 2, mode="L"),
        encoded("PNG", 3, mode="P"),
        encoded("PNG", 4, mode="RGBA"),
        encoded("PNG", 5, mode="L"),
    ]
    parsed = [decode.parse(array(content)) for content in files]
    assert all(parsed)
    images = decoder.decode([file for file in parsed if file])
    for content, image in zip(files, images, strict=True):
        assert not isinstance(image, BadInputError)
        np.testing.assert_array_equal(pixels_of(image), decode.decode(array(content)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk" * 200,
        encoded("JPEG")[:20],
        encoded("JPEG")[:-2],
        encoded("JPEG", mode="CMYK"),
        encoded("WEBP"),
        encoded("TIFF"),
        encoded("PNG", mode="I;16"),
    ],
    ids=["empty", "junk", "header", "no end", "CMYK", "WebP", "TIFF", "16 bits"],
)
def test_what_decoders_differ_about_is_decoded_alone(content: bytes) -> None:
    assert decode.parse(array(content)) is None


def test_a_jpeg_that_was_cut_anywhere_never_enters_a_batch() -> None:
    thumbnail = Image.Exif()
    thumbnail[0x9286] = encoded("JPEG", size=(16, 16))  # a comment that is a whole JPEG
    whole = encoded("JPEG", 3, quality=95, exif=thumbnail)
    for percent in range(1, 100):
        assert decode.parse(array(whole[: len(whole) * percent // 100])) is None
    assert decode.parse(array(whole))
    assert decode.parse(array(whole + b"\0" * 7)), "what follows the end is no one's"


def test_a_file_that_fails_in_decoding_costs_no_neighbour(decoder: decode.BatchDecoder) -> None:
    good = encoded("PNG", 1)
    broken = bytearray(encoded("PNG", 2))
    broken[len(broken) // 2] ^= 0xFF
    parsed = [decode.parse(array(bytes(content))) for content in (good, broken, good)]
    first, middle, last = decoder.decode([file for file in parsed if file])
    assert isinstance(middle, BadInputError)
    assert middle.reason.startswith("truncated or damaged PNG")
    for image in (first, last):
        assert not isinstance(image, BadInputError)
        np.testing.assert_array_equal(pixels_of(image), decode.decode(array(good)))


def test_a_decoder_that_fails_for_every_file_costs_no_good_image() -> None:
    """As a GPU without memory does: this one may use a GPU alone, and is given none."""
    failing = decode.BatchDecoder(None, threads=2, backends=[Backend(BackendKind.GPU_ONLY)])
    files = [encoded("JPEG", 1), encoded("PNG", 2)]
    parsed = [file for content in files if (file := decode.parse(array(content)))]
    for content, image in zip(files, failing.decode(parsed), strict=True):
        assert not isinstance(image, BadInputError), image
        np.testing.assert_array_equal(pixels_of(image), decode.decode(array(content)))
    assert failing.rescued == len(files)
