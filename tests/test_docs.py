"""The documents are true: every command, recipe and Python block runs, in the order it is read in.

All of README.md and then docs/*.md is tried on one desk. Lines of a sh block that do not begin with
`btpipe ` (pip, make, torchrun, ...) are not run, and neither is what ran before. Each command runs
with --json the first time, where every line must be as its class says. The options in
`smaller` stand behind those that are shown, so that a command takes seconds. Of the commands in
LONG, which measure or judge, `make test` only looks whether they have the options that are shown;
`make test-slow` runs them too.

A toml block whose first line is a comment with a name, `# recipes/mine.toml`, is written there and
must load; any other one must be accepted as a part of a recipe.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import event_schema
import pytest
from pages import LINK, ROOT, Block, Command, anchors, blocks, commands, pages
from tiny_run import draw_images
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from btpipe import recipe
from btpipe.cli import app
from btpipe.errors import RecipeError

SIZE = 32
NAMED = re.compile(r"# ([\w/-]+\.toml)\n")
LONG = ("bench", "compare", "eval linear", "eval semisup", "plan", "selftest")
BASE = 'extends = "imagenet.toml"\n[optim]\nwarmup_epochs = 0\n'
"""What a part of a recipe is put on: no warm-up, so that it may set any number of epochs."""


def smaller(words: Sequence[str]) -> list[str]:
    """Options that make a command take seconds."""
    if words[0] == "bench":
        return [] if "--quick" in words else ["--quick"]
    if words[:2] == ("eval", "select"):
        return ["--most", "8"]
    if words[:2] in (("eval", "linear"), ("eval", "semisup")):
        is_table = words[2].endswith(".parquet")
        return [] if is_table else ["--epochs", "1"]
    if words[0] not in ("pretrain", "plan", "views"):
        return []
    shown = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    described = recipe.load(Path(words[1]), shown)
    sizes = [view.size for view in described.views]
    micro = ["run.micro_batch=4"] if described.run.micro_batch else []
    small = [
        "data.batch_size=8",
        f"data.image_size={max(SIZE, *sizes)}",
        "network.backbone=resnet18",
        "network.projector=[16, 16]",
        f"optim.epochs={min(described.optim.epochs, 2)}",
        f"optim.warmup_epochs={min(described.optim.warmup_epochs, 1)}",
        *micro,
    ]
    return [word for value in small for word in ("--set", value)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader sits: labelled images, others held out, and two single pictures."""
    draw_images(tmp_path / "images", 20)
    draw_images(tmp_path / "held-out", 10)
    for name, path in (("a.jpg", "a/000.jpg"), ("b.jpg", "b/001.jpg")):
        (tmp_path / name).write_bytes((tmp_path / "images" / path).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(command: Command, left: tuple[str, ...] = ()) -> None:
    """Runs it, or only asks for its help where it is `left`: an option it has not is an error."""
    if command.words[0] == "demo":  # minutes, and `make demo` is this
        return
    more = ["--help"] if " ".join(command.words).startswith(left) else smaller(command.words)
    invoke(command, more)


def invoke(command: Command, more: Sequence[str]) -> str:
    """Runs it with more options; what it wrote."""
    result = CliRunner().invoke(app, [*command.words, *more])
    assert result.exit_code == 0, (
        f"{command.where}: {command.line}\n{result.output}\n{result.exception!r}"
    )
    return result.stdout


def run_for_a_machine(
    command: Command, left: tuple[str, ...], checked: set[tuple[str, ...]]
) -> None:
    """Runs it with --json where none of its name has; every line is as its class says."""
    with_json = {leaf for leaf, options in leaves(get_command(app)) if "--json" in options}
    names = [leaf for leaf in with_json if command.words[: len(leaf)] == leaf]
    if command.words[0] == "demo" or " ".join(command.words).startswith(left):
        return
    for name in names:
        if name not in checked:
            checked.add(name)
            assert event_schema.read(invoke(command, [*smaller(command.words), "--json"]))


def load_recipe(block: Block) -> None:
    named = NAMED.match(block.text)
    path = Path(named[1]) if named else Path("part.toml")
    path.parent.mkdir(exist_ok=True)
    text = block.text
    if not named and not re.search(r"^extends\b", text, flags=re.MULTILINE):
        Path("base.toml").write_text(BASE)
        text = f'extends = "base.toml"\n{text}'
    path.write_text(text)
    try:
        recipe.load(path)
    except RecipeError as error:
        pytest.fail(f"{block.where}: {error}")


@pytest.mark.parametrize("left", [LONG, pytest.param((), marks=pytest.mark.slow)])
def test_every_command_recipe_and_python_block_runs_as_shown(
    desk: Path, left: tuple[str, ...]
) -> None:
    ran, checked = set[str](), set[tuple[str, ...]]()
    for page in pages():
        for block in blocks(page):
            if block.language == "python":
                # The newlines put the block's own lines into a traceback.
                text = "\n" * (block.line - 1) + block.text
                exec(compile(text, str(page), "exec"), {})
            elif block.language == "toml":
                load_recipe(block)
            for command in commands(block):
                if command.line not in ran:
                    run_for_a_machine(command, left, checked)
                    run_command(command, left)
                    ran.add(command.line)
    assert (desk / "vectors.parquet").is_file()


def leaves(group: object, *above: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The words of every command of a group and of the groups in it, and its options."""
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from leaves(command, *above, name)
        else:
            yield (*above, name), [flag for option in command.params for flag in option.opts]


def test_every_command_is_shown() -> None:
    shown = [one.words for page in pages() for block in blocks(page) for one in commands(block)]
    missing = [
        " ".join(leaf)
        for leaf, _ in leaves(get_command(app))
        if not any(words[: len(leaf)] == leaf for words in shown)
    ]
    # `make demo` stands for it.
    assert missing == ["demo"]
    assert "make demo" in pages()[0].read_text()


def test_every_shipped_recipe_is_named_and_loads() -> None:
    text = "".join(page.read_text() for page in pages())
    for path in recipe.shipped():
        assert f"`{path.name}`" in text
        assert recipe.load(path).optim.epochs > 0


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_link_file_and_make_target_exists(page: Path) -> None:
    text = page.read_text()
    for link in LINK.findall(text):
        path, _, heading = link.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {link}"
        assert not heading or heading in anchors(linked), f"{page.name} links to {link}"
    for file in re.findall(r"\b(?:btpipe|tests)/[\w/.-]+\.py\b", text):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page.name}: make {target}"
