import dataclasses
import hashlib
import io
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_run import draw_images

from btpipe import recipe
from btpipe.data import index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.eval_loader import evaluation_stream
from btpipe.data.pipeline.train_loader import (
    Batch,
    EvaluationBatch,
    LoaderSettings,
    TrainingLoader,
    evaluation_batches,
)
from btpipe.errors import BudgetError, UsageError
from btpipe.events import Event, Rejected, ignore

IMAGES = 26
BOMB_SCANS, BOMB_SECONDS = 8000, 5.0
"""Decoded it takes 10.8 CPU-seconds."""
GEOMETRY = Geometry.for_size(32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """26 JPEGs of different content and size, some of them turned by EXIF."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    root.mkdir()
    for i in range(IMAGES):
        cells = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        image = Image.fromarray(cells).resize((60 + 3 * i, 90 - 2 * i), Image.Resampling.BICUBIC)
        image.save(root / f"{i:02}.jpg", quality=90, exif=exif)
    return root


def described(**data: object) -> recipe.Recipe:
    values = {"batch_size": 8, "image_size": 32, "threads": 2, "max_bad": 0.5} | data
    return recipe.Recipe(
        seed=11,
        data=recipe.Data(**values),  # type: ignore[arg-type]
        optim=recipe.Optim(epochs=2, warmup_epochs=0),
    )


def batches(
    images: index.Index,
    chosen: recipe.Recipe | LoaderSettings | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    most: int | None = None,
    rejected: dict[int, Rejected] | None = None,
    events: list[Event] | None = None,
) -> list[Batch]:
    """The batches of a loader, at most `most`."""
    chosen = chosen or described()
    if isinstance(chosen, recipe.Recipe):
        chosen = LoaderSettings.of(chosen, len(images))
    with TrainingLoader(
        images,
        chosen,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        device=torch.device("cpu"),
        on_event=ignore if events is None else events.append,
        rejected={} if rejected is None else rejected,
    ) as loader:
        return list(itertools.islice(loader, most))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.step for batch in first] == [batch.step for batch in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        assert len(one.views) == len(other.views)
        assert all(map(torch.equal, one.views, other.views))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_an_epoch_is_every_full_batch_of_different_images(folder: Path) -> None:
    images, _ = index.build(folder)
    got = batches(images)
    assert [batch.step for batch in got] == list(range(6))  # 26 // 8 steps, two epochs
    for epoch in (got[:3], got[3:]):
        rows = np.concatenate([batch.images for batch in epoch])
        assert len(set(rows)) == 24
    for batch in got:
        for view in batch.views:
            assert view.shape == (8, 32, 32, 3)
            assert view.dtype == torch.uint8
            assert view.is_contiguous()
    assert not torch.equal(got[0].views[0], got[0].views[1])


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_threads(folder: Path) -> None:
    images, _ = index.build(folder)
    assert_same(batches(images, described(threads=1)), batches(images, described(threads=3)))


def test_two_ranks_together_get_what_one_gets(folder: Path) -> None:
    images, _ = index.build(folder)
    parts = [batches(images, rank=rank, world_size=2) for rank in range(2)]
    together = [
        Batch(
            one.step,
            np.concatenate([one.images, other.images]),
            tuple(map(torch.cat, zip(one.views, other.views, strict=True))),
        )
        for one, other in zip(*parts, strict=True)
    ]
    assert_same(together, batches(images))


def test_more_views_leave_the_first_ones_as_they_are_and_small_ones_are_small(folder: Path) -> None:
    images, _ = index.build(folder)
    pair = batches(images, described(max_bad=0.0))
    small = recipe.View(size=16, scale=(0.05, 0.3))
    chosen = described(max_bad=0.0).model_copy(
        update={"views": (recipe.VIEW_A, recipe.VIEW_B, small, small)}
    )
    four = batches(images, chosen)
    for one, other in zip(pair, four, strict=True):
        assert all(map(torch.equal, one.views, other.views[:2]))
        assert [view.shape for view in other.views[2:]] == [(8, 16, 16, 3)] * 2
        assert not torch.equal(other.views[2], other.views[3])  # drawn by the view's number


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_four_ranks_get_what_one_gets_while_a_file_in_a_hundred_is_junk_and_some_vanish(
    tmp_path: Path, shuffle: str
) -> None:
    draw_images(tmp_path / "images", 100)
    images, _ = index.build(tmp_path / "images")
    clean = batches(images, described(shuffle=shuffle, block_images=7, mixed_blocks=4))
    drawn = np.unique(np.concatenate([batch.images for batch in clean]))
    images.file(int(drawn[3])).write_bytes(b"not an image any more")
    images.file(int(drawn[40])).unlink()
    images.file(int(drawn[77])).unlink()
    gone = drawn[[3, 40, 77]]
    chosen = described(shuffle=shuffle, block_images=7, mixed_blocks=4, max_bad=0.03)
    alone = batches(images, chosen)
    for world_size in (2, 4):
        parts = [
            batches(images, chosen, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        together = [
            Batch(
                shares[0].step,
                np.concatenate([share.images for share in shares]),
                tuple(map(torch.cat, zip(*(share.views for share in shares), strict=True))),
            )
            for shares in zip(*parts, strict=True)
        ]
        assert_same(together, alone)
    replaced = 0
    for before, after in zip(clean, alone, strict=True):
        kept = ~np.isin(before.images, gone)
        replaced += int((~kept).sum())
        np.testing.assert_array_equal(after.images[kept], before.images[kept])
        assert torch.equal(
            after.views[0][torch.from_numpy(kept)], before.views[0][torch.from_numpy(kept)]
        )
    assert replaced >= 3


def test_a_micro_batch_holds_the_same_images_on_any_number_of_ranks(folder: Path) -> None:
    images, _ = index.build(folder)
    chosen = described()
    size = chosen.data.batch_size
    chosen = chosen.model_copy(update={"run": recipe.Run(micro_batch=size // 2)})
    alone = batches(images, chosen)
    parts = [batches(images, chosen, rank=rank, world_size=2) for rank in range(2)]
    for whole, one, other in zip(alone, *parts, strict=True):
        for half in range(2):
            rank_slice = slice(half * size // 4, (half + 1) * size // 4)
            shared = np.concatenate([one.images[rank_slice], other.images[rank_slice]])
            micro = slice(half * size // 2, (half + 1) * size // 2)
            np.testing.assert_array_equal(shared, whole.images[micro])


def test_a_sample_is_the_run_in_batches_of_another_size_without_budget_or_end(folder: Path) -> None:
    images, _ = index.build(folder)
    truncate(folder / "05.jpg")
    whole = described(max_bad=0.1).model_copy(update={"run": recipe.Run(micro_batch=4)})
    epoch = np.concatenate([batch.images for batch in batches(images, whole, most=3)])
    sample = LoaderSettings.sample(whole, 6)
    first = batches(images, dataclasses.replace(sample, steps=4))
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in first]), epoch)
    late = batches(images, sample, start_step=10**7, most=3)
    assert [batch.step for batch in late] == [10**7, 10**7 + 1, 10**7 + 2]
    for path in sorted(folder.iterdir())[:20]:
        truncate(path)
    assert set(batches(images, sample, most=1)[0].images) <= set(range(20, IMAGES))


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_starting_at_a_step_gives_the_rest_of_the_run(folder: Path, step: int) -> None:
    images, _ = index.build(folder)
    assert_same(batches(images, start_step=step), batches(images)[step:])


def test_a_truncated_jpeg_costs_only_its_own_place(folder: Path) -> None:
    images, _ = index.build(folder)
    clean = batches(images)
    truncate(folder / "05.jpg")
    events: list[Event] = []
    rejected: dict[int, Rejected] = {}
    got = batches(images, rejected=rejected, events=events)
    replaced = 0
    for one, other in zip(clean, got, strict=True):
        same = one.images != 5
        replaced += int((~same).sum())
        assert 5 not in other.images
        np.testing.assert_array_equal(one.images[same], other.images[same])
        assert torch.equal(
            one.views[0][torch.from_numpy(same)], other.views[0][torch.from_numpy(same)]
        )
        assert torch.equal(
            one.views[1][torch.from_numpy(same)], other.views[1][torch.from_numpy(same)]
        )
    assert replaced >= 1
    assert list(rejected) == [5]
    assert rejected[5].reason.startswith("truncated or damaged JPEG")
    assert events == [rejected[5]]


def test_a_stand_in_is_the_same_whether_the_bad_file_was_known_or_found(folder: Path) -> None:
    images, _ = index.build(folder)
    for name in ("05.jpg", "06.jpg", "07.jpg", "20.jpg"):
        truncate(folder / name)
    rejected: dict[int, Rejected] = {}
    first = batches(images, rejected=rejected)
    assert set(rejected) <= {5, 6, 7, 20}
    assert_same(batches(images, rejected=dict(rejected)), first)
    assert_same(batches(images, start_step=4, rejected=dict(rejected)), first[4:])
    assert_same(batches(images, start_step=4), first[4:])


def test_a_stand_in_is_drawn_as_that_image_would_be(folder: Path) -> None:
    images, _ = index.build(folder)
    clean = {
        (b.step // 3, int(row)): b.views[0][i]
        for b in batches(images)
        for i, row in enumerate(b.images)
    }
    truncate(folder / "05.jpg")
    for batch in batches(images):
        for i, row in enumerate(batch.images):
            if (batch.step // 3, int(row)) in clean:
                assert torch.equal(batch.views[0][i], clean[batch.step // 3, int(row)])


def test_a_vanished_file_is_rejected_and_replaced(folder: Path) -> None:
    images, _ = index.build(folder)
    (folder / "05.jpg").unlink()
    (folder / "06.jpg").write_bytes(b"")
    rejected: dict[int, Rejected] = {}
    assert len(batches(images, rejected=rejected)) == 6
    gone = "cannot be read: No such file or directory"
    assert rejected == {  # neither was read as listed: no size and time to go by the next time
        5: Rejected("05.jpg", "read", "gone", gone),
        6: Rejected("06.jpg", "read", "content", "empty file"),
    }


def test_files_that_vanish_while_a_run_goes_on_are_replaced(folder: Path) -> None:
    images, _ = index.build(folder)
    planned = batches(images)
    events: list[Event] = []
    with TrainingLoader(
        images,
        LoaderSettings.of(described(batch_size=2), len(images)),
        rank=0,
        world_size=1,
        start_step=0,
        device=torch.device("cpu"),
        on_event=events.append,
        rejected={},
    ) as loader:
        running = iter(loader)
        got = [next(running)]
        gone = planned[-1].images[:3]
        for row in gone:
            images.file(int(row)).unlink()
        got += running
    assert [batch.step for batch in got] == list(range(26))
    late = np.concatenate([batch.images for batch in got[13:]])  # the second epoch
    assert not np.isin(late, gone).any()
    assert {event.path for event in events if isinstance(event, Rejected)} <= {
        images.table["path"][int(row)].as_py() for row in gone
    }


def with_wrong_size(right: index.Index, row: int, width: int, height: int) -> index.Index:
    table = right.table.to_pylist()
    table[row] |= {"width": width, "height": height}
    return index.Index(right.root, right.table.from_pylist(table, schema=right.table.schema))


@pytest.mark.parametrize("size", [(900, 700), (5, 3), (75, 80)])
def test_an_image_of_another_size_than_the_index_says_is_drawn_for_its_own(
    folder: Path, size: tuple[int, int]
) -> None:
    right, _ = index.build(folder)
    wrong = with_wrong_size(right, 5, *size)
    assert_same(batches(wrong), batches(right))
    ours, theirs = pixels_of(evaluated(wrong)), pixels_of(evaluated(right))
    for row, pixels in theirs.items():
        np.testing.assert_array_equal(ours[row], pixels)


def test_a_jpeg_that_draws_its_pixels_thousands_of_times_is_not_decoded(folder: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (1500, 1500), (200, 90, 30)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    bomb = whole[:-2] + last * BOMB_SCANS + whole[-2:]
    (folder / "10.jpg").write_bytes(whole)
    (folder / "11.jpg").write_bytes(bomb)
    images, _ = index.build(folder)
    events: list[Event] = []
    started = time.process_time()
    assert len(batches(images, events=events)) == 6
    assert time.process_time() - started < BOMB_SECONDS
    (rejected,) = [event for event in events if isinstance(event, Rejected)]
    assert (rejected.path, rejected.stage) == ("11.jpg", "decode")
    assert rejected.reason.startswith(f"scan bomb: {BOMB_SCANS + 10} scans of 1500 x 1500 pixels")


def test_more_bad_images_than_allowed_end_the_run(folder: Path) -> None:
    images, _ = index.build(folder)
    for name in ("03.jpg", "04.jpg", "05.jpg"):
        truncate(folder / name)
    allowed = described(max_bad=3 / IMAGES)
    assert len(batches(images, allowed)) == 6
    with pytest.raises(BudgetError, match=r"3 of 26 images cannot be used(.|\n)*max_bad"):
        batches(images, described(max_bad=2 / IMAGES))


def test_a_folder_of_bad_images_only_ends_instead_of_searching_for_ever(folder: Path) -> None:
    images, _ = index.build(folder)
    for path in folder.iterdir():
        truncate(path)
    with pytest.raises(BudgetError, match="26 of 26"):
        batches(images, described(max_bad=1.0))


def test_too_few_images_for_a_batch_are_refused(folder: Path) -> None:
    images, _ = index.build(folder)
    with pytest.raises(UsageError, match="26 images do not fill one batch of 32"):
        batches(images, described(batch_size=32))


def evaluated(
    images: index.Index, rows: NDArray[np.int64] | None = None, batch_size: int = 8
) -> list[EvaluationBatch]:
    chosen = np.arange(len(images)) if rows is None else rows
    return list(evaluation_batches(images, chosen, GEOMETRY, batch_size=batch_size, threads=2))


def pixels_of(got: list[EvaluationBatch]) -> dict[int, NDArray[np.uint8]]:
    return {int(row): b.pixels[i] for b in got for i, row in enumerate(b.rows)}


def test_evaluation_keeps_the_order_of_the_rows(folder: Path) -> None:
    images, _ = index.build(folder)
    rows = np.array([7, 3, 25, 0, 12, 4, 9, 1, 2, 24])
    got = evaluated(images, rows, batch_size=4)
    assert [len(batch.rows) for batch in got] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in got]), rows)
    digests = [digest for batch in got for digest in batch.digests]
    assert digests == [hashlib.sha256(images.read_bytes(int(row))).hexdigest() for row in rows]
    assert all(batch.rejected == {} for batch in got)


def test_an_images_pixels_do_not_depend_on_its_neighbours(folder: Path) -> None:
    images, _ = index.build(folder)
    whole = pixels_of(evaluated(images, batch_size=26))
    for row, pixels in pixels_of(evaluated(images, np.arange(26)[::-1], batch_size=3)).items():
        np.testing.assert_array_equal(pixels, whole[row])


def test_whatever_its_name_an_image_is_evaluated_from_the_file_that_its_path_names(
    tmp_path: Path,
) -> None:
    names = [
        b"new\nline.jpg",
        b"tab\t\"quotes'.jpg",
        "\N{SNOWMAN} \N{ROCKET}.jpg".encode(),
        b"-leading.jpg",
        b"latin-%E9.jpg",
        b"latin-\xe9.jpg",
        b"n" * 251 + b".jpg",
    ]
    drawn = draw_images(tmp_path / "drawn", 2 * len(names))
    for i, subfolder in enumerate(("a", "b")):  # the same names in two folders
        (tmp_path / "images" / subfolder).mkdir(parents=True)
        for name, source in zip(names, drawn[i::2], strict=True):
            source.rename(tmp_path / "images" / subfolder / os.fsdecode(name))
    images, _ = index.build(tmp_path / "images")
    rows = np.arange(len(images))
    (batch,) = evaluation_batches(images, rows, GEOMETRY, batch_size=len(images), threads=2)
    assert batch.rows.tolist() == rows.tolist()
    paths = images.table.select(["path", "path_bytes"]).to_pylist()
    for i, row in enumerate(paths):
        path = tmp_path / "images" / os.fsdecode(row["path_bytes"] or row["path"].encode())
        assert batch.digests[i] == hashlib.sha256(path.read_bytes()).hexdigest()
        with Image.open(path) as image:
            assert batch.sizes[i].tolist() == [image.height, image.width]
    assert len(set(batch.digests)) == 2 * len(names)


def test_bad_images_are_rejected_with_their_reason_and_the_others_kept(folder: Path) -> None:
    images, _ = index.build(folder)
    clean = pixels_of(evaluated(images))
    truncate(folder / "01.jpg")
    truncate(folder / "02.jpg")
    (folder / "09.jpg").unlink()
    (folder / "10.jpg").write_bytes(b"")
    (folder / "11.jpg").write_text("not found")
    got = evaluated(images)
    kept = pixels_of(got)
    records = {row: bad for batch in got for row, bad in batch.rejected.items()}
    rejected = {row: bad.reason for row, bad in records.items()}
    assert set(kept) | set(rejected) == set(range(IMAGES))
    assert not set(kept) & set(rejected)
    assert rejected[1].startswith("truncated or damaged JPEG")
    assert rejected[2].startswith("truncated or damaged JPEG")
    assert rejected[9] == "cannot be read: No such file or directory"
    listed = images.table.select(["bytes", "mtime_ns"]).to_pylist()
    stamps = {row: (bad.kind, bad.bytes, bad.mtime_ns) for row, bad in records.items()}
    assert stamps[1] == ("content", listed[1]["bytes"], listed[1]["mtime_ns"])
    assert stamps[9] == ("gone", -1, -1)
    assert rejected[10] == "empty file"
    assert rejected[11] == "not an image"
    assert [len(batch.rows) for batch in got] == [8, 8, 5]
    for row, pixels in kept.items():
        np.testing.assert_array_equal(pixels, clean[row])


def test_batches_are_full_whatever_is_known_or_bad_and_wherever_tasks_end(folder: Path) -> None:
    images, _ = index.build(folder)
    clean = pixels_of(evaluated(images))
    cached_rows, bad = {0, 1, 2, 3, 4, 5, 6, 7, 12, 20}, {9, 21}
    for row in bad:
        truncate(folder / f"{row:02}.jpg")
    ends = [3, 8, 9, 17, IMAGES]  # of tasks: parts of a job have any size
    tasks = (np.arange(a, b) for a, b in itertools.pairwise([0, *ends]))
    got = list(
        evaluation_stream(
            images,
            tasks,
            GEOMETRY,
            batch_size=8,
            threads=2,
            is_known=lambda row, _digest, _bytes: row in cached_rows,
        )
    )
    assert [len(batch.rows) for batch in got if len(batch.rows)] == [8, 6]
    kept = pixels_of(got)
    assert list(kept) == [row for row in range(IMAGES) if row not in cached_rows | bad]
    for row, pixels in kept.items():
        np.testing.assert_array_equal(pixels, clean[row])
    assert {row for batch in got for row in batch.cached_files} == cached_rows
    assert {row for batch in got for row in batch.rejected} == bad


def test_a_batch_of_bad_images_only_is_empty_and_the_next_one_comes(folder: Path) -> None:
    images, _ = index.build(folder)
    for row in range(8, 24):
        truncate(folder / f"{row:02}.jpg")
    got = evaluated(images)
    assert [len(batch.rows) for batch in got] == [8, 0, 0, 2]
    assert [len(batch.rejected) for batch in got] == [0, 8, 8, 0]
    assert got[1].pixels.shape == (0, 32, 32, 3)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.99])
def test_a_jpeg_cut_anywhere_is_rejected(folder: Path, share: float) -> None:
    images, _ = index.build(folder)
    content = (folder / "00.jpg").read_bytes()
    (folder / "00.jpg").write_bytes(content[: int(len(content) * share)])
    (batch,) = evaluated(images, np.array([0, 1]))
    assert batch.rows.tolist() == [1]
    assert list(batch.rejected) == [0]


def test_all_eight_orientations_show_the_same_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((168, 120))
    undo: dict[int, Image.Transpose] = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        stored = upright.transpose(undo[number]) if number in undo else upright
        stored.save(tmp_path / f"{number}.jpg", quality=98, exif=exif)
    images, _ = index.build(tmp_path)
    assert set(images.widths) == {168}
    (batch,) = evaluated(images)
    flat = batch.pixels.reshape(8, -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert (flat @ flat.T).min() > 0.999  # JPEG's blocks lie elsewhere in a turned image


def test_evaluation_of_no_rows_is_no_batches(folder: Path) -> None:
    images, _ = index.build(folder)
    assert evaluated(images, np.zeros(0, dtype=np.int64)) == []


def test_leaving_early_leaves_nothing_running(folder: Path) -> None:
    images, _ = index.build(folder)
    rows = np.arange(IMAGES)
    running: Iterator[EvaluationBatch] = evaluation_batches(
        images, rows, GEOMETRY, batch_size=2, threads=2
    )
    assert next(running).rows.tolist() == [0, 1]
    del running


def test_evaluation_is_imported_without_torch() -> None:
    code = (
        "import sys, btpipe.data.index, btpipe.data.pipeline.train_loader\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_batches_of_many_formats_with_several_bad_files_lose_those_alone(tmp_path: Path) -> None:
    """Mixed batches with failures ended the process when DALI decoded them as batches."""
    random = np.random.default_rng(0)
    for i in range(72):
        picture = Image.fromarray(random.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
        kind = ("jpg", "png", "bmp")[i % 3]
        path = tmp_path / f"{i:02d}.{kind}"
        picture.save(path)
        if i % 8 == 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    images, refused = index.build(tmp_path)
    all_rows, geometry = np.arange(len(images), dtype=np.int64), Geometry.for_size(32)
    contents: dict[int, bytes] = {}
    for seed in range(4):
        rows, good, bad = np.random.default_rng(seed).permutation(all_rows), 0, 0
        for batch in evaluation_batches(images, rows, geometry, batch_size=32, threads=2):
            good, bad = good + len(batch.rows), bad + len(batch.rejected)
            for row, pixels in zip(batch.rows.tolist(), batch.pixels, strict=True):
                assert contents.setdefault(row, pixels.tobytes()) == pixels.tobytes()
        assert (good, bad + len(refused)) == (63, 9)
