"""Nested tables as key paths with their leaves, and as lines of TOML."""

import json
from collections.abc import Iterator


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(key path, leaf) for every leaf; entries of an array of tables are numbered."""
    if isinstance(value, dict):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        children = [(str(i), child) for i, child in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, child in children:
        yield from flatten(child, f"{prefix}.{key}" if prefix else key)


def toml_lines(table: dict[str, object], prefix: str = "") -> Iterator[str]:
    """A table's own values first, then its subtables, then its arrays of tables."""

    def is_tables(value: object) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    for key, value in table.items():
        if not isinstance(value, dict) and not is_tables(value):
            yield f"{key} = {json.dumps(value)}"
    for key, value in table.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from ("", f"[{path}]", *toml_lines(value, path))
        elif is_tables(value):
            assert isinstance(value, list)
            for entry in value:
                yield from ("", f"[[{path}]]", *toml_lines(entry, path))
