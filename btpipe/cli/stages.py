"""The stages' commands: scan, shard, pretrain, export, embed."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from btpipe.cli.options import (
    EMBED,
    PUBLISH,
    TRAIN,
    ImageColumn,
    Inputs,
    Json,
    MaxBad,
    Overrides,
    Precisions,
    RecipePath,
    Strict,
    app,
    batch_images,
    budget,
    writable,
)
from btpipe.data import limits


@app.command(rich_help_panel=TRAIN)
def scan(
    source: Inputs,
    out: Annotated[
        Path, typer.Option(callback=writable, help="Index to write: NAME.parquet.")
    ] = Path("index.parquet"),
    depth: Annotated[
        Literal["list", "header", "decode"],
        typer.Option(
            help="list: names, bytes and times; no file is opened. header: the first bytes of"
            " each file, thousands a second; pretrain does this by itself. decode: everything is"
            " read, decoded as for training and digested: about 250 photographs of 400 x 533 a"
            " second and core."
        ),
    ] = "header",
    limit: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time to decode one file.")
    ] = limits.DECODE_SECONDS,
    image_column: ImageColumn = "",
    max_bad: MaxBad = "",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Look at every image before training does; run again, it reads only what changed."""
    from btpipe import progress
    from btpipe.data import scan

    allowed = budget(max_bad, strict=strict)
    with progress.show("json" if as_json else "auto") as on_event:
        scan.scan(
            source,
            out,
            on_event,
            depth=depth,
            max_bad=allowed,
            limit_seconds=limit,
            image_column=image_column,
        )


@app.command(rich_help_panel=TRAIN)
def shard(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Images of any kind.")],
    out: Annotated[Path, typer.Option(callback=writable, help="Folder to write.")],
    size: Annotated[
        int, typer.Option(min=1, help="Pixels of the shorter side; nothing is enlarged.")
    ] = 400,
    quality: Annotated[int, typer.Option(min=1, max=95, help="Of the JPEGs.")] = 90,
    shard_bytes: Annotated[str, typer.Option(help="Most bytes in a shard.")] = "256MiB",
    image_column: ImageColumn = "",
    as_json: Json = False,
) -> None:
    """Rewrite images as tar shards of smaller JPEGs; run again, it goes on where it was."""
    from btpipe import progress
    from btpipe.data import index, shard_job

    options = shard_job.ShardOptions(size, quality, shard_job.parse_bytes(shard_bytes))
    with progress.show("json" if as_json else "auto") as on_event:
        listed, rejected = index.build(inputs, on_event, image_column=image_column)
        shard_job.write(listed, rejected, out, options, on_event)


@app.command(rich_help_panel=TRAIN)
def pretrain(
    recipe: RecipePath,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the run; the recipe's name if empty.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    devices: Annotated[
        str, typer.Option(help="auto, or how many GPUs (or CPU processes).")
    ] = "auto",
    init_from: Annotated[
        str, typer.Option(help="Weights to start from; the same as --set network.init_from=...")
    ] = "",
    accept_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Resume with another run.compile or run.precision; the run's log says so.",
        ),
    ] = None,
    sbatch: Annotated[
        Path | None,
        typer.Option(
            callback=writable, metavar="FILE", help="Write a SLURM job file; start nothing."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, with --sbatch.")] = 1,
    time: Annotated[str, typer.Option(help="Longest run time, with --sbatch: 1-12:00:00.")] = "",
    partition: Annotated[str, typer.Option(help="SLURM partition, with --sbatch.")] = "",
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images. Run again, it goes on from its last checkpoint."""
    from btpipe import events, progress
    from btpipe.recipe import load

    start = [f"network.init_from={json.dumps(init_from)}"] if init_from else []
    settings = [*(overrides or ()), *start]
    described = load(recipe, settings)
    from btpipe.pretrain import changes, launch
    from btpipe.pretrain.sbatch import SlurmJob, write

    run = runs / (name or recipe.stem)
    mode: progress.Mode = "json" if as_json else "auto"
    accepted = tuple(accept_change or ())
    job = SlurmJob(nodes, devices, time, partition)
    changes.require_acceptable(accepted)
    if sbatch is not None:
        pairs = [word for setting in settings for word in ("--set", setting)]
        pairs += [word for key in accepted for word in ("--accept-change", key)]
        folders = ["--name", run.name, "--runs", str(runs)]
        words = ["pretrain", str(recipe), *pairs, *folders, *(["--json"] if as_json else [])]
        write(sbatch, run.name, described, words, job)
        with progress.show(mode) as on_event:
            on_event(events.Note(f"{sbatch} is written: sbatch {sbatch}"))
        return
    job.require_default()
    launch.pretrain(run, described, devices=devices, mode=mode, accepted=accepted)


@app.command(rich_help_panel=PUBLISH)
def export(
    run: Annotated[Path | None, typer.Argument(help="Run folder; the newest one if none.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Always written; accepted.")] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Always written; accepted.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(callback=writable, help="Bundle to write; exports/NAME.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Images to calibrate and check on; the run's own if none."),
    ] = None,
    precision: Precisions = None,
    onnx_input: Annotated[
        Literal["uint8-nhwc", "float-nchw"],
        typer.Option(help="float-nchw: also a model that takes normalised floats (fastembed)."),
    ] = "uint8-nhwc",
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Weights of others instead of a run."),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Pixels of the images, with --from.")] = 224,
    license_name: Annotated[
        str, typer.Option("--license", help="Of the weights, for the card: apache-2.0.")
    ] = "",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="The network before training: the baseline.")
    ] = False,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Of a checkpoint that the run kept; the newest if none."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another bundle of that name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish an encoder as ONNX and safetensors, if all of it agrees on real images."""
    from btpipe import progress
    from btpipe.errors import UsageError
    from btpipe.export import bundle

    del onnx, safetensors  # a bundle always holds both
    options = bundle.BundleOptions(
        bundle.parse_precisions(precision or ()), onnx_input == "float-nchw", license_name
    )
    with progress.show("json" if as_json else "auto") as on_event:
        if from_file is not None:
            if run is not None or untrained or step is not None:
                raise UsageError("--from FILE beside a run", expected="one of the two")
            bundle.export_file(
                from_file,
                out or Path("exports") / from_file.stem,
                on_event,
                images=images,
                size=size,
                overwrite=overwrite,
                options=options,
            )
            return
        if untrained and step is not None:
            raise UsageError("--untrained beside --step", expected="one of the two")
        run = run or bundle.newest_run()
        kind = "-untrained" if untrained else "" if step is None else f"-step-{step}"
        out = out or Path("exports") / f"{run.name}{kind}"
        bundle.export_run(
            run,
            out,
            on_event,
            untrained=untrained,
            step=step,
            images=images,
            overwrite=overwrite,
            options=options,
        )


@app.command(rich_help_panel=EMBED)
def embed(
    source: Inputs,
    out: Annotated[
        Path,
        typer.Option(help="NAME.parquet, .npy, .safetensors, .lance, or a folder without ending."),
    ],
    model: Annotated[Path | None, typer.Option(help="Bundle; the newest export if none.")] = None,
    engine: Annotated[
        Literal["auto", "onnx", "torch"],
        typer.Option(help="auto: onnx, and torch for an earlier layer."),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16", "int8"],
        typer.Option(
            help="auto: what the table there has; else with onnx on a GPU fp16 if the bundle has it"
            " and its golden images agree, or tf32, on a CPU int8 if it has it, or fp32; with torch"
            " bf16 if the hardware has it."
        ),
    ] = "auto",
    layer: Annotated[
        Literal["pooled", "layer1", "layer2", "layer3", "layer4"],
        typer.Option(help="An earlier stage's mean over its positions: with torch."),
    ] = "pooled",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Vectors of length 1 (L2).")
    ] = False,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Numbers in the table.")
    ] = "float32",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Images in one call of the network: auto, or a number.")
    ] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Processes, each with its share of the cores; 0: one for each GPU, or one."
        ),
    ] = 0,
    cluster: Annotated[
        Literal["none", "ray"],
        typer.Option(
            help="ray: workers on all machines of the Ray cluster in RAY_ADDRESS, or of one started"
            " here; one for each GPU, or machine. Needs btpipe\\[ray]."
        ),
    ] = "none",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N shares, from 0; see merge.")
    ] = "",
    limit: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time to decode one file.")
    ] = limits.DECODE_SECONDS,
    image_column: ImageColumn = "",
    max_bad: MaxBad = "",
    strict: Strict = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace vectors of another bundle.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check all of a finished table; mend what is damaged.")
    ] = False,
    retry_rejects: Annotated[
        bool, typer.Option("--retry-rejects", help="Try all rejects of a finished table again.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Drop rows not listed any more, however many."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed every image of the inputs into a parquet table; run again, it goes on where it was.

    A changed input costs only what is new or changed. The input - is a list on standard input.
    """
    from btpipe import progress
    from btpipe.embed import job
    from btpipe.embed.precisions import EncoderConfig
    from btpipe.export import contract

    options = job.JobOptions(
        batch_size=batch_images(batch_size),
        workers=workers,
        cluster=cluster,
        max_bad=budget(max_bad, strict=strict),
        dtype=dtype,
        shard=shard,
        overwrite=overwrite,
        repair=repair,
        limit_seconds=limit,
        image_column=image_column,
        retry_rejects=retry_rejects,
        prune=prune,
    )
    bundle = model or contract.newest_bundle()
    encoder = EncoderConfig(bundle, device, engine, precision, layer, normalize)
    with progress.show("json" if as_json else "auto") as on_event:
        job.embed(source, out, encoder, on_event, options)


@app.command(rich_help_panel=EMBED)
def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="TABLE...", help="What embed --shard wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Table to write: NAME.parquet.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace vectors of another bundle.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Join the tables of all shards into the table that one job would have made."""
    from btpipe import progress
    from btpipe.embed import merging

    with progress.show("json" if as_json else "auto") as on_event:
        merging.merge(shards, out, on_event, overwrite=overwrite)
