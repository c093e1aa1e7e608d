"""The command line as a process: exit codes and what it says, as a shell sees them."""

import re
import subprocess
import sys
from pathlib import Path

import event_schema
import pytest
from tiny_run import draw_images
from typer.testing import CliRunner

from btpipe import errors
from btpipe.__main__ import main
from btpipe.cli import app
from btpipe.cli.options import PANELS


def btpipe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "btpipe", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_published_recipe_says_where_to_put_the_images(tmp_path: Path) -> None:
    done = btpipe(tmp_path, "pretrain", "recipes/imagenet.toml")
    assert done.returncode == 2
    assert "data/imagenet/train" in done.stderr
    assert "--set data.train=DIR" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optim]\nepoch = 3\n")
    done = btpipe(tmp_path, "pretrain", "mine.toml")
    assert done.returncode == 2
    assert "mine.toml: unknown key optim.epoch" in done.stderr
    assert "did you mean optim.epochs?" in done.stderr
    loaded = "import sys; import btpipe.cli, btpipe.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("export",), "btpipe pretrain"),
        (("embed", "images", "--out", "v.parquet"), "btpipe export"),
        (("embed", "images", "--out", "v.parquet", "--max-bad", "much"), "1%"),
        (("eval", "knn", "v.parquet", "--test", "w.parquet"), "btpipe embed"),
        (("recipe", "show", "imagnet.toml"), "did you mean imagenet.toml?"),
        (("pretrain", "demo.toml", "--devices", "0", "--set", "data.train=images"), "from 1"),
    ],
)
def test_a_mistake_is_answered_by_what_to_do_and_2(
    tmp_path: Path, arguments: tuple[str, ...], fix: str
) -> None:
    draw_images(tmp_path / "images", 2)
    (tmp_path / "exports").mkdir()
    done = btpipe(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert fix in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("verify", "nowhere"), {"kind": "UsageError", "where": "nowhere"}),
        (("plan", "imagnet.toml"), {"kind": "RecipeError", "where": "imagnet.toml"}),
        (("scan", "images", "--limit", "much"), {"kind": "BadParameter"}),
        (("scan", "--depht", "list"), {"kind": "NoSuchOption"}),
        (("scan",), {"kind": "MissingParameter", "what": "Missing argument 'INPUT...'."}),
    ],
)
def test_a_mistake_is_one_line_of_json_for_a_machine(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], error: dict[str, str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert ended.value.code == 2
    written = capsys.readouterr()
    (record,) = event_schema.read(written.out)
    assert {"event": "Error", "code": 2, **error}.items() <= record.items()
    assert record["what"]
    assert not written.err


def test_every_error_has_its_own_exit_code() -> None:
    def below(kind: type[errors.BtpipeError]) -> list[type[errors.BtpipeError]]:
        return [kind, *(c for child in kind.__subclasses__() for c in below(child))]

    codes = {kind.__name__: kind.exit_code for kind in below(errors.BtpipeError)}
    assert errors.__doc__ is not None
    for name, code in codes.items():
        line = next(line for line in errors.__doc__.splitlines() if f"{name} " in line)
        assert f" {code} " in line
    message = str(errors.UsageError("found", where="here", expected="that", fix="do this"))
    assert message == "here: found\nexpected: that\nto do: do this"


def test_help_names_the_extras_that_an_option_needs() -> None:
    for words, extra in ((("embed",), "ray"), (("map",), "map"), (("plot",), "tensorboard")):
        shown = CliRunner().invoke(app, [*words, "--help"], terminal_width=200).output
        assert f"btpipe[{extra}]" in shown


def test_help_lists_every_command_once_in_the_order_of_the_road() -> None:
    shown = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    words = re.findall(r"^(?:╭─ ([\w ]+) ─|│ (\w+)  )", shown, re.MULTILINE)
    expected = [word for panel, names in PANELS.items() for word in (panel, *names)]
    assert [panel or name for panel, name in words] == ["Options", *expected]
    assert expected[:2] == ["Train", "pretrain"]
    registered = [*app.registered_commands, *app.registered_groups]
    assert len(registered) == sum(map(len, PANELS.values()))
