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
from btpipe.errors import RefusedError
from btpipe.events import Event, Warned, ignore
from btpipe.results import Embedded


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


def halves(folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> list[Path]:
    """Tables of two shares, of which one was made where `what` of btpipe has another value."""
    draw_images(folder / "images", 4)
    out = [folder / f"half-{i}.parquet" for i in range(2)]
    run(folder / "images", out[0], bundle, shard="0/2")
    with monkeypatch.context() as other:
        other.setattr(table, what, type(getattr(table, what))(99))
        run(folder / "images", out[1], bundle, shard="1/2")
    return out


def run(images: Path, out: Path, bundle: Path, shard: str = "") -> tuple[Embedded, list[Event]]:
    events = list[Event]()
    encoder, options = EncoderConfig(bundle, device="cpu"), JobOptions(shard=shard)
    return embed(images, out, encoder, events.append, options), events


def test_another_version_of_btpipe_changes_nothing(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, whole = halves(tmp_path, bundle, monkeypatch, "__version__"), tmp_path / "whole.parquet"
    merge(shares, whole, ignore)
    monkeypatch.setattr(table, "__version__", "77")
    assert run(tmp_path / "images", whole, bundle)[0].nothing_to_do


def test_vectors_of_another_version_of_the_pixels_are_made_anew_with_a_sentence(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = halves(tmp_path, bundle, monkeypatch, "PIXELS_VERSION")
    with pytest.raises(RefusedError, match=r"btpipe\.pixels is 99"):
        merge(shares, tmp_path / "whole.parquet", ignore)
    done, events = run(tmp_path / "images", shares[1], bundle, shard="1/2")
    assert (done.embedded, done.reused) == (2, 0)
    (warned,) = [event.text for event in events if isinstance(event, Warned)]
    assert "version 99 of the pixels" in warned
    merge(shares, tmp_path / "whole.parquet", ignore)
