"""What a user names, as sources: braces and globs expanded, each told by its kind."""

import glob
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from btpipe import artifact
from btpipe.data import header, rejects
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import CONTACT_SECONDS, Patience
from btpipe.data.sources import lists, parquet, storage, synthetic, tar
from btpipe.data.sources.source import SHARDS, Kind, Source
from btpipe.errors import UsageError

KINDS = (
    "folders of images, file lists (.txt, .csv, .parquet with a column `path`), tar shards (.tar),"
    " parquet with image bytes, an index.parquet, image files; globs and braces"
    " (shard-{000..009}.tar); - for a list on standard input; URLs of these (s3://, gs://, https://)"
)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = frozenset("*?[")


def expand(inputs: Sequence[Path | str]) -> list[str]:
    """Absolute paths and URLs; a name that exists is never a pattern.

    Raises:
        UsageError: a file that is missing, or a pattern without one.
    """
    names = [name for item in inputs for name in _expand(os.fspath(item))]
    locations = [_of_shards(name) for name in names]
    if not locations:
        raise UsageError("no input named", expected=KINDS)
    return list(dict.fromkeys(locations))


def _expand(text: str) -> list[str]:
    if text == "-" or (not storage.is_url(text) and os.path.lexists(text)):
        return [os.path.abspath(text)]  # noqa: PTH100 - keeps links as they are, and bytes
    locations: list[str] = []
    for pattern in _braces(text):
        if not _GLOB & set(pattern):
            locations.append(pattern if storage.is_url(pattern) else _existing(pattern))
            continue
        if storage.is_url(pattern):
            system, path = storage.remote(pattern)
            matches = [system.unstrip_protocol(name) for name in system.glob(path)]
        else:
            matches = [os.path.abspath(name) for name in glob.glob(pattern)]  # noqa: PTH100, PTH207
        if not matches:
            raise UsageError("nothing matches this pattern", where=pattern, expected=KINDS)
        locations += sorted(matches)
    return locations


def _of_shards(location: str) -> str:
    """The index of a folder that `btpipe shard` made; any other location as it is.

    Raises:
        IntegrityError: a shard is missing or cut.
    """
    if storage.is_url(location) or not holds_shards(Path(location)):
        return location
    artifact.read(Path(location), SHARDS)
    return os.path.join(location, "index.parquet")  # noqa: PTH118 - bytes survive


def holds_shards(folder: Path) -> bool:
    """Whether `btpipe shard` made the folder."""
    manifest = folder / artifact.MANIFEST
    if not manifest.is_file():
        return False
    try:
        return bool(json.loads(manifest.read_bytes()).get("kind") == SHARDS)
    except (ValueError, AttributeError):
        return False  # somebody else's file


def _existing(path: str) -> str:
    if not os.path.lexists(path):
        raise UsageError("no such folder or file", where=path, expected=KINDS, fix=_FIX)
    return os.path.abspath(path)  # noqa: PTH100 - keeps links as they are


_FIX = "name a folder that holds images (JPEG, PNG, WebP, TIFF, BMP, PPM, JPEG 2000)"


def _braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` -> a-00.tar a-01.tar a-02.tar; `{a,b}.tar` -> a.tar b.tar."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        words = [str(n).zfill(len(numbers[1])) for n in range(first, last + step, step)]
    elif "," in match[1]:
        words = match[1].split(",")
    else:
        words = [match[0]]  # stands for itself
    before, rests = pattern[: match.start()], _braces(pattern[match.end() :])
    return [before + word + rest for word, rest in itertools.product(words, rests)]


def is_index(location: str) -> bool:
    """Whether a file is an index of btpipe's own."""
    is_file = not storage.is_url(location) and Path(location).is_file()
    if not is_file or _kind_by_name(location) != "parquet":
        return False
    return {b"root", b"format_version"} <= (parquet.schema(location).metadata or {}).keys()


def root_of(locations: Sequence[str], roots: Mapping[str, Path]) -> Path:
    """The folder that holds all inputs; the working folder where all are URLs.

    `roots` are those of the indexes among them.
    """
    local = [
        os.fspath(roots.get(location, _base(location)))
        for location in locations
        if not storage.is_url(location)
    ]
    return Path(os.path.commonpath(local)) if local else Path.cwd()


def _base(location: str) -> str:
    """The folder of an input that is a file, or the folder itself."""
    is_folder = _is_folder(location)
    return location if is_folder else location.rpartition("/")[0] or "/"


def _is_folder(location: str) -> bool:
    return not storage.is_url(location) and Path(location).is_dir()


def relative(location: str, root: Path) -> str:
    """A location as people see it: below `root`, or a URL as it is; "" for `root` itself."""
    if storage.is_url(location):
        return location
    path = os.path.relpath(location, root)
    return "" if path == "." else path


def describe(location: str, root: Path, image_column: str = "") -> Source:
    """The source that a location is, unless it is an index.

    `image_column`: the one of a parquet file that holds several.

    Raises:
        UsageError: none of `KINDS`, or an image column that is not there or not chosen.
    """
    if storage.is_synthetic(location):
        return synthetic.describe(location)
    if storage.is_url(location):
        return _describe_url(location, image_column)
    if _is_folder(location):
        name = relative(location, root)
        return Source("folder", location, prefix=f"{name}/" if name else "")
    return _describe_file(location, relative(location, root), image_column)


def _describe_url(url: str, image_column: str) -> Source:
    kind = _kind_by_name(url)
    if kind is not None:
        return _describe_file(url, url, image_column)
    if url.endswith("/"):
        return Source("folder", url.rstrip("/"), prefix=url)
    try:
        _measure(url)
    except FileNotFoundError:
        return Source("folder", url.rstrip("/"), prefix=url.rstrip("/") + "/")
    except OSError as error:
        raise rejects.unusable(error, url) from error
    system, path = storage.remote(url)
    if system.info(path).get("type") == "directory":
        return Source("folder", url.rstrip("/"), prefix=url.rstrip("/") + "/")
    return _files(url, url)


def _measure(location: str) -> tuple[int, int]:
    return Patience(location, CONTACT_SECONDS).read(lambda: storage.measure(location))


def _describe_file(location: str, name: str, image_column: str) -> Source:
    """A file's source; its size and time are kept where it is a container or a list."""
    if storage.is_standard_input(location):
        return Source("list", location, name.removesuffix("-"))
    kind = _kind_by_name(location)
    try:
        size, mtime_ns = _measure(location)
    except OSError as error:
        raise rejects.unusable(error, location) from error
    if kind == "tar":
        return Source("tar", location, f"{name}::", size, mtime_ns)
    folder = name[: name.rfind("/") + 1]
    if kind == "list":
        return Source("list", location, folder, size, mtime_ns)
    if kind == "parquet":
        schema = parquet.schema(location)
        if column := parquet.image_column(schema, image_column, location):
            return Source("parquet", location, f"{name}#", size, mtime_ns, column)
        if lists.has_paths(schema):
            return Source("list", location, folder, size, mtime_ns)
        what = f"columns {', '.join(schema.names)}: neither images nor a column `path`"
        raise UsageError(what, where=location, expected=KINDS)
    return _files(location, name)


def _kind_by_name(location: str) -> Kind | None:
    lower = location.lower()
    if lower.endswith((".tar", *tar.COMPRESSED)):
        return "tar"
    if lower.endswith((".txt", ".csv")):
        return "list"
    return "parquet" if lower.endswith(".parquet") else None


def _files(location: str, name: str) -> Source:
    """A file that is named itself: an image, or a mistake."""
    try:
        with storage.open_binary(location, Patience(location, CONTACT_SECONDS)) as file:
            header.look(file, os.fsencode(location))
    except OSError as error:
        raise rejects.unusable(error, location) from error
    except BadInputError as error:
        if not header.is_image_or_named(error, os.fsencode(location)):
            what = "not an image, and no input that btpipe knows"
            raise UsageError(what, where=location, expected=KINDS) from error
    folder, shown = location.rpartition("/")[0] or "/", name[: name.rfind("/") + 1]
    return Source("files", folder, shown)
