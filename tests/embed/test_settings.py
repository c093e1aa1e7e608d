"""What decides whether vectors may stand in one table: of shares, and of tables from before."""

from pathlib import Path

import pytest
from tiny_run import draw_images

from btpipe import runtime
from btpipe.embed import resolve, table, work_folder
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.merging import merge
from btpipe.embed.precisions import EncoderConfig, RequestedPrecision
from btpipe.embed.shares import Share
from btpipe.events import ignore


def share(
    folder: Path, bundle: Path, number: int, precision: RequestedPrecision = "auto"
) -> dict[str, str]:
    """Embeds one of two shares; the footer of its table."""
    out = folder / f"half-{number}.parquet"
    encoder = EncoderConfig(bundle, device="cpu", engine="torch", precision=precision)
    embed(folder / "images", out, encoder, ignore, JobOptions(shard=f"{number}/2"))
    return dict(table.footer_of(out) or {})


def test_a_share_is_in_the_precision_of_the_shares_beside_it(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of an array that would choose bf16 finds the fp32 of one that cannot."""
    draw_images(tmp_path / "images", 4)
    first = share(tmp_path, bundle, 0, "fp32")
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    assert share(tmp_path, bundle, 1)["btpipe.precision"] == "fp32"
    halves = [tmp_path / f"half-{i}.parquet" for i in range(2)]
    merge(halves, tmp_path / "whole.parquet", ignore)
    for half in halves:
        half.unlink()
    work = table.work_path(halves[0])  # and while that one is at work
    work.mkdir()
    work_folder.write_plan(work, work_folder.JobPlan(first, first[table.INPUT], 0, 2, 2))
    (beside,) = [each for each in resolve.earlier_settings(halves[1], Share(1, 2)) if each]
    assert beside["btpipe.precision"] == "fp32"
