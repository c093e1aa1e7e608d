"""What "auto" means for a job: the device, the engine, and the precision of its vectors."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from btpipe import runtime
from btpipe.embed import outputs, precisions, table, work_folder
from btpipe.embed.precisions import EncoderConfig
from btpipe.embed.shares import Share
from btpipe.errors import IntegrityError, UsageError
from btpipe.events import Note, Report
from btpipe.export import contract


def earlier_settings(out: Path, share: Share) -> Iterator[Mapping[str, str]]:
    """What the table that is there, or the unfinished one, says of its vectors.

    Then what those of other shares do: beside it, of its name but for the numbers in it.
    """
    yield _settings(out)
    if share.count and out.parent.is_dir():
        names = {path.name.removesuffix(".work") for path in out.parent.iterdir()}
        for name in sorted(name for name in names if _unnumbered(name) == _unnumbered(out.name)):
            settings = _settings(out.with_name(name))
            if settings.get(table.SHARD, "").endswith(f"/{share.count}"):
                yield settings


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _settings(out: Path) -> Mapping[str, str]:
    try:
        footer = outputs.footer_of(out)
    except IntegrityError:
        footer = None
    plan = work_folder.read_plan(table.work_path(out))
    return footer or (plan.settings if plan else {})


def resolve(
    bundle: contract.Bundle,
    requested: EncoderConfig,
    earlier: Iterable[Mapping[str, str]],
    on_event: Report,
) -> EncoderConfig:
    """The engine and precision that "auto" means here: for vectors that are there, theirs.

    `earlier`: what these say of themselves, the nearest first.
    """
    device = runtime.resolve_device(requested.device)
    engine = precisions.engine(requested.engine, requested.layer)
    agrees = functools.partial(precisions.agrees_apart, requested.bundle, device)
    precision, why = requested.precision, ""
    if precision == "auto":
        here = (bundle.digest, engine)
        ours = (e for e in earlier if (e.get(table.BUNDLE), e.get("btpipe.engine")) == here)
        theirs = next(ours, {}).get("btpipe.precision")
        for name in get_args(precisions.Precision):
            if name == theirs:
                with contextlib.suppress(UsageError):  # this machine does not compute in it
                    precision, _ = precisions.choose(bundle, engine, name, device, agrees)
                    why = f"{precision}: as the vectors that are there"
    if not why:
        precision, why = precisions.choose(bundle, engine, requested.precision, device, agrees)
    on_event(Note(why))
    return dataclasses.replace(requested, device=device, engine=engine, precision=precision)


def footer(
    bundle: contract.Bundle, encoder: EncoderConfig, share: Share, dtype: table.Dtype
) -> table.Footer:
    """What the table says of its vectors; `input` and `root` are not known yet."""
    return table.Footer(
        bundle=bundle.digest,
        input="",
        preprocessing=bundle.preprocessing.text(),
        precision=encoder.precision,
        root="",
        dimension=precisions.dimension(bundle, encoder.layer),
        dtype=dtype,
        normalize=encoder.normalize,
        layer=encoder.layer,
        engine=encoder.engine,
        shard=share.text,
    )
