"""The format references in docs/ say what the code does: keys, defaults, columns, files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import event_schema

from btpipe import recipe
from btpipe.embed import table
from btpipe.export import contract
from btpipe.pretrain import loss
from btpipe.recipe import Recipe, View, tables

DOCS = Path(__file__).parent.parent / "docs"
ROW = re.compile(r"^\| `([^`]+)`(?: (\([+!]\)))? \| (?:`([^`]*)` \|)?", re.MULTILINE)


def test_the_recipe_reference_has_every_key_with_its_default() -> None:
    listed = {key: default for key, _, default in rows("recipe.md") if default is not None}
    assert listed == {key: json.dumps(value) for key, value in defaults(Recipe(), "")}


def test_the_recipe_reference_marks_what_may_change() -> None:
    marks = {key: mark for key, mark, _ in rows("recipe.md") if mark}
    expected = dict.fromkeys(tables.BOOKKEEPING, "(+)") | dict.fromkeys(tables.ROUNDING, "(!)")
    assert marks == expected


def test_the_second_default_view_differs_as_the_reference_says() -> None:
    first, second = recipe.Recipe().views
    blur = first.blur.model_copy(update={"probability": 0.1})
    solarize = first.solarize.model_copy(update={"probability": 0.2})
    assert second == first.model_copy(update={"blur": blur, "solarize": solarize})


def test_the_vectors_reference_has_every_column_and_footer_key() -> None:
    footer = table.Footer("b", "i", "{}", "fp32", "/", 8, shard="0/2")
    names = {*table.schema(footer).names, *footer.metadata(), *table.rejects_schema(footer).names}
    listed = {key for key, _, _ in rows("vectors.md")}
    assert names <= listed
    assert {key for key in listed if key.startswith("btpipe.")} == set(footer.metadata())


def test_the_bundle_reference_has_every_file_and_key() -> None:
    prepared = contract.Preprocessing(8, 8, "bilinear", (0, 0, 0), (1, 1, 1))
    config = contract.config("resnet18", "imagenet", 512, prepared, ["fp32"])
    files = {*contract.MODELS.values(), contract.FLOAT_MODEL, contract.WEIGHTS, contract.CONFIG}
    files |= {contract.PREPROCESSOR, contract.CARD}
    listed = {key for key, _, _ in rows("bundle.md")}
    assert files | set(config) | set(prepared.record()) <= listed


def test_the_floors_of_the_loss_are_those_that_a_run_prints() -> None:
    text = (DOCS / "health.md").read_text()
    widths = [int(width) for width in re.findall(r" D (\d+) \|", text)]
    lines = re.findall(r"^\| N (\d+) \|((?: \d+ \|)+)$", text, flags=re.MULTILINE)
    assert len(widths) == 5
    assert len(lines) == 6
    for count, cells in lines:
        floors = [int(cell) for cell in cells.split("|")[:-1]]
        lambd = recipe.Recipe().loss.lambd
        assert floors == [round(loss.floor(int(count), width, lambd)) for width in widths]


def rows(name: str) -> list[tuple[str, str, str | None]]:
    """(key, mark, default) of each row of the tables."""
    return [
        (match[1], match[2] or "", match[3]) for match in ROW.finditer((DOCS / name).read_text())
    ]


def defaults(of: tables.Table, prefix: str) -> Iterator[tuple[str, object]]:
    """(key path, default) of every leaf; of the views those of one."""
    for name, value in of:
        if name == "views":
            yield from defaults(View(), "views.")
        elif isinstance(value, tables.Table):
            yield from defaults(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_events_reference_is_what_the_classes_say() -> None:
    stale = "python tests/event_schema.py > docs/events.md"
    assert (DOCS / "events.md").read_text() == event_schema.page(), stale
