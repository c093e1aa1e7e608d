"""Scans of real folders: verdicts, findings, what a second scan reads, stopping and going on."""

import csv
import ctypes
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import event_schema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from btpipe import cli
from btpipe.data import file_checks, findings, header, rejects
from btpipe.data.index import build, open_index
from btpipe.data.rejects import BadInputError
from btpipe.data.scan import Depth, Scan, scan
from btpipe.errors import BudgetError, IntegrityError, UsageError
from btpipe.events import Event, Finished, Note, Progressed, Rejected, ignore

BOMB_BYTES = 100 * 2**20
"""What a pixel bomb may add to the memory of a scan; decoded it would take 400 MB or more."""
MANY = 60
DECODER_SECONDS = 1.0
"""A limit that no small image reaches on a busy machine, and the bomb below does by far."""


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (60, 44), **options: object) -> Path:
    """A picture with coarse random patches; the extension says the format."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, None, **options)
    return path


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def replace_unseen(path: Path, content: bytes) -> None:
    """Other content of the same size under the same mtime."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def paths(done: Scan) -> list[str]:
    return list(done.index.table["path"].to_pylist())


def reasons(done: Scan) -> dict[str, str]:
    return {reject.path: reject.reason for reject in done.rejects}


def decode(images: Path | str, out: Path, **options: float) -> Scan:
    return scan(images, out, ignore, depth="decode", **options)  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight good images and the bad ones that people have."""
    folder = tmp_path / "images"
    for i in range(8):
        draw(folder / f"a/{i}.jpg", seed=i)
    cut(draw(folder / "b/cut.jpg", seed=20))
    (folder / "b/empty.png").touch()
    (folder / "b/page.jpg").write_text("<html>not found</html>")
    return folder


def test_every_input_is_an_image_of_the_index_or_a_reject_with_a_reason(
    images: Path, tmp_path: Path
) -> None:
    done = decode(images, tmp_path / "i.parquet")
    assert paths(done) == [f"a/{i}.jpg" for i in range(8)]
    reason_of = reasons(done)
    assert reason_of.pop("b/cut.jpg").startswith("truncated or damaged JPEG")
    assert reason_of == {"b/empty.png": "empty file", "b/page.jpg": "not an image"}
    assert [r.stage for r in done.rejects] == ["decode", "index", "index"]


def test_files_beside_each_other_hold_what_was_returned(images: Path, tmp_path: Path) -> None:
    done = decode(images, tmp_path / "i.parquet")
    index = open_index(tmp_path / "i.parquet")
    assert index.table.equals(done.index.table)
    assert index.read_bytes(3) == (images / "a/3.jpg").read_bytes()
    assert rejects.read(tmp_path / "i.rejects.csv") == done.rejects
    with (tmp_path / "i.rejects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in rows] == [
        (r.path, r.stage, r.kind, r.reason, str(r.bytes), str(r.mtime_ns)) for r in done.rejects
    ]


def test_rows_say_what_the_content_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "images/sideways.jpg", size=(60, 44), exif=exif)
    Image.new("I;16", (9, 7), 3).save(tmp_path / "images/deep.png")
    rows = {
        r["path"]: r
        for r in decode(tmp_path / "images", tmp_path / "i.parquet").index.table.to_pylist()
    }
    sideways, deep = rows["sideways.jpg"], rows["deep.png"]
    content = (tmp_path / "images/sideways.jpg").read_bytes()
    assert (sideways["width"], sideways["height"], sideways["orientation"]) == (44, 60, 6)
    assert (sideways["format"], sideways["mode"], sideways["bytes"]) == (
        "JPEG",
        "RGB",
        len(content),
    )
    assert sideways["digest"] == hashlib.sha256(content).hexdigest()
    assert (deep["format"], deep["mode"]) == ("PNG", "I;16")


def test_a_scan_of_headers_reads_no_content_and_says_what_it_leaves_out(
    images: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    done = scan(images, tmp_path / "i.parquet", events.append)
    assert "b/cut.jpg" in paths(done)
    assert set(done.index.table["digest"].to_pylist()) == {None}
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert "--depth decode" in note


def test_doubles_and_nearly_empty_images_are_found_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    draw(folder / "a/1.jpg")
    (folder / "b").mkdir()
    for name in ("b/again.jpg", "b/third.jpg"):
        (folder / name).write_bytes((folder / "a/1.jpg").read_bytes())
    Image.new("RGB", (50, 40), (9, 99, 199)).save(folder / "plain.jpg")
    speck = Image.new("RGB", (400, 400), (255, 255, 255))
    speck.paste((0, 0, 0), (200, 200, 204, 204))
    speck.save(folder / "speck.png", optimize=True)
    events: list[Event] = []
    done = scan(folder, tmp_path / "i.parquet", events.append, depth="decode")
    assert len(done.index) == 5
    assert {(f.path, f.kind) for f in done.findings} == {
        ("b/again.jpg", "duplicate"),
        ("b/third.jpg", "duplicate"),
        ("plain.jpg", "one colour"),
        ("speck.png", "few bytes"),
    }
    assert "a/1.jpg" in done.findings[0].detail
    assert findings.read(tmp_path / "i.findings.csv") == done.findings
    (table,) = [table for event in events for table in event.tables()]
    assert table.rows[0] == ("duplicate", "2", "b/again.jpg, b/third.jpg")


def test_the_report_counts_rejects_by_reason_and_says_what_to_do(
    images: Path, tmp_path: Path
) -> None:
    cut(draw(images / "b/cut2.jpg", seed=21))
    events: list[Event] = []
    scan(images, tmp_path / "i.parquet", events.append, depth="decode")
    table = next(table for event in events for table in event.tables())
    assert table.rows[0] == (
        "damaged or cut off",
        "2",
        "fetch it again from where it came from",
        "b/cut.jpg, b/cut2.jpg",
    )
    assert {row[0] for row in table.rows[1:]} == {"empty file", "not an image"}
    assert all(row[2] for row in table.rows)


def test_every_reason_that_a_file_can_have_comes_with_advice() -> None:
    examples = [
        *(header.damage(content).reason for content in (b"", b"text", b"\xff\xd8\xff\xe0")),
        "GIF is not supported (JPEG, PNG are)",
        "pixel bomb: 20000 x 20000 pixels, at most 178956970 are decoded",
        "scan bomb: 4000 scans of 1500 x 1500 pixels, which take too long to decode",
        "cannot be read: Permission denied",
        "folder cannot be read: Permission denied",
        "a link to nothing",
        "decoding took longer than 20 s",
        "decoding ended the process (SIGSEGV)",
    ]
    rows = file_checks.advice(
        Rejected(str(i), "x", "content", reason) for i, reason in enumerate(examples)
    )
    assert "look at it" not in {row.to_do for row in rows}
    assert len(rows) == len(examples) - 1  # both kinds that cannot be read are one


def test_a_second_scan_reads_only_what_is_new_or_changed_and_drops_what_is_gone(
    images: Path, tmp_path: Path
) -> None:
    first = decode(images, tmp_path / "i.parquet")
    assert (first.kept, first.read, first.dropped) == (0, 9, 0)
    unseen = images / "a/0.jpg"
    replace_unseen(unseen, bytes(unseen.stat().st_size))
    draw(images / "a/1.jpg", seed=31)
    draw(images / "a/new.jpg", seed=32)
    os.utime(images / "a/4.jpg")
    (images / "a/2.jpg").unlink()
    second = decode(images, tmp_path / "i.parquet")
    assert (second.read, second.dropped) == (3, 1)
    assert "a/new.jpg" in paths(second)
    assert "a/2.jpg" not in paths(second)
    digests = [
        dict(zip(paths(d), d.index.table["digest"].to_pylist(), strict=True))
        for d in (first, second)
    ]
    assert digests[1]["a/3.jpg"] == digests[0]["a/3.jpg"]
    assert digests[1]["a/1.jpg"] == hashlib.sha256((images / "a/1.jpg").read_bytes()).hexdigest()
    third = decode(images, tmp_path / "i.parquet")
    assert (third.read, third.dropped) == (0, 0)
    assert third.index.table.equals(second.index.table)
    assert third.rejects == second.rejects


def test_a_second_scan_of_headers_opens_only_what_is_new_or_changed(
    images: Path, tmp_path: Path
) -> None:
    first = scan(images, tmp_path / "i.parquet", ignore)
    for unseen in sorted((images / "a").iterdir()):
        replace_unseen(unseen, bytes(unseen.stat().st_size))  # opened, it would be no image
    draw(images / "a/1.jpg", seed=31, size=(70, 50))
    os.utime(images / "a/2.jpg")
    second = scan(images, tmp_path / "i.parquet", ignore)
    assert paths(second) == [path for path in paths(first) if path != "a/2.jpg"]
    assert reasons(second)["a/2.jpg"] == "not an image"
    assert second.index.widths[1] == 70
    again = scan(images, tmp_path / "other.parquet", ignore)
    assert paths(again) == ["a/1.jpg", "b/cut.jpg"]


def test_what_was_only_listed_is_opened_by_the_first_scan_of_headers(
    images: Path, tmp_path: Path
) -> None:
    scan(images, tmp_path / "i.parquet", ignore, depth="list")
    done = scan(images, tmp_path / "i.parquet", ignore)
    assert (done.index.widths > 0).all()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_tar_or_a_table_that_is_as_it_was_stays_closed(
    images: Path, tmp_path: Path, kind: str
) -> None:
    files = sorted((images / "a").iterdir())
    tables = [tmp_path / f"{i}.{kind}" for i in range(2)]
    for table, part in zip(tables, (files[:3], files[3:]), strict=True):
        if kind == "tar":
            with tarfile.open(table, "w") as tar:
                for path in part:
                    tar.add(path, path.name)
        else:
            image_table = pa.table({"image": [path.read_bytes() for path in part]})
            plain = {"use_dictionary": False, "write_statistics": False}
            pq.write_table(image_table, table, compression="none", **plain)
    first = scan(tables, tmp_path / "i.parquet", ignore)
    content = tables[1].read_bytes()
    image = content.index(b"\xff\xd8\xff")  # the first one would be no image any more
    replace_unseen(tables[1], content[:image] + b"no" + content[image + 2 :])
    second = scan(tables, tmp_path / "i.parquet", ignore)
    assert second.index.table.equals(first.index.table)
    assert (second.kept, second.read, second.rejects) == (8, 0, [])
    os.utime(tables[1])
    third = scan(tables, tmp_path / "i.parquet", ignore)
    assert (len(third.index), len(third.rejects), third.kept) == (7, 1, 3)
    content = tables[0].read_bytes()
    replace_unseen(tables[0], content[:image] + b"no" + content[image + 2 :])
    fourth = scan(tables, tmp_path / "i.parquet", ignore)  # a reject means another look at all
    assert (len(fourth.index), fourth.rejects, fourth.kept) == (7, third.rejects, 7)


def test_a_reject_is_not_decoded_again_until_it_changes(images: Path, tmp_path: Path) -> None:
    bad, good = images / "b/cut.jpg", (images / "a/0.jpg").read_bytes()
    bad.write_bytes(bad.read_bytes()[: len(good)].ljust(len(good), b"\0"))
    assert "b/cut.jpg" in reasons(decode(images, tmp_path / "i.parquet"))
    replace_unseen(bad, good)
    again = decode(images, tmp_path / "i.parquet")
    assert (again.read, "b/cut.jpg" in reasons(again)) == (0, True)
    os.utime(bad)
    mended = decode(images, tmp_path / "i.parquet")
    assert (mended.read, "b/cut.jpg" in paths(mended)) == (1, True)


def test_a_scan_of_headers_keeps_what_a_decode_found(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(images / "a/plain.png")
    first = decode(images, tmp_path / "i.parquet")
    second = scan(images, tmp_path / "i.parquet", ignore, depth="header")
    assert second.index.table.equals(first.index.table)
    assert reasons(second) == reasons(first)
    assert second.findings == first.findings


def test_an_index_of_another_folder_is_replaced_and_nothing_taken_from_it(tmp_path: Path) -> None:
    one, two = draw(tmp_path / "one/a.jpg"), tmp_path / "two/a.jpg"
    decode(tmp_path / "one", tmp_path / "i.parquet")
    two.parent.mkdir()
    two.write_bytes(one.read_bytes())
    os.utime(two, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    assert decode(tmp_path / "two", tmp_path / "i.parquet").read == 1


@pytest.mark.parametrize(
    ("allowed", "is_enough"), [(3, True), (2, False), (3 / 11, True), (0.2, False)]
)
def test_more_bad_inputs_than_allowed_are_an_error_after_all_is_written(
    images: Path, tmp_path: Path, allowed: float, *, is_enough: bool
) -> None:
    if is_enough:
        scan(images, tmp_path / "i.parquet", ignore, depth="decode", max_bad=allowed)
    else:
        with pytest.raises(BudgetError, match="3 of 11 inputs are bad"):
            scan(images, tmp_path / "i.parquet", ignore, depth="decode", max_bad=allowed)
    assert len(open_index(tmp_path / "i.parquet")) == 8


def test_a_file_that_is_no_index_is_not_replaced(images: Path, tmp_path: Path) -> None:
    precious = tmp_path / "vectors.parquet"
    precious.write_bytes(b"PAR1 precious")
    with pytest.raises(IntegrityError, match="not a readable index"):
        scan(images, precious, ignore)
    assert precious.read_bytes() == b"PAR1 precious"
    with pytest.raises(UsageError, match=r"X\.parquet"):
        scan(images, tmp_path / "index.csv", ignore)
    with pytest.raises(UsageError, match="no such folder"):
        scan(tmp_path / "nowhere", tmp_path / "i.parquet", ignore)
    assert not (tmp_path / "i.parquet").exists()


def test_the_command_ends_with_3_when_strict_and_0_otherwise(images: Path, tmp_path: Path) -> None:
    words = ["scan", str(images), "--out", str(tmp_path / "i.parquet"), "--depth", "decode"]
    lenient = CliRunner().invoke(cli.app, [*words, "--json"])
    assert lenient.exit_code == 0
    *_, event = event_schema.read(lenient.stdout)
    assert (event["event"], event["images"], event["rejects"]) == ("Scanned", 8, 3)
    strict = CliRunner().invoke(cli.app, [*words, "--strict"])
    assert isinstance(strict.exception, BudgetError)
    assert strict.exception.exit_code == 3


def test_progress_counts_up_to_what_there_is_to_read(images: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    scan(images, tmp_path / "i.parquet", events.append, depth="decode")
    last = [event for event in events if isinstance(event, Progressed)][-1]
    assert (last.job, last.done, last.total) == ("scan", 9, 9)
    assert last.images_per_second > 0
    assert sum(isinstance(event, Finished) for event in events) == 1
    assert {e.path for e in events if isinstance(e, Rejected)} == {
        "b/cut.jpg",
        "b/empty.png",
        "b/page.jpg",
    }


def test_a_stopped_scan_keeps_what_it_decoded_and_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "i.parquet"
    large = draw(folder / "000.jpg", size=(1600, 1200))
    for i in range(1, MANY):
        os.link(large, folder / f"{i:03}.jpg")
    command = [sys.executable, "-m", "btpipe", "scan", str(folder), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--depth", "decode", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout
        assert '"Progressed"' in running.stdout.readline()
        running.send_signal(signal.SIGTERM)
        *_, error = event_schema.read(running.stdout.read())
    assert (running.returncode, error["code"], error["kind"]) == (75, 75, "Stopped")
    assert "run the same command again" in error["fix"]
    half = open_index(out)
    digest_count = len(half) - half.table["digest"].null_count
    assert 0 < digest_count < MANY
    rest = decode(folder, out)
    assert (rest.kept, rest.read) == (digest_count, MANY - digest_count)
    assert rest.index.table.equals(decode(folder, tmp_path / "fresh.parquet").index.table)


def test_a_killed_scan_keeps_what_it_saved_every_few_moments(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "i.parquet"
    large = draw(folder / "000.jpg", size=(1600, 1200))
    for i in range(1, MANY):
        os.link(large, folder / f"{i:03}.jpg")
    script = tmp_path / "often.py"
    script.write_text(OFTEN)
    with subprocess.Popen([sys.executable, str(script), str(folder), str(out)]) as running:
        while not out.is_file():
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
    half = open_index(out)
    digest_count = len(half) - half.table["digest"].null_count
    assert 0 < digest_count < MANY
    rest = decode(folder, out)
    assert (rest.kept, rest.read) == (digest_count, MANY - digest_count)


OFTEN = """
import sys
from pathlib import Path
from btpipe.data.scan import scan
from btpipe.events import ignore
if __name__ == "__main__":
    scan(Path(sys.argv[1]), Path(sys.argv[2]), ignore, depth="decode", save_seconds=0.1)
"""


def without_rights() -> None:
    """Takes from root the capabilities to read what nobody may read (they go with the exec)."""
    drop, (override, search) = 24, (1, 2)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for capability in (override, search) if os.geteuid() == 0 else ():
        if ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0):
            raise OSError("this container does not let root drop its rights")


@pytest.mark.parametrize("depth", ["list", "header", "decode"])
def test_files_and_folders_that_nobody_may_read_are_rejects_with_a_reason(
    tmp_path: Path, depth: str
) -> None:
    for name in ("open/1.jpg", "secret.jpg", "closed/2.jpg"):
        draw(tmp_path / "images" / name)
    closed = [tmp_path / "images/secret.jpg", tmp_path / "images/closed"]
    for path in closed:
        path.chmod(0)
    out = tmp_path / "i.parquet"
    command = [sys.executable, "-m", "btpipe", "scan", str(tmp_path / "images"), "--out", str(out)]
    done = subprocess.run(
        [*command, "--depth", depth],
        preexec_fn=without_rights,
        capture_output=True,
        text=True,
        check=False,
    )
    for path in closed:
        path.chmod(0o700)
    assert done.returncode == 0, done.stderr
    kept = ["open/1.jpg", *(["secret.jpg"] if depth == "list" else [])]
    assert open_index(out).table["path"].to_pylist() == kept
    reason_of = {r.path: r.reason for r in rejects.read(rejects.path_beside(out))}
    assert reason_of.pop("closed") == "folder cannot be read: Permission denied"
    unread = {} if depth == "list" else {"secret.jpg": "cannot be read: Permission denied"}
    assert reason_of == unread
    mended = scan(tmp_path / "images", out, ignore)
    assert paths(mended) == ["closed/2.jpg", "open/1.jpg", "secret.jpg"]
    assert mended.rejects == []


def scan_bomb() -> bytes:
    """A progressive JPEG of 80 kB that says its last scan 4,000 times: 10 s of decoding."""
    content = io.BytesIO()
    Image.new("RGB", (1500, 1500), (200, 90, 30)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * 4000 + whole[-2:]


def test_a_decode_that_does_not_end_costs_its_time_limit_and_no_other_file(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / f"images/{i}.jpg", seed=i)
    (tmp_path / "images/bomb.jpg").write_bytes(scan_bomb())
    done = decode(tmp_path / "images", tmp_path / "i.parquet", limit_seconds=DECODER_SECONDS)
    assert reasons(done) == {"bomb.jpg": "decoding took longer than 1 s"}
    assert len(done.index) == 6
    again = decode(tmp_path / "images", tmp_path / "i.parquet", limit_seconds=DECODER_SECONDS)
    assert (again.read, reasons(again)) == (0, reasons(done))


def test_pipes_and_links_are_rejected_when_listed(images: Path, tmp_path: Path) -> None:
    os.mkfifo(images / "pipe.jpg")
    (images / "circle.jpg").symlink_to("circle.jpg")
    reason_of = reasons(decode(images, tmp_path / "i.parquet"))
    assert reason_of["pipe.jpg"].startswith("not a regular file")
    assert reason_of["circle.jpg"] == "a link in a circle"


MEASURED = """
import sys, resource
from pathlib import Path
from btpipe.data.scan import scan
from btpipe.events import ignore
if __name__ == "__main__":
    done = scan(Path(sys.argv[1]), Path(sys.argv[2]), ignore, depth="decode")
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print(len(done.index), max(resource.getrusage(w).ru_maxrss for w in who))
"""


def test_pixel_bombs_take_no_memory(tmp_path: Path) -> None:
    draw(tmp_path / "good/1.jpg")
    draw(tmp_path / "bombs/1.jpg")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bombs/bomb.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bombs/bomb.tif", compression="group4")
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    peaks = []
    for name in ("good", "bombs"):
        command = [
            sys.executable,
            str(script),
            str(tmp_path / name),
            str(tmp_path / f"{name}.parquet"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, kilobytes = done.stdout.split()
        assert rows == "1"
        peaks.append(int(kilobytes) * 1024)
    assert peaks[1] - peaks[0] < BOMB_BYTES


def test_a_bomb_that_took_an_images_place_is_refused_from_its_header() -> None:
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInputError, match="pixel bomb"):
        file_checks.examine(content.getvalue())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BOMB_BYTES


def test_a_jpeg_cut_at_every_hundredth_of_its_length_is_a_reject(tmp_path: Path) -> None:
    whole = draw(tmp_path / "images/whole.jpg", size=(160, 120), quality=90).read_bytes()
    for percent in range(1, 100):
        (tmp_path / f"images/{percent:02}.jpg").write_bytes(whole[: len(whole) * percent // 100])
    (tmp_path / "images/last.jpg").write_bytes(whole[:-2])
    done = decode(tmp_path / "images", tmp_path / "i.parquet")
    assert paths(done) == ["whole.jpg"]
    assert len(done.rejects) == 100


STRANGE_NAMES = [
    b"new\nline.jpg",
    b"return\r.jpg",
    b"tab\t\"quotes',.jpg",
    "\N{SNOWMAN} \N{ROCKET}.jpg".encode(),
    b"-leading.jpg",
    b"latin-%E9.jpg",
    b"latin-\xe9.jpg",
    b"n" * 251 + b".jpg",
]


def test_names_of_any_bytes_are_scanned_kept_and_open_the_same_file(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "images")
    for i, name in enumerate(STRANGE_NAMES):
        for parent in (b"a", b"b"):
            draw(Path(os.fsdecode(folder + b"/" + parent + b"/" + name)), seed=i, size=(40 + i, 30))
            cut(draw(Path(os.fsdecode(folder + b"/" + parent + b"/cut" + name[:200] + b".jpg"))))
    first = decode(tmp_path / "images", tmp_path / "i.parquet")
    index = open_index(tmp_path / "i.parquet")
    assert len(index) == len(first.rejects) == 2 * len(STRANGE_NAMES)
    for row in range(len(index)):
        content = index.file(row).read_bytes()
        assert index.table["digest"][row].as_py() == hashlib.sha256(content).hexdigest()
    assert rejects.read(tmp_path / "i.rejects.csv") == first.rejects
    again = decode(tmp_path / "images", tmp_path / "i.parquet")
    assert (again.read, again.kept) == (0, 4 * len(STRANGE_NAMES))
    assert again.index.table.equals(first.index.table)


@pytest.mark.parametrize("depth", ["header", "decode"])
def test_content_decides_what_a_file_is_and_nothing_is_executed(
    tmp_path: Path, depth: Depth
) -> None:
    folder, witness = tmp_path / "images", tmp_path / "witness"
    draw(folder / "jpeg.jpg").rename(folder / "jpeg.png")
    draw(folder / "png.png").rename(folder / "png.gif")
    draw(folder / "gif.gif").rename(folder / "gif.jpg")
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({witness}) (w) file\n"
    (folder / "eps.jpg").write_text(script)
    picture = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{witness}"/></svg>'
    (folder / "svg.jpg").write_text(f'<?xml version="1.0"?>\n{picture}')
    (folder / "pdf.jpg").write_bytes(b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n")
    done = scan(folder, tmp_path / "i.parquet", ignore, depth=depth)
    assert paths(done) == ["jpeg.png", "png.gif"]
    for name, kind in {"gif": "GIF", "eps": "PostScript", "svg": "SVG", "pdf": "PDF"}.items():
        assert reasons(done)[f"{name}.jpg"].startswith(f"{kind} is not supported")
    assert not witness.exists()


def test_a_listing_opens_no_file_and_keeps_what_is_known(images: Path, tmp_path: Path) -> None:
    listed = scan(images, tmp_path / "l.parquet", ignore, depth="list")
    assert len(listed.index) == 11
    assert listed.rejects == []
    assert set(listed.index.widths) == {0}
    first = decode(images, tmp_path / "i.parquet")
    again = scan(images, tmp_path / "i.parquet", ignore, depth="list")
    kept = again.index.table.filter(again.index.table["digest"].is_valid())
    assert kept.equals(first.index.table)
    assert decode(images, tmp_path / "l.parquet").index.table.equals(first.index.table)


def test_several_inputs_are_one_index_and_tar_members_are_scanned_where_they_are(
    images: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for name in ("a/1.jpg", "b/cut.jpg"):
            tar.add(images / name, name)
    inputs = [str(images), str(tmp_path / "more.tar")]
    done = scan(inputs, tmp_path / "i.parquet", ignore, depth="decode")
    assert paths(done) == [f"images/a/{i}.jpg" for i in range(8)] + ["more.tar::a/1.jpg"]
    assert reasons(done)["more.tar::b/cut.jpg"].startswith("truncated or damaged JPEG")
    assert [(f.path, f.kind) for f in done.findings] == [("more.tar::a/1.jpg", "duplicate")]
    again = scan(inputs, tmp_path / "i.parquet", ignore, depth="decode")
    assert (again.kept, again.read) == (11, 0)
    assert again.index.table.equals(done.index.table)


def test_the_index_is_an_input_whose_rejects_stay_rejected(images: Path, tmp_path: Path) -> None:
    done = decode(images, tmp_path / "i.parquet")
    index, refused = build(tmp_path / "i.parquet")
    assert index.table.equals(done.index.table)
    assert [(r.path, r.stage, r.reason) for r in refused] == [
        (r.path, r.stage, r.reason) for r in done.rejects
    ]
    draw(tmp_path / "other/1.jpg", seed=50)
    both, refused = build([tmp_path / "i.parquet", tmp_path / "other"])
    assert len(both) == 9
    assert {event.path for event in refused} == {f"images/{r.path}" for r in done.rejects}
    second = decode(tmp_path / "i.parquet", tmp_path / "second.parquet")
    assert second.read == 0
    assert second.index.table.equals(done.index.table)
