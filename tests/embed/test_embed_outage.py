"""What a disk or a server fails to give is made when it gives it; a file is not blamed for it."""

import os
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stumbling_server import Stumbling
from tiny_run import draw_images

from btpipe.data import index
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.merging import merge
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import MachineError
from btpipe.events import ignore
from btpipe.results import Embedded

IMAGES = 24
FAILING = "images/b/005.jpg"
ALWAYS = 10**6
Served = tuple[str, Path, type[Stumbling]]


def run(source: Path | str, out: Path, bundle: Path, options: JobOptions | None = None) -> Embedded:
    encoder = EncoderConfig(bundle, device="cpu")
    return embed(source, out, encoder, ignore, options or JobOptions(part_rows=8))


def bytes_of(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name(f"{out.stem}.rejects.parquet").read_bytes()


def rejects_of(out: Path) -> list[tuple[str, str, str]]:
    table = pq.read_table(out.with_name(f"{out.stem}.rejects.parquet"))
    columns = (table[name].to_pylist() for name in ("path", "stage", "kind"))
    return list(zip(*columns, strict=True))


@pytest.fixture
def listed(served: Served, tmp_path: Path) -> Path:
    """An index of images behind a URL: nothing is asked of the server before they are read."""
    url, folder, handler = served
    draw_images(folder / "images", IMAGES)
    images, _ = index.build(f"{url}/images/")
    images.save(tmp_path / "listed.parquet")
    handler.requests.clear()
    return tmp_path / "listed.parquet"


@pytest.mark.parametrize("status", [503, 403])
def test_a_file_that_a_server_did_not_give_is_made_by_the_same_command(
    served: Served, listed: Path, bundle: Path, tmp_path: Path, status: int
) -> None:
    url, _, handler = served
    out = tmp_path / "v.parquet"
    handler.failures[f"/{FAILING}"] = ALWAYS, status
    with pytest.raises(MachineError, match=rf"1 of {IMAGES} inputs could not be read.*/{FAILING}"):
        run(listed, out, bundle)
    assert rejects_of(out) == [(f"{url}/{FAILING}", "read", "machine")]
    before = bytes_of(out)
    with pytest.raises(MachineError, match="1 of"):
        run(listed, out, bundle)
    assert bytes_of(out) == before
    handler.failures.clear()
    handler.requests.clear()
    result = run(listed, out, bundle)
    assert (result.embedded, result.reused, result.rejects) == (1, IMAGES - 1, 0)
    assert handler.requests == [f"GET /{FAILING}"]
    assert run(listed, out, bundle).nothing_to_do
    run(listed, tmp_path / "fresh.parquet", bundle)
    assert bytes_of(out) == bytes_of(tmp_path / "fresh.parquet")


def test_a_server_that_gives_nothing_ends_the_job_and_no_file_is_blamed(
    served: Served, listed: Path, bundle: Path, tmp_path: Path
) -> None:
    _, _, handler = served
    out = tmp_path / "v.parquet"
    handler.down = 503
    with pytest.raises(MachineError, match="the source has given nothing for 1 s"):
        run(listed, out, bundle, JobOptions(patience_seconds=1.0))
    assert not out.exists()
    handler.down = 0
    result = run(listed, out, bundle)
    assert (result.rows, result.rejects) == (IMAGES, 0)


def test_a_server_that_is_away_for_a_while_costs_no_row(
    served: Served, listed: Path, bundle: Path, tmp_path: Path
) -> None:
    _, _, handler = served
    handler.down = 503
    back = threading.Timer(6.0, setattr, (handler, "down", 0))
    back.start()
    result = run(listed, tmp_path / "v.parquet", bundle)
    back.join()
    assert (result.rows, result.rejects) == (IMAGES, 0)


def test_a_file_that_was_not_given_while_it_was_listed_is_made_by_the_same_command(
    served: Served, bundle: Path, tmp_path: Path
) -> None:
    url, folder, handler = served
    draw_images(folder / "images", IMAGES)
    out = tmp_path / "v.parquet"
    handler.failures[f"/{FAILING}"] = ALWAYS, 503
    with pytest.raises(MachineError, match=f"1 of {IMAGES} inputs could not be read"):
        run(f"{url}/images/", out, bundle)
    assert rejects_of(out) == [(f"{url}/{FAILING}", "index", "machine")]
    with pytest.raises(MachineError, match="1 of"):
        run(f"{url}/images/", out, bundle)
    handler.failures.clear()
    result = run(f"{url}/images/", out, bundle)
    assert (result.embedded, result.reused, result.rejects) == (1, IMAGES - 1, 0)


def test_a_file_that_was_gone_when_it_was_read_is_made_when_it_is_listed_again(
    bundle: Path, tmp_path: Path
) -> None:
    paths = draw_images(tmp_path / "images", IMAGES)
    images, _ = index.build(tmp_path / "images")
    images.save(tmp_path / "listed.parquet")
    aside, out = tmp_path / "aside.jpg", tmp_path / "v.parquet"
    paths[4].rename(aside)
    assert run(tmp_path / "listed.parquet", out, bundle).rejects == 1
    assert [(stage, kind) for _, stage, kind in rejects_of(out)] == [("read", "gone")]
    aside.rename(paths[4])
    result = run(tmp_path / "listed.parquet", out, bundle)
    assert (result.embedded, result.reused, result.rejects) == (1, IMAGES - 1, 0)


def test_rejects_that_are_final_are_tried_again_when_asked(bundle: Path, tmp_path: Path) -> None:
    paths = draw_images(tmp_path / "images", IMAGES)
    whole, stamp = paths[6].read_bytes(), (5, 5)
    paths[6].write_bytes(bytes(whole[: len(whole) // 2]) + bytes(len(whole) - len(whole) // 2))
    os.utime(paths[6], ns=stamp)
    (tmp_path / "images" / "letter.png").write_text("Dear reader,")
    images, out = tmp_path / "images", tmp_path / "v.parquet"
    assert run(images, out, bundle).rejects == 2
    paths[6].write_bytes(whole)
    os.utime(paths[6], ns=stamp)
    assert run(images, out, bundle).nothing_to_do
    options = JobOptions(part_rows=8, retry_rejects=True)
    result = run(images, out, bundle, options)
    assert (result.embedded, result.reused, result.rejects) == (1, IMAGES - 1, 1)
    run(images, tmp_path / "fresh.parquet", bundle)
    assert bytes_of(out) == bytes_of(tmp_path / "fresh.parquet")


def test_shards_that_lack_what_could_not_be_read_are_merged_and_named(
    served: Served, listed: Path, bundle: Path, tmp_path: Path
) -> None:
    _, _, handler = served
    shards = [tmp_path / f"shard-{i}.parquet" for i in range(2)]
    options = [JobOptions(part_rows=8, shard=f"{i}/2") for i in range(2)]
    run(listed, shards[0], bundle, options[0])
    handler.failures[f"/{FAILING}"] = ALWAYS, 503
    with pytest.raises(MachineError, match="1 of 12 inputs"):
        run(listed, shards[1], bundle, options[1])
    out = tmp_path / "v.parquet"
    for _ in range(2):
        with pytest.raises(MachineError, match="1 inputs of shard 1/2 could not be read"):
            merge(shards, out, ignore)
    assert len(pq.read_table(out)) == IMAGES - 1
    handler.failures.clear()
    assert run(listed, shards[1], bundle, options[1]).embedded == 1
    merge(shards, out, ignore)
    run(listed, tmp_path / "whole.parquet", bundle)
    assert bytes_of(out) == bytes_of(tmp_path / "whole.parquet")


def test_a_job_for_what_could_not_be_read_goes_on_where_it_was(
    served: Served, listed: Path, bundle: Path, tmp_path: Path
) -> None:
    _, _, handler = served
    names = [f"/images/{name}.jpg" for name in ("a/002", "b/021")]
    handler.failures |= dict.fromkeys(names, (ALWAYS, 503))
    out, options = tmp_path / "v.parquet", JobOptions(part_rows=4, patience_seconds=1.0)
    with pytest.raises(MachineError, match="2 of"):
        run(listed, out, bundle, options)
    before = bytes_of(out)
    handler.down = 503
    with pytest.raises(MachineError, match="given nothing"):
        run(listed, out, bundle, options)
    assert bytes_of(out) == before
    handler.down = 0
    handler.failures.clear()
    assert run(listed, out, bundle, options).embedded == 2
    run(listed, tmp_path / "fresh.parquet", bundle)
    assert bytes_of(out) == bytes_of(tmp_path / "fresh.parquet")
