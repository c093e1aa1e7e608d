"""What a file's first bytes say: format, upright size and orientation, or why it is not used."""

import dataclasses
import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from btpipe.data import rejects
from btpipe.data.rejects import BadInputError

SUPPORTED = {
    "JPEG": "JPEG",
    "MPO": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "TIFF": "TIFF",
    "BMP": "BMP",
    "DIB": "BMP",
    "PPM": "PPM",
    "JPEG2000": "JPEG 2000",
}
"""Pillow's name of every format that DALI decodes, and ours."""
_OPENED = tuple(name for name in SUPPORTED if name != "MPO")  # opened as JPEG, named afterwards
MAX_PIXELS = 178_956_970
"""Two times 1024^3 / 4 / 3, where Pillow speaks of a decompression bomb."""
MAX_SCANNED_PIXELS = 10 * MAX_PIXELS
"""Pixels times scans of a JPEG: about a second on one core. Progressive ones have ten scans."""
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .dib .ppm .pgm .pbm .pnm .jp2 .j2k .jpx .j2c"
    b" .gif .avif .heic .heif .ico .svg .psd .jxl .tga .exr .hdr .qoi .mpo".split()
)
"""Names of images, supported or not: such a file is never passed over in silence."""
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"RIFF....WEBP", "WebP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)
_UNSUPPORTED_MAGIC = (
    (b"GIF8", "GIF"),
    (b"....ftypavi", "AVIF"),
    (b"....ftyphei", "HEIC"),
    (b"....ftyphev", "HEIC"),
    (b"....ftypmif", "HEIF"),
    (b"....ftypmsf", "HEIF"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"farbfeld", "farbfeld"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
)
_SNIFF_BYTES = 512
_SIDEWAYS = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height."""


@dataclasses.dataclass(frozen=True)
class Header:
    """A usable image; width and height are those after the EXIF orientation is applied.

    `mode` is Pillow's name of the colours: L, RGB, CMYK, I;16, P, RGBA and others.
    """

    format: str
    width: int
    height: int
    orientation: int
    mode: str


class NotAnImageError(BadInputError):
    """Nothing in the content says that the file is an image; its name may."""


def is_image_or_named(error: BadInputError, name: bytes) -> bool:
    """Whether content or name says that it is an image: then it is refused aloud."""
    return not isinstance(error, NotAnImageError) or has_image_name(name)


def has_image_name(name: bytes) -> bool:
    """Whether the extension is an image's, in any case."""
    return name[name.rfind(b".") :].lower() in EXTENSIONS


def read(path: Path) -> Header:
    """Reads the header; decodes nothing.

    Raises:
        BadInputError: no image that can be used.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=_open_now) as file:
        return look(file, os.fsencode(path))


def look(file: BinaryIO, name: bytes) -> Header:
    """The header of an open file; its name counts only where the content has no mark of its own.

    Raises:
        BadInputError: no image that can be used; NotAnImageError where nothing says that it is one.
        OSError: the disk or the network fails.
    """
    start = file.read(_SNIFF_BYTES)
    if not start:
        raise NotAnImageError("empty file")
    unsupported = (
        _sniff(start, _UNSUPPORTED_MAGIC)
        or ("SVG" if b"<svg" in start else None)
        or ("TGA" if name.lower().endswith(b".tga") else None)  # has no magic bytes
    )
    if unsupported:
        names = ", ".join(dict.fromkeys(SUPPORTED.values()))
        raise BadInputError(f"{unsupported} is not supported ({names} are)")
    file.seek(0)
    return parse(file, start)


def _open_now(path: str, flags: int) -> int:
    """Opens without waiting for the other end, should a pipe have taken the file's place."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse(file: BinaryIO, start: bytes) -> Header:
    """The header of an open file whose first bytes are `start`.

    Raises:
        BadInputError: as `look`.
    """
    magic_format = _sniff(start, _MAGIC)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of much that is decided here
            with Image.open(file, formats=_OPENED) as image:
                width, height = image.size
                file_format, orientation = SUPPORTED[image.format or ""], _orientation(image)
                mode = image.mode
    except Image.DecompressionBombError as error:
        raise _bomb("more") from error
    except Exception as error:  # a parser of hostile files raises anything; all of it is a reason
        if rejects.is_machine(error):
            raise
        if magic_format:
            raise BadInputError(f"damaged {magic_format} header: {_sentence(error)}") from error
        raise NotAnImageError("not an image") from error
    if file_format == "TIFF" and mode in ("LA", "LAB"):
        raise BadInputError(f"TIFF of mode {mode} is not supported: DALI mixes its channels up")
    if width * height > MAX_PIXELS:
        raise _bomb(f"{width} x {height}")
    if width < 1 or height < 1:
        raise BadInputError(f"no pixels: {width} x {height}")
    if orientation in _SIDEWAYS:
        width, height = height, width
    return Header(file_format, width, height, orientation, mode)


def damage(content: bytes) -> BadInputError:
    """Why DALI cannot decode these bytes, in words; Pillow is asked what it makes of them."""
    if not content:
        return NotAnImageError("empty file")
    try:
        image_header = parse(io.BytesIO(content), content[:_SNIFF_BYTES])
    except BadInputError as error:
        return error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_OPENED) as image:
                mode, _ = image.mode, image.load()
    except Exception as error:
        return BadInputError(f"truncated or damaged {image_header.format}: {_sentence(error)}")
    kind = f"a kind of {image_header.format} that DALI does not decode (mode {mode})"
    return BadInputError(f"{kind}, or a damaged one")


def refuse_scan_bomb(content: bytes) -> None:
    """Passes anything but a JPEG that draws its pixels again and again.

    Compressed data holds no such marker, so they are counted without being parsed: 25 us for 30 kB.

    Raises:
        BadInputError: such a JPEG.
    """
    scans = content.count(_START_OF_SCAN) if content.startswith(b"\xff\xd8\xff") else 0
    if scans <= MAX_SCANNED_PIXELS // MAX_PIXELS:
        return
    try:
        image_header = parse(io.BytesIO(content), content[:_SNIFF_BYTES])
    except BadInputError:
        return  # the decoder says more about it
    if scans * image_header.width * image_header.height > MAX_SCANNED_PIXELS:
        size = f"{image_header.width} x {image_header.height}"
        what = f"scan bomb: {scans} scans of {size} pixels, which take too long to decode"
        raise BadInputError(what)


def has_end(jpeg: NDArray[np.uint8]) -> bool:
    """Whether the last scan of a JPEG (n,) is followed by the end that every whole file has.

    Compressed data holds neither marker.
    """
    end = _END_OF_IMAGE
    if bytes(jpeg[-len(end) :]) == end:  # as nearly all files; the others are searched
        return True
    content = jpeg.tobytes()
    return content.rfind(end) > content.rfind(_START_OF_SCAN)


def _bomb(size: str) -> BadInputError:
    return BadInputError(f"pixel bomb: {size} pixels, at most {MAX_PIXELS} are decoded")


def _sentence(error: Exception) -> str:
    """The first line of what Pillow says, without the address of the file object."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "no image found behind the first bytes" if "cannot identify" in text else text


def _sniff(start: bytes, table: tuple[tuple[bytes, str], ...]) -> str | None:
    for magic, name in table:
        if len(start) >= len(magic) and all(
            expected in (ord("."), byte) for expected, byte in zip(magic, start, strict=False)
        ):
            return name
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it means nothing. Never decodes."""
    if image.format == "TIFF":
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    elif block := image.info.get("exif"):
        exif = Image.Exif()
        exif.load(block)
        value = exif.get(ExifTags.Base.Orientation, 1)
    else:
        value = 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
