"""The arrows between the rooms, as data, and the fences around what only one room may touch.

Each rule is also tried on a small planted violation, so that it cannot pass by seeing nothing.
"""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "btpipe"

FLOORS = (
    ("__main__",),
    ("cli",),
    ("tools",),
    ("explore", "evaluate"),
    ("embed",),
    ("plot", "export"),
    ("preview", "pretrain"),
    ("reference",),
    ("data",),
    ("pages", "recipe"),
    ("progress", "results", "artifact", "output_path", "runtime"),
    ("events", "neighbours", "errors"),
)
"""Rooms of the package from the top down: each may import itself and what is on a lower floor."""

ARROWS: dict[str, set[str]] = {
    room: {below for floor in FLOORS[i + 1 :] for below in floor}
    for i, rooms in enumerate(FLOORS)
    for room in rooms
}
ARROWS["__main__"] = {"cli", "errors", "events", "progress"}
ARROWS[""] = {"embed", "runtime"}  # btpipe/__init__.py: `btpipe.load`, lazily, and the one nvJPEG

FENCES = {"torch.distributed": "runtime", "os.environ": "runtime", "rich": "progress"}
"""What only one part may use."""

SAME_AS_ENVIRON = ("os.getenv", "os.putenv", "os.environb", "os.unsetenv")

HEAVY = (
    "torch",
    "torchvision",
    "pyarrow",
    "nvidia",
    "onnx",
    "onnxruntime",
    "numpy",
    "PIL",
    "pandas",
)
"""What `btpipe --help` must not wait for."""

HELP_CPU_SECONDS = 0.5
"""The promise for `btpipe --help`; CPU time, because wall time moves on a shared machine."""


def part_of(module: str) -> str:
    """`btpipe.data.index` -> `data`; `btpipe` -> ``."""
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a module imports, at any depth: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func).split(".")[-1]
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def used(tree: ast.AST) -> Iterator[str]:
    """`imported`, and every dotted expression such as `os.environ.get`."""
    yield from imported(tree)
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def back_edges(module: str, source: str) -> list[str]:
    """The imports of a module that go against the arrows."""
    part = part_of(module)
    if part not in ARROWS:
        return [f"{module}: no arrow says what the part {part!r} may import"]
    wrong = []
    for name in imported(ast.parse(source)):
        if name.startswith("."):
            wrong.append(f"{module} imports {name}: relative imports hide the arrow")
        if name.split(".")[0] == "benchmarks":
            wrong.append(f"{module} imports {name}, which no wheel holds")
        if name.split(".")[0] != "btpipe":
            continue
        other = part_of(name)
        if other in ARROWS and other not in ARROWS[part] | {part, ""}:
            wrong.append(f"{module} imports {name}")
    return wrong


def breaches(module: str, source: str) -> list[str]:
    """The uses of fenced things outside their part."""
    uses = []
    for name in used(ast.parse(source)):
        plain = "os.environ" if name.startswith(SAME_AS_ENVIRON) else name
        for fence, owner in FENCES.items():
            if (plain == fence or plain.startswith(f"{fence}.")) and part_of(module) != owner:
                uses.append(f"{module} uses {name}, which is for {owner}")
    return uses


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module to the modules of the package that it imports, within functions too."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        # btpipe/__init__.py loads `btpipe.load` when it is asked for, and is above everything then.
        names = set(imported(ast.parse(source))) if module != "btpipe" else set()
        candidates = names | {name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in candidates if name in sources and name != module}
    return graph


def modules() -> dict[str, str]:
    """Dotted name to source, for every module of the package."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(part for part in parts if part != "__init__")] = path.read_text()
    return sources


def modules_loaded_by_help(folder: Path) -> set[str]:
    """Top-level names in `sys.modules` after `btpipe --help`, for the package in `folder`."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['btpipe', '--help']\n"
        "try:\n    runpy.run_module('btpipe', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('loaded:', *sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.rpartition("loaded:")[2].split()}


@pytest.mark.parametrize("module", modules())
def test_no_module_imports_against_the_arrows(module: str) -> None:
    assert back_edges(module, modules()[module]) == []


@pytest.mark.parametrize("module", modules())
def test_what_is_fenced_is_used_by_its_owner_alone(module: str) -> None:
    assert breaches(module, modules()[module]) == []


def test_no_module_is_part_of_an_import_cycle() -> None:
    TopologicalSorter(import_graph(modules())).prepare()


def test_help_loads_nothing_heavy() -> None:
    assert modules_loaded_by_help(ROOT) & set(HEAVY) == set()


def test_help_takes_less_than_half_a_second() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        modules_loaded_by_help(ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < HELP_CPU_SECONDS


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("btpipe.data.index", "import btpipe.pretrain.train"),
        ("btpipe.export.onnx_model", "from btpipe.embed import job"),
        ("btpipe.embed.job", "from btpipe.explore.search import run"),
        ("btpipe.evaluate.knn", "from btpipe.explore.tables import Vectors"),
        ("btpipe.explore.search", "from btpipe.evaluate import knn"),
        ("btpipe.export.bundle", "from btpipe.plot import history"),
        ("btpipe.pretrain.train", "import btpipe.plot.history"),
        ("btpipe.recipe", "from btpipe.data import index"),
        ("btpipe.runtime", "def f():\n    from btpipe import pretrain"),
        ("btpipe.evaluate.knn", "from btpipe import cli"),
        ("btpipe.pretrain.train", "import btpipe.tools.doctor"),
        ("btpipe.tools.doctor", "from btpipe.cli import app"),
        ("btpipe.tools.bench", "from benchmarks import embed"),
        ("btpipe.data.index", "import importlib\nimportlib.import_module('btpipe.embed')"),
        ("btpipe.data.index", "from . import rejects"),
        ("btpipe.helpers", "import os"),
    ],
)
def test_a_planted_back_edge_is_seen(module: str, line: str) -> None:
    assert len(back_edges(module, line)) == 1


def test_an_import_along_the_arrows_is_not_a_back_edge() -> None:
    line = (
        "from btpipe import __version__, recipe\nfrom btpipe.data import index\nimport btpipe.embed"
    )
    assert back_edges("btpipe.embed.job", line) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("btpipe.pretrain.loss", "import torch.distributed as dist"),
        ("btpipe.pretrain.loss", "from torch import distributed"),
        ("btpipe.pretrain.loss", "from torch.distributed import nn"),
        ("btpipe.pretrain.loss", "import torch\ntorch.distributed"),
        ("btpipe.data.index", "import os\nx = os.environ"),
        ("btpipe.data.index", "import os\nos.getenv('HOME')"),
        ("btpipe.data.index", "from os import environ"),
        ("btpipe.cli", "from rich import print"),
        ("btpipe.tools.doctor", "def f():\n    import rich"),
    ],
)
def test_a_planted_breach_is_seen(module: str, line: str) -> None:
    assert len(breaches(module, line)) == 1


def test_the_owner_may_use_what_is_fenced() -> None:
    assert breaches("btpipe.runtime", "import os, torch.distributed\nos.environ") == []
    assert breaches("btpipe.progress", "import rich.table") == []


def test_a_planted_cycle_is_seen() -> None:
    planted = {
        "btpipe.data.a": "from btpipe.data import b",
        "btpipe.data.b": "def f():\n    import btpipe.data.a",
    }
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(planted)).prepare()


def test_a_planted_heavy_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "btpipe").mkdir()
    (tmp_path / "btpipe" / "__init__.py").write_text("")
    (tmp_path / "btpipe" / "__main__.py").write_text("import numpy")
    assert "numpy" in modules_loaded_by_help(tmp_path)
