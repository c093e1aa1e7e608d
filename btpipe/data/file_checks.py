"""What is wrong or odd with images: one examined with the training's decoder, all of them told."""

import collections
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable

import numpy as np

from btpipe.data import header
from btpipe.data.pipeline import decode
from btpipe.events import Rejected

FLAT_LEVELS = 8
"""Grey levels between the darkest and the brightest pixel of a picture of one colour: what JPEG
makes of a plain area is within it."""
EXAMPLES = 3
_ADVICE = (
    (r"empty file", "empty file", "fetch it again: nothing arrived"),
    (r"not an image", "not an image", "remove it, or give it the extension of what it is"),
    (r".* is not supported", "format not supported", "convert it to JPEG or PNG, or remove it"),
    (r"a kind of .* DALI", "kind not decoded", "save it anew as 8-bit RGB JPEG or PNG"),
    (r"(truncated or )?damaged ", "damaged or cut off", "fetch it again from where it came from"),
    (
        r"scan bomb",
        "drawn too often",
        "write it again as a plain JPEG, if it is meant to be an image",
    ),
    (r"pixel bomb", "too many pixels", "scale it down, if it is meant to be an image"),
    (r"no pixels", "no pixels", "remove it"),
    (r"(folder )?cannot be read", "cannot be read", "check permissions and mount, then scan again"),
    (r"not a regular file", "pipe, socket or device", "remove it"),
    (r"a link", "link not followed", "put the file itself there, or a hard link"),
    (r"a folder", "folder named as an image", "nothing: what is in it was looked at"),
    (r"decoding took", "decoding hangs", "remove it; to try again, delete its line in the rejects"),
    (r"decoding ended", "decoding crashes", "remove it; to try again, delete its line there"),
)
"""Pattern at the start of a reason, the kind in words, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a file's content is: sha256, upright size, and whether the picture has one colour."""

    digest: str
    height: int
    width: int
    is_flat: bool


def examine(content: bytes) -> Verdict:
    """Decodes a file as the training does; the header goes first, so that no bomb is decoded.

    Raises:
        BadInputError: no pixels can be made of it.
    """
    header.parse(io.BytesIO(content), content)
    pixels = decode.decode(np.frombuffer(content, dtype=np.uint8))
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(content).hexdigest()
    return Verdict(digest, height, width, is_flat=_is_flat(pixels))


def _is_flat(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bool:
    """Whether (H, W, 3) has one colour; a few rows decide for nearly every photograph."""
    for part in (pixels[:: max(len(pixels) // 8, 1)], pixels):
        if np.any(np.ptp(part.reshape(-1, 3), axis=0) > FLAT_LEVELS):
            return False
    return True


@dataclasses.dataclass(frozen=True)
class RejectedAlike:
    """`files` inputs that were rejected for one reason, what to do about it, and the first few."""

    reason: str
    files: int
    to_do: str
    examples: str


def advice(rejects: Iterable[Rejected]) -> list[RejectedAlike]:
    """The rejects by their reason, the most frequent first."""
    kinds: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for reject in rejects:
        for pattern, kind, what in _ADVICE:
            if re.match(pattern, reject.reason):
                kinds[kind, what].append(reject.path)
                break
        else:
            kinds[reject.reason, "look at it"].append(reject.path)
    ordered = sorted(kinds.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [RejectedAlike(kind, len(p), what, examples(p)) for (kind, what), p in ordered]


def examples(paths: list[str]) -> str:
    """The first few, in one line whatever their names hold."""
    shown = [path.encode("unicode_escape").decode() if "\n" in path else path for path in paths]
    return ", ".join(shown[:EXAMPLES])
