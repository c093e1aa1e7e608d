"""One thing that the doctor looked at."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

Value = int | float | str | tuple[str, ...]
Verdict = Literal["ok", "look", "broken"]
REINSTALL = "install btpipe anew: pip install --force-reinstall ."


@dataclasses.dataclass(frozen=True)
class MachineFinding:
    """What was found, in words and by name; `to_do` where it is not as it should be."""

    name: str
    found: str
    verdict: Verdict = "ok"
    to_do: str = ""
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)


def tried(name: str, look: Callable[[], MachineFinding], to_do: str) -> MachineFinding:
    """What a look says; a library that cannot even be loaded says it by raising anything."""
    try:
        return look()
    except Exception as error:
        text = str(error).strip().splitlines()
        return MachineFinding(
            name, f"{type(error).__name__}: {text[0] if text else ''}", "broken", to_do
        )


def readable_bytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
