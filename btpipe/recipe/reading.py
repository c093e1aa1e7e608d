"""From files and overrides to a recipe, or to the sentence that says what is wrong with them."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from btpipe.errors import RecipeError
from btpipe.recipe.presets import expand
from btpipe.recipe.tables import Recipe
from btpipe.recipe.toml import flatten


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file `path`, on top of what it extends, with overrides last.

    Where `path` does not exist, a recipe of that file name that ships with btpipe is taken. A
    preset's name for `views` becomes its tables: the recipe that comes out is explicit.

    Raises:
        RecipeError: no such file, not TOML, an unknown key, a value of the wrong type or range.
    """
    layers = [*_chain(find(path)), *(_override(text) for text in overrides)]
    sources: dict[str, str] = {}
    merged: dict[str, object] = {}
    for layer in layers:
        sources.update({key: layer.source for key, _ in flatten(layer.content)})
        merged = _merge(merged, layer.content)
    if isinstance(name := merged.get("views"), str):
        merged["views"] = expand(name, sources["views"])
    # JSON mode reads TOML's arrays as tuples and stays strict about everything else.
    try:
        return Recipe.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        raise _explain(error.errors()[0], sources, layers[-1].source, len(error.errors())) from None
    except ValueError as error:
        raise RecipeError(f"{error}", where=path) from error


def shipped() -> list[Path]:
    """The recipes that come with btpipe, by name."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"  # in a wheel
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return sorted(folder.glob("*.toml"))


def find(path: Path) -> Path:
    """`path` if it is a file, else the shipped recipe of that name (`imagenet` or `imagenet.toml`).

    Raises:
        RecipeError: neither exists; the nearest shipped name is suggested.
    """
    if path.is_file():
        return path
    by_name = {recipe.stem: recipe for recipe in shipped()}
    may_be_shipped = path.parent in (Path(), Path("recipes"))
    if may_be_shipped and path.suffix in ("", ".toml") and path.stem in by_name:
        return by_name[path.stem]
    near = difflib.get_close_matches(path.stem, by_name, n=1)
    hint = f"did you mean {near[0]}.toml? " if near else ""
    raise RecipeError("no such recipe", where=path, fix=f"{hint}shipped: {', '.join(by_name)}")


@dataclasses.dataclass(frozen=True)
class _Layer:
    source: str
    content: dict[str, object]


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[_Layer]:
    """The file and what it extends, base first."""
    if path.resolve() in seen:
        raise RecipeError("extends itself", where=path, fix="break the circle of `extends`")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}", where=path) from error
    base = content.pop("extends", None)
    if base is None:
        return [_Layer(str(path), content)]
    if not isinstance(base, str):
        raise RecipeError(f"extends = {base!r}", where=path, expected="the name of a TOML file")
    sibling = path.parent / base
    parent = sibling if sibling.is_file() else find(Path(base))
    return [*_chain(parent, (*seen, path.resolve())), _Layer(str(path), content)]


def _override(text: str) -> _Layer:
    """`table.key=value` as a layer; the value is TOML, or else a string."""
    key, equals, value = text.partition("=")
    source = f"--set {text}"
    if not equals or not key.strip():
        raise RecipeError("not an assignment", where=source, expected="--set table.key=value")
    try:
        return _Layer(source, tomllib.loads(f"{key} = {value}"))
    except tomllib.TOMLDecodeError:
        try:
            return _Layer(source, tomllib.loads(f"{key} = {json.dumps(value)}"))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"not an assignment: {error}", where=source) from error


def _merge(base: dict[str, object], top: dict[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _explain(
    error: ErrorDetails, sources: dict[str, str], fallback: str, count: int
) -> RecipeError:
    """One validation error as: file, key path, what was found and expected, the nearest key."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    source = next((s for k, s in sources.items() if k == key or k.startswith(f"{key}.")), fallback)
    more = f" (and {count - 1} more)" if count > 1 else ""
    if error["type"] == "extra_forbidden":
        valid = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1) or _elsewhere(location[-1])
        prefix = ".".join(location[:-1])
        fix = (
            f"did you mean {f'{prefix}.' if prefix and near[0] in valid else ''}{near[0]}?"
            if near
            else ""
        )
        expected = f"one of {', '.join(valid)}" if valid else ""
        return RecipeError(f"unknown key {key}{more}", where=source, expected=expected, fix=fix)
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return RecipeError(f"{message}{more}", where=fallback)
    return RecipeError(f"{key} = {error['input']!r}{more}", where=source, expected=message)


def _keys_at(location: list[str]) -> list[str]:
    """The valid keys of the table at this path."""
    keys = [key for key in _valid_paths() if key.split(".")[: len(location)] == location]
    return list(dict.fromkeys(key.split(".")[len(location)] for key in keys))


def _elsewhere(name: str) -> list[str]:
    """Full paths whose last part is `name`, or close to it."""
    last = {path.split(".")[-1]: path for path in _valid_paths()}
    return [last[near] for near in difflib.get_close_matches(name, last, n=1)]


def _valid_paths() -> list[str]:
    return [path for path, _ in flatten(Recipe().model_dump(mode="json"))]
