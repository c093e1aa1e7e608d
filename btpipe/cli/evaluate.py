"""The commands that say what vectors are worth."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from btpipe.cli.options import JUDGE, Json, app, eval_app, writable

if TYPE_CHECKING:
    from btpipe.evaluate.labelled import Labels

LabelList = Annotated[
    Path | None, typer.Option(metavar="CSV", help="Labels of a table by path: path,label.")
]
LabelColumn = Annotated[str, typer.Option(help="Column of the tables that holds the labels.")]


@eval_app.command("knn")
def eval_knn(
    vectors: Annotated[Path, typer.Argument(help="Table whose rows are the neighbours.")],
    test: Annotated[
        Path | None, typer.Option(help="Table whose rows are judged; a share of VECTORS if none.")
    ] = None,
    split: Annotated[
        float, typer.Option(min=0, max=1, help="Share of VECTORS that is judged, without --test.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Which rows the share is.")] = 0,
    k: Annotated[
        list[int] | None,
        typer.Option("-k", "--neighbours", min=1, help="Neighbours that vote; 10, 20, 100, 200."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.001, help="Of the votes' weights.")] = 0.07,
    labels: LabelList = None,
    label_column: LabelColumn = "label",
    as_json: Json = False,
) -> None:
    """Judge vectors by how many test images their nearest neighbours name rightly."""
    from btpipe import progress
    from btpipe.evaluate import knn
    from btpipe.evaluate.labelled import Labels

    with progress.show("json" if as_json else "auto") as on_event:
        judged = knn.judge(
            vectors,
            test,
            k or knn.KS,
            labels=Labels(label_column, labels),
            split=split,
            seed=seed,
            temperature=temperature,
        )
        on_event(judged)


@eval_app.command("select")
def eval_select(
    run: Annotated[Path | None, typer.Argument(help="Run folder; the newest one if none.")] = None,
    by: Annotated[
        Literal["retrieval", "rank", "uniformity", "alignment", "knn"],
        typer.Option(help="What chooses. knn: by the run's labelled images (health.knn)."),
    ] = "retrieval",
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT", help="Images the run has not seen; its own if none."),
    ] = None,
    most: Annotated[int, typer.Option(min=2, help="Images; all checkpoints see the same.")] = 1024,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable, help="X.html or X.png, and X.json beside it; RUN/select.html."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which checkpoint of a run is the best, without labels: needs run.keep_every."""
    from btpipe import progress
    from btpipe.evaluate import checkpoints
    from btpipe.export import contract

    with progress.show("json" if as_json else "auto") as on_event:
        inputs = tuple(images or ())
        checkpoints.run(
            run or contract.newest_run(), on_event, by=by, images=inputs, most=most, out=out
        )


@eval_app.command("linear")
def eval_linear(
    what: Annotated[Path, typer.Argument(help="A table of vectors, or a bundle.")],
    train: Annotated[
        list[str] | None, typer.Argument(metavar="[INPUT]...", help="Bundle: labelled images.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="Table, or bundle: labelled images, to judge on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=writable, help="Score to write; WHAT.linear.json.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Bundle: 0 is the published 100.")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="Bundle: for 256 images; 0 is 0.3.")] = 0,
    devices: Annotated[str, typer.Option(help="Bundle: auto, or how many processes.")] = "auto",
    split: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Table without --test: share that is judged; 0.2."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Table: seed of that share.")] = 0,
    labels: LabelList = None,
    label_column: LabelColumn = "label",
    as_json: Json = False,
) -> None:
    """Train a linear classifier: on a table's vectors by logistic regression, in seconds to
    minutes, or on a bundle's frozen encoder as published, in hours (run again, it goes on).
    """
    from btpipe.evaluate import finetune_job, linear_probe
    from btpipe.evaluate.labelled import Labels

    images, tests = tuple(train or ()), tuple(test or ())
    if finetune_job.is_bundle(what):
        column = label_column != "label"
        tables = {"--split": split is not None, "--seed": seed, "--labels": labels}
        finetune_job.check(images, tests, _set({**tables, "--label-column": column}))
        _linear_on_images(what, images, tests, out, epochs, lr, devices, as_json=as_json)
    else:
        bundles = {"--epochs": epochs, "--lr": lr, "--devices": devices != "auto"}
        linear_probe.check(what, images, tests, _set(bundles))
        test_table = Path(tests[0]) if tests else None
        names = Labels(label_column, labels)
        _linear_on_vectors(what, test_table, out, names, split, seed, as_json=as_json)


def _set(options: Mapping[str, object]) -> list[str]:
    """Names of the options that were used."""
    return [name for name, value in options.items() if value]


def _linear_on_images(
    bundle: Path,
    images: tuple[str, ...],
    tests: tuple[str, ...],
    out: Path | None,
    epochs: int,
    lr: float,
    devices: str,
    *,
    as_json: bool,
) -> None:
    from btpipe.evaluate import finetune_job
    from btpipe.recipe import protocols

    values = {"epochs": epochs, "lr": lr}
    protocol = protocols.LINEAR.model_copy(update={k: v for k, v in values.items() if v})
    score = out or bundle.with_name(f"{bundle.name}.linear.json")
    job = finetune_job.FinetuneRequest("linear", bundle, images, tests, score, protocol)
    finetune_job.judge(job, devices=devices, mode="json" if as_json else "auto")


def _linear_on_vectors(
    vectors: Path,
    test: Path | None,
    out: Path | None,
    labels: "Labels",
    split: float | None,
    seed: int,
    *,
    as_json: bool,
) -> None:
    from btpipe import progress
    from btpipe.evaluate import linear_probe

    score, share = out or linear_probe.score_path(vectors), 0.2 if split is None else split
    with progress.show("json" if as_json else "auto") as on_event:
        judged = linear_probe.judge(
            vectors, test, score, on_event, labels=labels, split=share, seed=seed
        )
        on_event(judged)


@eval_app.command("semisup")
def eval_semisup(
    bundle: Annotated[Path, typer.Argument(help="A bundle; its encoder is tuned.")],
    train: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Labelled images.")],
    test: Annotated[list[str], typer.Option(help="Labelled images to judge on.")],
    percent: Annotated[
        float, typer.Option(min=0.001, max=100, help="Of each class's images.")
    ] = 10.0,
    split: Annotated[
        Path | None, typer.Option(help="Names of the images to take, one a line.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=writable, help="Score to write; BUNDLE.semisup.json.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="0: the published 20.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and of the crops.")] = 0,
    devices: Annotated[str, typer.Option(help="auto, or how many processes.")] = "auto",
    as_json: Json = False,
) -> None:
    """Tune encoder and classifier on a share of the labels, as published; run again, it goes on."""
    from btpipe.evaluate import finetune_job
    from btpipe.recipe import protocols

    settings = {"epochs": epochs, "seed": seed}
    protocol = protocols.SEMISUP.model_copy(update={k: v for k, v in settings.items() if v})
    path = out or bundle.with_name(f"{bundle.name}.semisup.json")
    job = finetune_job.FinetuneRequest(
        "semisup", bundle, tuple(train), tuple(test), path, protocol, percent, split
    )
    finetune_job.judge(job, devices=devices, mode="json" if as_json else "auto")


@app.command(rich_help_panel=JUDGE)
def compare(
    test: Annotated[Path, typer.Option(help="Labelled images that the run has not seen.")],
    run: Annotated[Path | None, typer.Argument(help="Run folder; the newest one if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to keep; RUN/compare.")] = None,
    k: Annotated[int, typer.Option("-k", "--neighbours", min=1, help="Neighbours that vote.")] = 20,
    as_json: Json = False,
) -> None:
    """Judge a run's encoder against its untrained twin, pixels and colours, on labelled images."""
    from btpipe import progress
    from btpipe.evaluate import baselines
    from btpipe.export import contract

    run = run or contract.newest_run()
    with progress.show("json" if as_json else "auto") as on_event:
        judged = baselines.compare(run, test, out or run / "compare", on_event, k=k)
        on_event(judged)
