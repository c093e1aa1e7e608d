"""What "auto" means for a job: the device, the engine, and the precision of its vectors."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from btpipe import runtime
from btpipe.embed import outputs, precisions, table, work
from btpipe.embed.orders import Choice
from btpipe.errors import IntegrityError, UsageError
from btpipe.events import Note, Report
from btpipe.export import contract


def settings_there(out: Path) -> Mapping[str, str]:
    """What the table that is there, or the unfinished one, says of its vectors."""
    try:
        found = outputs.footer_of(out)
    except IntegrityError:
        found = None
    plan = work.read_plan(work.folder_of(out))
    return found or (plan.settings if plan else {})


def resolve(
    bundle: contract.Bundle, asked: Choice, earlier: Mapping[str, str], report: Report
) -> Choice:
    """The engine and precision that "auto" means here: for vectors that are there, theirs."""
    device = runtime.resolve_device(asked.device)
    engine = precisions.engine(asked.engine, asked.layer)
    agrees = functools.partial(precisions.fp16_agrees_apart, asked.bundle)
    precision, why = asked.precision, ""
    ours = (bundle.digest, engine) == (earlier.get(table.BUNDLE), earlier.get("btpipe.engine"))
    if precision == "auto" and ours:
        for known in get_args(precisions.Precision):
            if known == earlier.get("btpipe.precision"):
                with contextlib.suppress(UsageError):  # this machine does not compute in it
                    precision, _ = precisions.choose(bundle, engine, known, device, agrees)
                    why = f"{precision}: as the vectors that are there"
    if not why:
        precision, why = precisions.choose(bundle, engine, asked.precision, device, agrees)
    report(Note(why))
    return dataclasses.replace(asked, device=device, engine=engine, precision=precision)
