"""Whether an output can be written under its name: asked before any work is done for it."""

import os
import re
import tempfile
from pathlib import Path

from btpipe.errors import MachineError, UsageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""As a `Path` has it: with one slash of two."""
_PATH_BYTES = 4096 - 64
"""Longest path that Linux takes, less a file in a work folder."""
_TEMPORARY = ".tmp-old-01234567"
"""What is added to a name while it is replaced."""


def require_writable(out: Path, *beside: Path) -> None:
    """Passes the name of an output, and those of what is written with it. Makes nothing.

    Raises:
        UsageError: a URL, no name, one that is too long, or one below something that is no folder.
        MachineError: the folder takes no file. Not asked where `out` is there already.
    """
    if _URL.match(str(out)):
        raise UsageError(
            "is a URL; outputs are written to file systems",
            where=str(out).replace(":/", "://", 1),
            fix="choose a local --out and copy it there, or mount the store",
        )
    if out.name in ("", ".."):
        raise UsageError("is a folder and no name for an output", where=out, fix=_FIX)
    folder = out.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", where=out, fix=_FIX)
    for path in beside or (out.with_name(out.name + _TEMPORARY),):
        _require_length(path, folder)
    if os.path.lexists(out):
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"cannot write in {folder} ({error.strerror})"
        raise MachineError(what, where=out, fix="choose a place you may write to") from error


_FIX = "choose another --out"


def _require_length(path: Path, folder: Path) -> None:
    """Raises UsageError where a name is longer than the file system of `folder` takes."""
    most = os.pathconf(folder, "PC_NAME_MAX")
    longest = max(path.parts, key=lambda part: len(os.fsencode(part)))
    count = len(os.fsencode(longest))
    if count > most:
        what = f"a name of {count} bytes, {longest[:8]}...{longest[-24:]}"
    elif len(os.fsencode(path.absolute())) > _PATH_BYTES:
        what, most = f"a path of {len(os.fsencode(path.absolute()))} bytes", _PATH_BYTES
    else:
        return
    raise UsageError(what, where=path, expected=f"at most {most}", fix=_FIX)
