"""The README is true: every command and every Python block in it runs as shown, in its order."""

import re
import shlex
from pathlib import Path

import pytest
from tiny_run import draw_images
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from btpipe import recipe
from btpipe.cli import app

README = Path(__file__).parent.parent / "README.md"
SMALL = """
[data]
batch_size = 8
image_size = 32
[network]
backbone = "resnet18"
projector = [16, 16]
[optim]
epochs = {epochs}
warmup_epochs = 1
"""


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for language, text in blocks() if language == "sh" for line in text.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("btpipe ")]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader sits: images, and recipes of the same names that end in seconds."""
    draw_images(tmp_path / "images", 20)
    draw_images(tmp_path / "held-out", 10)
    for name, path in (("a.jpg", "a/000.jpg"), ("b.jpg", "b/001.jpg")):
        (tmp_path / name).write_bytes((tmp_path / "images" / path).read_bytes())
    (tmp_path / "recipes").mkdir()
    for name in ("folder.toml", "imagenet.toml"):
        (tmp_path / "recipes" / name).write_text(SMALL.format(epochs=2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_and_python_block_runs_as_shown(desk: Path) -> None:
    runner, ran = CliRunner(), 0
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(README), "exec"), {})
            ran += 1
        for line in text.splitlines() if language == "sh" else ():
            command = line.partition("#")[0].strip()
            if not command.startswith("btpipe "):
                continue
            result = runner.invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
            ran += 1
    assert ran == len(commands()) + 2
    assert (desk / "vectors.parquet").is_file()
    assert (desk / "exports" / "shoes" / "encoder.onnx").is_file()


def test_every_command_is_in_the_readme() -> None:
    shown = {tuple(shlex.split(line)[1:3]) for line in commands()}
    text = README.read_text()
    commands_of_app = get_command(app)
    assert isinstance(commands_of_app, TyperGroup)
    for name, command in commands_of_app.commands.items():
        if isinstance(command, TyperGroup):
            assert {(name, below) for below in command.commands} <= shown
        else:
            assert f"btpipe {name}" in text or f"make {name}" in text, name


def test_every_shipped_recipe_is_in_the_readme_and_loads() -> None:
    text = README.read_text()
    for path in recipe.shipped():
        assert f"`{path.name}`" in text
        assert recipe.load(path).optim.epochs > 0


def test_every_link_and_make_target_exists() -> None:
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / link).exists(), link
