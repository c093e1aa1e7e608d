"""The events' classes as a schema: what --json may write, and docs/events.md.

Run as a program it prints the page: python tests/event_schema.py > docs/events.md
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import btpipe
from btpipe.errors import UsageError
from btpipe.events import Event, Finished, TextTable
from btpipe.tools.measured_rows import Compared

Record = dict[str, typing.Any]
PLAIN = {
    str: "text",
    Path: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    object: "any JSON",
}
NOT_WRITTEN = (Event, Finished, Compared)
"""What only others are made from, and what no command writes as JSON."""

HEAD = """\
# Events

With `--json` a command writes one line of JSON for each event to standard output, and nothing else;
a run keeps the same lines in `runs/NAME/events.jsonl`. `event` names the kind, `time` is when it
was, in seconds since 1970 (UTC). A command that did its work told its result, one that did not ends
with an `Error`. Numbers are numbers, and `null` where they are not finite; shares are 0 to 1.

Made from the classes: `python tests/event_schema.py > docs/events.md`.
"""


def read(lines: str) -> list[Record]:
    """What a command wrote with --json; every line is as its class says, or this is an error."""
    records = [json.loads(line, parse_constant=_refuse) for line in lines.splitlines()]
    for record in records:
        check(record)
    return records


def check(record: Record) -> None:
    """Raises AssertionError where a record is not as its class says."""
    kind = kinds()[record["event"]]
    _check({key: value for key, value in record.items() if key != "event"}, kind, record["event"])


def _refuse(text: str) -> typing.NoReturn:
    raise AssertionError(f"{text} is no JSON")


@functools.cache
def kinds() -> dict[str, type[Event]]:
    """Every kind of event that is written, by its name."""
    for module in pkgutil.walk_packages(btpipe.__path__, "btpipe."):
        with contextlib.suppress(ImportError, UsageError):  # what needs an extra has no events
            importlib.import_module(module.name)
    ordered = sorted(_below(Event), key=lambda kind: (issubclass(kind, Finished), kind.__name__))
    named = {kind.__name__: kind for kind in ordered if kind not in NOT_WRITTEN}
    assert len(named) == len(set(_below(Event)) - set(NOT_WRITTEN)), "two of one name"
    return named


def _below(kind: type[Event]) -> Iterator[type[Event]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _below(child)


def fields(kind: type) -> dict[str, typing.Any]:
    """A class's fields and their types; `time` last."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: hints[name] for name in sorted(names, key=lambda name: name == "time")}


def _check(value: object, kind: typing.Any, where: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is object:
        return  # whatever JSON has
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        assert isinstance(value, dict), f"{where}: {value!r}"
        typed = fields(kind)
        assert value.keys() == typed.keys(), f"{where}: {sorted(value.keys() ^ typed.keys())}"
        for name, each in typed.items():
            _check(value[name], each, f"{where}.{name}")
    elif origin in (typing.Union, types.UnionType):
        assert any(_fits(value, each) for each in arguments), f"{where}: {value!r}"
    elif origin is typing.Literal:
        assert value in arguments, f"{where}: {value!r}"
    elif origin is not None and issubclass(origin, Mapping):
        assert isinstance(value, dict), f"{where}: {value!r}"
        for key, each in value.items():
            _check(each, arguments[1], f"{where}.{key}")
    elif origin is not None and issubclass(origin, Sequence):
        assert isinstance(value, list), f"{where}: {value!r}"
        for i, each in enumerate(value):
            _check(each, arguments[0 if arguments[-1] is ... else i], f"{where}[{i}]")
    elif kind is float:
        # None is a number that is not finite.
        assert value is None or type(value) in (int, float), f"{where}: {value!r}"
    else:
        expected = str if kind is Path else kind
        assert type(value) is expected, f"{where}: {value!r} is no {kind.__name__}"


def _fits(value: object, kind: typing.Any) -> bool:
    try:
        _check(value, kind, "")
    except AssertionError:
        return False
    return True


def page() -> str:
    """docs/events.md, as the classes have it."""
    results = {name: kind for name, kind in kinds().items() if issubclass(kind, Finished)}
    others = {name: kind for name, kind in kinds().items() if name not in results}
    parts = _parts([*results.values(), *others.values()])
    return "\n".join(
        [
            HEAD,
            "## Results\n",
            "What a command made, beside its name; `seconds` is what it took. `compare`,"
            " `inspect`, `eval knn` and\n`eval linear` on vectors tell a `Comparison`, `Inspected`,"
            " `Judged` or `Probed`.\n",
            *map(_section, results.values()),
            "## What is told on the way\n",
            *map(_section, others.values()),
            "## What events are made of\n",
            *map(_section, parts),
        ]
    )


def _parts(holders: Sequence[type]) -> list[type]:
    """The records that are fields of others, each once."""
    parts: set[type] = set()
    left = list(holders)
    while left:
        held = {part for each in fields(left.pop()).values() for part in _records(each)}
        left += held - parts  # a record may hold another one of its kind
        parts |= held
    return sorted(parts, key=lambda part: part.__name__)


def _records(kind: typing.Any) -> list[type]:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not TextTable:
        return [kind]
    return [part for each in typing.get_args(kind) for part in _records(each)]


def _section(kind: type) -> str:
    about = inspect.getdoc(kind) or ""
    rows = [
        f"| `{name}` | {_type_text(each)} |"
        for name, each in fields(kind).items()
        if name != "time"
    ]
    head = "" if not issubclass(kind, Finished) else f" (`{kind.job}`)"
    table = "\n".join(["| field | type |", "|---|---|", *rows])
    return f"### {kind.__name__}{head}\n\n{about}\n\n{table}\n"


def _type_text(kind: typing.Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        text = PLAIN[kind]
    elif origin in (typing.Union, types.UnionType):
        text = " or ".join(map(_type_text, arguments))
    elif origin is typing.Literal:
        text = " or ".join(f"`{json.dumps(each)}`" for each in arguments)
    elif origin is None:
        text = f"[{kind.__name__}](#{kind.__name__.lower()})"
    elif issubclass(origin, Mapping):
        text = f"{_type_text(arguments[1])} by name"
    elif arguments[-1] is ...:
        text = f"list of {_type_text(arguments[0])}"
    else:
        text = f"list of {len(arguments)}: {', '.join(map(_type_text, arguments))}"
    return text


if __name__ == "__main__":
    print(page(), end="")
