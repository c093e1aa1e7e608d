"""plotly.js as it stands in a page: of its 47 kinds of traces, those that the page draws.

Opened as it is shipped, the bundle runs the modules of every kind before the page's first line,
and the browser reads its 4.8 MB twice, first to pass over them. Both are most of the time until a
map of 100,000 points is seen: the page's main thread takes 1.46 s of CPU with the bundle as it is
shipped, 0.65 with this (Chromium, WebGL in software, medians of 4 by turns).
"""

import functools
import re

from plotly.offline import get_plotlyjs

_ALL = re.compile(
    r"var [\w$]+=(?P<wrapper>[\w$]+)\(\([\w$]+,[\w$]+\)=>\{(?:\"use strict\";)?"
    r"var (?P<core>[\w$]+)=[\w$]+\(\);(?P<list>(?P=core)\.register\(\[(?:[\w$]+\(\),?)+\]\));"
)
"""The last module: the core, with every kind registered in it."""
_CALLED = re.compile(r"(?<![\w$.])([\w$]+)\(\)")
DEPTH = 3
"""Modules that one follows from what is registered to where the kind has its name."""
_ONCE = (
    ("self : this, () => {\n", "self : this, (() => {\n"),
    ("return Plotly;\n}));", "return Plotly;\n})));"),
)
"""In parentheses, a function is compiled when it is read: V8 takes it for one that is called."""


@functools.cache
def script(*kinds: str) -> str:
    """The bundle, opened with the core (which has "scatter") and these kinds.

    A bundle that is not built as is expected here comes whole, as it is shipped.
    """
    return _read_once(_reduced(get_plotlyjs(), kinds))


def _reduced(bundle: str, kinds: tuple[str, ...]) -> str:
    everything = _ALL.search(bundle)
    if everything is None:
        return bundle
    modules = _modules(bundle[: everything.start()], everything["wrapper"])
    entries = _CALLED.findall(everything["list"])
    chosen = [_entry(kind, entries, modules) for kind in kinds]
    if not all(chosen):
        return bundle
    start, end = everything.span("list")
    registered = ",".join(f"{entry}()" for entry in chosen)
    return f"{bundle[:start]}{everything['core']}.register([{registered}]){bundle[end:]}"


def _modules(bundle: str, wrapper: str) -> dict[str, str]:
    """Name to text of the modules that esbuild wrote: var NAME=WRAPPER((exports, module)=>..."""
    heads = list(re.finditer(rf"(?<=[;}}\n])var ([\w$]+)={re.escape(wrapper)}\(\(", bundle))
    ends = [head.start() for head in heads[1:]] + [len(bundle)]
    return {head[1]: bundle[head.start() : end] for head, end in zip(heads, ends, strict=True)}


def _entry(kind: str, entries: list[str], modules: dict[str, str]) -> str:
    """Which of the entries is this kind's: the only one whose modules name it; "" if none is."""
    edges = {entry: {entry} for entry in entries}
    for _ in range(DEPTH):
        named = [entry for entry, at in edges.items() if any(_names(modules, n, kind) for n in at)]
        if named:
            return named[0] if len(named) == 1 else ""
        edges = {
            entry: {called for name in at for called in _CALLED.findall(modules.get(name, ""))}
            for entry, at in edges.items()
        }
    return ""


def _names(modules: dict[str, str], module: str, kind: str) -> bool:
    text = modules.get(module, "")
    return f'name:"{kind}"' in text and 'moduleType:"trace"' in text


def _read_once(bundle: str) -> str:
    if any(bundle.count(shipped) != 1 for shipped, _ in _ONCE):
        return bundle
    for shipped, eager in _ONCE:
        bundle = bundle.replace(shipped, eager)
    return bundle
