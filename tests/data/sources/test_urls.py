"""Images behind http:// from a real server that can stumble; and what is said without a driver."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stumbling_server import Stumbling
from tiny_run import draw_images

from btpipe.data import change_detection, index, retry
from btpipe.data.rejects import BadInputError
from btpipe.data.scan import scan
from btpipe.errors import MachineError, UsageError
from btpipe.events import ignore

ROOT = Path(__file__).parents[3]
LARGE_BYTES = 3 << 20
"""More than is fetched at once."""


def require_same(images: index.Index, files: list[Path]) -> None:
    """The rows' bytes are those of the files, in their order."""
    assert len(images) == len(files)
    for row, path in enumerate(files):
        assert images.read_bytes(row) == path.read_bytes()


def pad(path: Path) -> Path:
    """Makes a JPEG larger than what is fetched at once: bytes behind its end are of no account."""
    path.write_bytes(path.read_bytes() + bytes(LARGE_BYTES))
    return path


def test_images_lists_shards_and_tables_are_read_over_http(
    served: tuple[str, Path, type[Stumbling]],
) -> None:
    url, folder, _ = served
    files = draw_images(folder / "images", 6)
    pad(files[0])
    (folder / "list.txt").write_text("".join(f"{p.relative_to(folder)}\n" for p in files))
    with tarfile.open(folder / "a.tar", "w") as tar:
        for path in files:
            tar.add(path, path.name)
    contents = [path.read_bytes() for path in files]
    pq.write_table(pa.table({"image": contents}), folder / "t.parquet", row_group_size=2)
    in_order = sorted(files)
    for inputs, expected in (
        ([f"{url}/images/"], in_order),
        ([f"{url}/{path.relative_to(folder)}" for path in files], files),
        ([f"{url}/list.txt"], files),
        ([f"{url}/a.tar"], files),
        ([f"{url}/t.parquet"], files),
    ):
        images, rejected = index.build(inputs)
        assert rejected == []
        require_same(images, expected)
        assert not change_detection.changes(images, frozenset())
    assert index.build(f"{url}/images/")[0].labels == ["a", "a", "a", "b", "b", "b"]


def test_a_server_that_fails_twice_costs_no_image(
    served: tuple[str, Path, type[Stumbling]],
) -> None:
    url, folder, handler = served
    small, large = draw_images(folder, 2)
    pad(large)
    names = [path.relative_to(folder).as_posix() for path in (small, large)]
    (folder / "l.txt").write_text("\n".join(names))
    for path in ("l.txt", *names):
        handler.failures[f"/{path}"] = 2, 503
    images, rejected = index.build(f"{url}/l.txt")
    assert rejected == []
    assert [handler.failures[f"/{path}"][0] for path in ("l.txt", *names)] == [0, 0, 0]
    for path in names:
        handler.failures[f"/{path}"] = 2, 503
    require_same(images, [small, large])
    assert [handler.failures[f"/{path}"][0] for path in names] == [0, 0]


def test_what_the_server_will_not_give_is_a_reject_at_once(
    served: tuple[str, Path, type[Stumbling]],
) -> None:
    url, folder, handler = served
    good, secret = draw_images(folder, 2)
    handler.failures[f"/{secret.relative_to(folder)}"] = 99, 403
    names = [path.relative_to(folder).as_posix() for path in (good, secret)]
    (folder / "l.txt").write_text("\n".join([*names, "gone.jpg"]))
    images, rejected = index.build(f"{url}/l.txt")
    assert handler.failures[f"/{secret.relative_to(folder)}"][0] == 99 - 2  # HEAD, then GET
    require_same(images, [good])
    actual = {bad.path.removeprefix(f"{url}/"): (bad.kind, bad.reason) for bad in rejected}
    assert actual == {
        names[1]: ("machine", "cannot be read: HTTP status 403"),
        "gone.jpg": ("gone", "cannot be read: no such file"),
    }
    with pytest.raises(UsageError, match="no image in 0 files"):
        index.build(f"{url}/nowhere/")


def test_a_server_that_keeps_failing_is_the_machines_fault_and_a_file_it_lost_is_gone(
    served: tuple[str, Path, type[Stumbling]],
) -> None:
    url, folder, handler = served
    failing, lost, well = draw_images(folder, 3)
    names = [path.relative_to(folder).as_posix() for path in (failing, lost, well)]
    (folder / "l.txt").write_text("\n".join(names))
    images, _ = index.build(f"{url}/l.txt")
    handler.failures[f"/{names[0]}"] = 99, 503
    lost.unlink()
    kinds = []
    for row in range(2):
        with pytest.raises(BadInputError) as caught:
            images.read_bytes(row)
        kinds.append(images.reject(row, "decode", caught.value).kind)
    assert kinds == ["machine", "gone"]


def test_a_server_without_parts_of_files_is_named(
    served: tuple[str, Path, type[Stumbling]],
) -> None:
    url, folder, handler = served
    handler.gives_parts = False
    (path,) = draw_images(folder, 1)
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(pad(path), path.name)
    with pytest.raises(MachineError, match="the server gives whole files only"):
        index.build(f"{url}/a.tar")


def test_a_second_scan_asks_for_no_content_until_the_server_tells_of_another_time(
    served: tuple[str, Path, type[Stumbling]], tmp_path: Path
) -> None:
    url, folder, handler = served
    files = draw_images(folder / "images", 3)
    first = scan(f"{url}/images/", tmp_path / "i.parquet", ignore)
    assert min(first.index.table["mtime_ns"].to_pylist()) > 0
    handler.requests.clear()
    second = scan(f"{url}/images/", tmp_path / "i.parquet", ignore)
    assert second.index.table.equals(first.index.table)
    assert not [
        request for request in handler.requests if request.startswith("GET") and ".jpg" in request
    ]
    files[1].write_bytes(bytes(files[1].stat().st_size))
    os.utime(files[1], (1e9, 1e9))
    assert len(scan(f"{url}/images/", tmp_path / "i.parquet", ignore).index) == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [("fsspec", "URLs need fsspec"), ("aiohttp", "cannot be read: HTTPFileSystem requires")],
)
def test_without_a_driver_a_url_ends_with_2_and_what_to_install(
    tmp_path: Path, missing: str, message: str
) -> None:
    """In a process whose site-packages are these ones without one package."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in (Path(name) for name in sys.path if name.endswith("site-packages")):
        for path in folder.iterdir():
            if path.name.partition("-")[0] != missing and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    command = [sys.executable, "-S", "-m", "btpipe", "scan", "http://127.0.0.1:9/a.jpg"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "i.parquet")],
        env={"PYTHONPATH": f"{ROOT}:{site}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "pip install 'btpipe[remote]'" in done.stderr
    assert list(tmp_path.glob("i.*")) == []


def test_a_server_that_is_not_there_is_said_so() -> None:
    pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")
    with (
        retry.waiting_at_most(0.3),
        pytest.raises(MachineError, match=r"given nothing for 0\.3 s \(.*Connect"),
    ):
        index.build("http://127.0.0.1:9/a.jpg")
