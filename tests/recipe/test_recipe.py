"""A recipe is read whole or refused with its file, the key and what was meant."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from btpipe import recipe
from btpipe.errors import RecipeError
from btpipe.recipe.tables import Added

PACKAGE = Path(recipe.__file__).parent


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """What `load` says when it refuses."""
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert recipe.load(write(tmp_path / "a.toml", "")) == recipe.Recipe()


def test_an_unknown_key_is_refused_with_file_path_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[optim]\nepoch = 3\n")
    message = refusal(path)
    assert message.startswith(f"{path}: unknown key optim.epoch")
    assert "did you mean optim.epochs?" in message
    assert "weight_decay" in message  # the keys that exist


def test_a_key_in_the_wrong_table_is_sent_to_the_right_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[optim]\nbatch_size = 256\n")
    assert "did you mean data.batch_size?" in refusal(path)


def test_an_unknown_key_deep_in_a_view_is_named_with_its_index(tmp_path: Path) -> None:
    view = "[[views]]\n[views.blur]\nprobabilty = 0.5\n[[views]]\n"
    message = refusal(write(tmp_path / "a.toml", view))
    assert "unknown key views.0.blur.probabilty" in message
    assert "did you mean views.0.blur.probability?" in message


def test_an_unknown_key_of_the_base_is_blamed_on_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.toml", "[los]\nlambd = 0.1\n")
    top = write(tmp_path / "top.toml", 'extends = "base.toml"\n')
    message = refusal(top)
    assert message.startswith(f"{base}: unknown key los")
    assert "did you mean loss?" in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[optim]\nepochs = "ten"\n', "optim.epochs"),
        ("[optim]\nepochs = 10.5\n", "optim.epochs"),
        ("[optim]\nlr = true\n", "optim.lr"),
        ("[run]\ndeterministic = 1\n", "run.deterministic"),
        ("[network]\nprojector = 8192\n", "network.projector"),
        ('[network]\nbackbone = "resnet51"\n', "network.backbone"),
        ("seed = -1\n", "seed"),
        ("[optim]\nlr = 0.0\n", "optim.lr"),
        ("[optim]\nlr = inf\n", "optim.lr"),
        ("[optim]\nlr = nan\n", "optim.lr"),
        ("[data]\nmax_bad = 1.5\n", "data.max_bad"),
        ("[data]\nbatch_size = 1\n", "data.batch_size"),
        ("[network]\nprojector = []\n", "network.projector"),
        ("[[views]]\n", "views"),
        ("[[views]]\nscale = [0.5, 0.1]\n[[views]]\n", "views.0.scale"),
        ("[[views]]\n[[views]]\nscale = [0.5, 1.1]\n", "views.1.scale"),
        ("[optim]\nepochs = 10\nwarmup_epochs = 10\n", "optim.warmup_epochs"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(
    tmp_path: Path, text: str, key: str
) -> None:
    path = write(tmp_path / "a.toml", text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert key in message


def test_a_duplicate_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[optim]\nlr = 0.1\nlr = 0.2\n")
    message = refusal(path)
    assert str(path) in message
    assert "line 3" in message


def test_extends_merges_tables_and_replaces_arrays(tmp_path: Path) -> None:
    write(
        tmp_path / "base.toml",
        "[optim]\nlr = 0.1\nepochs = 50\n[network]\nprojector = [64, 64, 64]\n",
    )
    top = 'extends = "base.toml"\n[optim]\nepochs = 70\n[network]\nprojector = [32]\n'
    loaded = recipe.load(write(tmp_path / "top.toml", top))
    assert (loaded.optim.lr, loaded.optim.epochs) == (0.1, 70)
    assert loaded.network.projector == (32,)


def test_extends_reaches_a_shipped_recipe_from_any_folder(tmp_path: Path) -> None:
    top = write(tmp_path / "mine.toml", 'extends = "imagenet.toml"\n[optim]\nepochs = 300\n')
    loaded = recipe.load(top)
    assert loaded.optim.reference_world_size == 32
    assert loaded.optim.epochs == 300


def test_the_name_of_a_preset_stands_for_its_views(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", 'views = "simclr"\n')
    loaded = recipe.load(path)
    first, second = loaded.views
    assert first == second
    assert (first.jitter.brightness, first.jitter.hue) == (0.8, 0.2)
    assert (first.blur.probability, first.solarize.probability) == (0.5, 0.0)
    explicit = write(tmp_path / "b.toml", loaded.to_toml())
    assert "simclr" not in explicit.read_text()
    assert recipe.load(explicit) == loaded
    assert recipe.load(explicit).digest == loaded.digest


def test_the_preset_of_barlow_twins_is_what_the_published_recipe_spells_out(
    tmp_path: Path,
) -> None:
    for name in ("barlow-twins", "byol"):
        path = write(tmp_path / "a.toml", f'views = "{name}"\n')
        assert recipe.load(path).views == recipe.load(Path("imagenet.toml")).views


def test_a_preset_replaces_views_and_views_replace_a_preset(tmp_path: Path) -> None:
    named = recipe.load(Path("imagenet.toml"), ["views=simclr"])
    assert named.views[0].jitter.saturation == 0.8
    base = write(tmp_path / "base.toml", 'views = "simclr"\n')
    top = write(tmp_path / "top.toml", f'extends = "{base.name}"\n[[views]]\n[[views]]\n')
    assert recipe.load(top).views[0] == recipe.View()


def test_views_may_be_many_and_small(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[[views]]\n[[views]]\n[[views]]\nsize = 96\n")
    loaded = recipe.load(path)
    assert loaded.view_sizes == (224, 224, 96)
    assert loaded.pairs == ((0, 1), (0, 2), (1, 2))
    again = write(tmp_path / "b.toml", loaded.to_toml())
    assert recipe.load(again) == loaded


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("[[views]]\n", "at least 2"),
        ("[[views]]\nsize = 96\n[[views]]\nsize = 96\n", "none has full size"),
        ("[[views]]\n[[views]]\nsize = 300\n", "views.1.size: 300 is not 0 or from 16"),
        ("[[views]]\n[[views]]\nsize = 8\n", "views.1.size: 8 is not 0 or from 16"),
    ],
)
def test_views_that_cannot_be_compared_are_refused(
    tmp_path: Path, views: str, message: str
) -> None:
    assert message in refusal(write(tmp_path / "a.toml", views))


def test_an_unknown_preset_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", 'views = "simclr2"\n')
    message = refusal(path)
    assert message.startswith(f"{path}: views = 'simclr2'")
    assert "one of barlow-twins, byol, simclr" in message
    assert "did you mean simclr?" in message


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'extends = "b.toml"\n')
    write(tmp_path / "b.toml", 'extends = "a.toml"\n')
    assert "extends itself" in refusal(tmp_path / "a.toml")


def test_a_base_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "imagenett.toml" in refusal(write(tmp_path / "a.toml", 'extends = "imagenett.toml"\n'))


def test_set_comes_last_and_reads_toml_values_and_bare_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "[optim]\nlr = 0.1\n")
    overrides = ["optim.lr=0.3", "data.train=my images/x", "network.projector=[16, 16]", "seed = 4"]
    loaded = recipe.load(path, overrides)
    assert loaded.optim.lr == 0.3
    assert loaded.data.train == "my images/x"
    assert loaded.network.projector == (16, 16)
    assert loaded.seed == 4
    assert recipe.load(path, ["seed=1", "seed=2"]).seed == 2


def test_an_override_that_is_wrong_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "")
    assert refusal(path, "optim.epoch=3").startswith("--set optim.epoch=3: unknown key")
    assert refusal(path, "optim.epochs=ten").startswith("--set optim.epochs=ten: ")
    assert "--set table.key=value" in refusal(path, "optim.epochs")


def test_a_recipe_that_does_not_exist_suggests_the_nearest_shipped_one(tmp_path: Path) -> None:
    message = refusal(Path("recipes/imagnet.toml"))
    assert "no such recipe" in message
    assert "did you mean imagenet.toml?" in message


def test_a_shipped_recipe_is_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = recipe.load(Path("imagenet"))
    assert recipe.load(Path("recipes/imagenet.toml")) == expected


@pytest.mark.parametrize("content", [b"[optim", b"\xff\xfe\x00", None])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("path", recipe.shipped(), ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_comes_back_equal_from_its_own_toml(
    path: Path, tmp_path: Path
) -> None:
    loaded = recipe.load(path)
    again = recipe.load(write(tmp_path / "resolved.toml", loaded.to_toml()))
    assert again == loaded
    assert again.digest == loaded.digest


def test_the_recipes_that_the_readme_names_are_shipped() -> None:
    names = {path.stem for path in recipe.shipped()}
    expected = {"imagenet", "imagenet-300ep", "imagenet-1gpu", "imagenet100", "cifar10", "folder"}
    assert expected <= names


def test_the_defaults_are_the_published_run_but_for_its_gpus() -> None:
    published = recipe.load(Path("imagenet"))
    same = {"optim.reference_world_size": 1, "data.train": "", "seed": 0}
    assert {**published.decisive(), **same} == recipe.Recipe().decisive()


def test_a_run_has_the_whole_batches_of_each_epoch() -> None:
    data, optim = recipe.Data(batch_size=8), recipe.Optim(epochs=3, warmup_epochs=1)
    chosen = recipe.Recipe(data=data, optim=optim)
    assert (chosen.steps_per_epoch(26), chosen.steps(26)) == (3, 9)
    assert chosen.steps(7) == 0


def test_the_digest_ignores_bookkeeping_and_sees_everything_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", "")
    digest = recipe.load(path).digest
    values = {"health.knn": '"./labelled"', "data.max_bad": "0.7", "run.memory_budget": "0.7"}
    for key in recipe.BOOKKEEPING:
        value = values.get(key, "7")
        assert recipe.load(path, [f"{key}={value}"]).digest == digest
    for override in ("seed=1", "optim.lr=0.3", "run.precision=fp64", "data.batch_size=64"):
        assert recipe.load(path, [override]).digest != digest


class LaterView(recipe.View):
    erased: Annotated[float, Added("0.3")] = 0.0


class LaterOptim(recipe.Optim):
    restarts: Annotated[int, Added("0.3")] = 0


class LaterRecipe(recipe.Recipe):
    optim: LaterOptim = LaterOptim()
    views: tuple[LaterView, ...] = (LaterView(), LaterView())
    ema: Annotated[recipe.Solarize, Added("0.3")] = recipe.Solarize()


def test_a_key_that_came_later_enters_the_digest_where_it_differs_from_its_default() -> None:
    views = (recipe.View(), recipe.View())
    digest = recipe.Recipe(views=views).digest
    assert LaterRecipe().digest == digest
    changed = (
        LaterRecipe(optim=LaterOptim(restarts=1)),
        LaterRecipe(views=(LaterView(), LaterView(erased=0.5))),
        LaterRecipe(ema=recipe.Solarize(probability=0.3)),
        LaterRecipe(optim=LaterOptim(epochs=70)),
    )
    assert len({digest, *(one.digest for one in changed)}) == 5


def test_every_bookkeeping_key_exists() -> None:
    assert set(recipe.Recipe().decisive()).isdisjoint(recipe.BOOKKEEPING)
    for key in recipe.BOOKKEEPING:
        table, name = key.split(".")
        assert name in type(getattr(recipe.Recipe(), table)).model_fields


def numeric_defaults(source: str, names: set[str]) -> list[str]:
    """Functions of a module that give a hyperparameter a number of their own."""
    functions = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        positional = node.args.args[len(node.args.args) - len(node.args.defaults) :]
        pairs = [
            *zip(positional, node.args.defaults, strict=True),
            *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
        ]
        functions += [
            f"{node.name}({argument.arg}={default.value})"
            for argument, default in pairs
            if argument.arg in names
            and isinstance(default, ast.Constant)
            and isinstance(default.value, int | float)
        ]
    return functions


def test_no_function_of_a_training_stage_has_a_default_for_a_hyperparameter() -> None:
    names = {path.split(".")[-1] for path in recipe.Recipe().decisive()}
    assert numeric_defaults("def f(z, lambd=0.005, *, eta=1.0): ...", names) == [
        "f(lambd=0.005)",
        "f(eta=1.0)",
    ]
    for path in [*PACKAGE.glob("data/*.py"), *PACKAGE.glob("pretrain/*.py")]:
        assert numeric_defaults(path.read_text(), names) == [], path


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, btpipe.recipe; assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
