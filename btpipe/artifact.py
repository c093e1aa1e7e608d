"""A folder with a manifest: written beside, hashed, fsynced, renamed; opened by checking.

Final names only ever hold complete folders. `manifest.json` lists each file with its size and
sha256, the kind of artifact, its `format_version`, and what it was made from.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from btpipe import __version__
from btpipe.errors import IntegrityError, MachineError, NewerError, RefusedError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""The disk, or this user's share of it, is full."""
_OLD = ".tmp-old-"
"""In the name of an artifact that is being replaced, where that takes two steps."""
GLANCE_SECONDS = 0.25
"""Patience with one who only looks whether a lock is free (`btpipe plot --live`)."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact is: its kind, files and origin.

    `digest` is the sha256 over the files' names and digests: two artifacts of one
    digest hold the same bytes. `origin` says what made it (recipe, run, step, data fingerprint).
    """

    kind: str
    format_version: int
    btpipe_version: str
    files: Mapping[str, Mapping[str, object]]
    origin: Mapping[str, object]

    @property
    def digest(self) -> str:
        return json_digest({name: entry["sha256"] for name, entry in sorted(self.files.items())})


def json_digest(value: object) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns what the disk says into a sentence with the path: full, too large, not permitted."""
    try:
        yield
    except Exception as error:
        if _says(error, (errno.EFBIG,)):
            fix = "raise the limit of `ulimit -f`, or write to another file system"
            raise MachineError("a file may not grow this large", where=where, fix=fix) from error
        if _says(error, FULL):
            fix = "free some space and run the same command again: it goes on where it was"
            raise MachineError("no space left", where=where, fix=fix) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "choose a place you may write to"
            raise MachineError(f"cannot write ({error.strerror})", where=where, fix=fix) from error
        raise


def _says(error: Exception, codes: tuple[int, ...]) -> bool:
    """Whether the system gave one of these codes; safetensors passes it on in words only."""
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"(os error {code})" in str(error) for code in codes)


@contextlib.contextmanager
def locked(
    folder: Path, what: str, fix: str, wait_seconds: float = 0, *, name: str = ""
) -> Iterator[None]:
    """A folder for this process alone, made where there is none; a dead process's lock is free.

    `what` and `fix` are said where another process holds it for longer than `wait_seconds`. With
    `name` the lock is on that file in it, made where there is none: on NFS other machines see it.

    Raises:
        RefusedError: a living process holds it.
        MachineError: it cannot be made, or its file system has no locks.
    """
    deadline = time.monotonic() + max(wait_seconds, GLANCE_SECONDS)
    while (handle := _lock(folder, name)) is None:
        if time.monotonic() >= deadline:
            raise RefusedError(what, where=folder, fix=fix)
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path, name: str) -> int | None:
    """The open folder with its lock; None where another process has it, or removes the folder."""
    flags = os.O_RDWR | os.O_CREAT if name else os.O_RDONLY | os.O_DIRECTORY
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / name, flags, 0o644)
        except FileNotFoundError:
            return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat((folder / name).stat(), os.fstat(handle)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(handle)
        fix = "mount it with locks (Lustre: -o flock), or write to another file system and copy"
        what = f"its file system cannot lock it ({error.strerror})"
        raise MachineError(what, where=folder, fix=fix) from error
    os.close(handle)
    return None


def fsync_path(path: Path) -> None:
    """Flushes a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Puts `content` under `path` so that the name never holds less than all of it.

    Raises:
        MachineError: no space, or no permission.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """`write_file` for a JSON value, indented for people."""
    write_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def publish(folder: Path, kind: str, origin: Mapping[str, object]) -> Iterator[Path]:
    """A folder to fill; on a clean exit it is hashed, fsynced and takes the name `folder`.

    An artifact of that name is replaced; when the body raises, nothing is left.

    Raises:
        MachineError: no space, or no permission.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
        try:
            yield temporary
            files = {
                path.relative_to(temporary).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": file_digest(path),
                }
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            manifest = Manifest(kind, FORMAT_VERSION, __version__, files, dict(origin))
            content = {"digest": manifest.digest, **dataclasses.asdict(manifest)}
            write_json(temporary / MANIFEST, content)
            for path in temporary.rglob("*"):
                fsync_path(path)
            fsync_path(temporary)
            take_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def take_place(temporary: Path, folder: Path) -> None:
    """Gives a folder its final name, in one step; what stood there is removed after that.

    A file system that cannot exchange two names takes two steps: `sweep` mends a kill between them.
    """
    old = temporary
    if not folder.exists():
        os.rename(temporary, folder)
    elif not _exchange(temporary, folder):
        old = folder.with_name(f"{folder.name}{_OLD}{uuid.uuid4().hex[:8]}")
        os.rename(folder, old)
        os.rename(temporary, folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(here, bytes(one), here, bytes(other), exchange)


def sweep(parent: Path, name: str = "") -> None:
    """Removes what a killed process left beside the artifacts in `parent`, or the one of a name.

    An artifact that it had moved away and not replaced gets its name back.
    """
    for path in parent.glob(f"{glob.escape(name) or '*'}.tmp-*"):
        place, was_moved, _ = path.name.rpartition(_OLD)
        if was_moved and not os.path.lexists(parent / place):
            os.rename(path, parent / place)
        else:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)


def read(folder: Path, kind: str) -> Manifest:
    """The manifest of an artifact of this kind; its files exist with the sizes listed.

    Raises:
        IntegrityError: no manifest, another kind, a file missing or cut.
        NewerError: a newer format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        manifest = Manifest(
            **{field.name: content[field.name] for field in dataclasses.fields(Manifest)}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"no readable {MANIFEST} ({error})", where=folder, expected=f"a {kind} made by btpipe"
        ) from error
    if manifest.kind != kind:
        raise IntegrityError(f"is a {manifest.kind}", where=folder, expected=f"a {kind}")
    if manifest.format_version > FORMAT_VERSION:
        raise NewerError(
            f"format_version {manifest.format_version} of btpipe {manifest.btpipe_version}",
            where=folder,
            expected=f"format_version {FORMAT_VERSION} or older",
            fix=f"install btpipe {manifest.btpipe_version} or newer",
        )
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            size = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
            raise IntegrityError(f"found {size}", where=file, expected=f"{entry['bytes']} bytes")
    return manifest


def verify(folder: Path, kind: str) -> Manifest:
    """`read`, and every file's sha256 is the one listed.

    Raises:
        IntegrityError: as `read`, or a file whose bytes changed.
    """
    manifest = read(folder, kind)
    for name, entry in manifest.files.items():
        if file_digest(folder / name) != entry["sha256"]:
            raise IntegrityError(
                "its bytes changed since it was written",
                where=folder / name,
                expected=f"sha256 {entry['sha256']}",
                fix="restore it from a copy, or make it again",
            )
    return manifest
