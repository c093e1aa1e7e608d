"""Makes bundles: weights and models written, compared on real images, published."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import artifact, runtime
from btpipe.data.index import Index, build
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import Report
from btpipe.export import contract, golden, onnx_model, samples, session, verify, weights
from btpipe.export.card import Card
from btpipe.export.contract import (
    FLOAT_MODEL,
    MODELS,
    PRECISIONS,
    Precision,
    newest_bundle,
    newest_run,
)
from btpipe.export.encoder_source import EncoderSource, of_file, of_run
from btpipe.export.samples import Samples
from btpipe.results import Exported

__all__ = ["BundleOptions", "export_file", "export_run", "newest_bundle", "newest_run", "publish"]

LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
"""An SPDX identifier, or a model hub's: apache-2.0, cc-by-nc-4.0, other."""


@dataclasses.dataclass(frozen=True)
class BundleOptions:
    """What a bundle is to hold: fp32 always, the other precisions where asked.

    `float_input`: also the model that takes normalised float32 (n, 3, S, S). `license_name`: what
    the card and the models name; "" leaves it to the owner of the weights.

    Raises:
        UsageError: not the short name of a licence.
    """

    precisions: tuple[Precision, ...] = ("fp32",)
    float_input: bool = False
    license_name: str = ""

    def __post_init__(self) -> None:
        names = [name for name in PRECISIONS if name == "fp32" or name in self.precisions]
        object.__setattr__(self, "precisions", tuple(names))
        if self.license_name and not LICENCE.fullmatch(self.license_name):
            expected = "a short name such as apache-2.0 or cc-by-nc-4.0"
            raise UsageError(f"--license {self.license_name!r}", expected=expected)

    @property
    def models(self) -> list[str]:
        """The files of the models, fp32 first."""
        return [MODELS[name] for name in self.precisions] + [FLOAT_MODEL] * self.float_input


PLAIN = BundleOptions()


def parse_precisions(texts: Sequence[str]) -> tuple[Precision, ...]:
    """("fp32,int8", "fp16") -> the three of them.

    Raises:
        UsageError: a name that is none.
    """
    names = {name.strip() for text in texts for name in text.split(",")}
    if unknown := sorted(names - set(PRECISIONS)):
        expected = f"some of {', '.join(PRECISIONS)}, as in --precision fp32,int8"
        raise UsageError(f"--precision {unknown[0]}", expected=expected)
    return tuple(name for name in PRECISIONS if name in names)


def export_run(
    run: Path,
    out: Path,
    on_event: Report,
    *,
    untrained: bool = False,
    step: int | None = None,
    images: Path | None = None,
    overwrite: bool = False,
    options: BundleOptions = PLAIN,
) -> Path:
    """The bundle `out` from the newest checkpoint of `run`, checked on real images; returns `out`.

    `step`: the checkpoint of that step instead. `untrained`: the network that the run started from,
    with batch norm's statistics measured on its training images. `images`: what to calibrate and
    check on, else the training images.

    Raises:
        UsageError: no run there, no such checkpoint, or no image to check with.
        RefusedError: `out` holds something else, and `overwrite` was not asked for.
        NumericsError: an exported model disagrees with the network; nothing is published.
    """
    source = of_run(run, on_event, untrained=untrained, step=step)
    return _export(source, out, on_event, images=images, overwrite=overwrite, options=options)


def export_file(
    file: Path,
    out: Path,
    on_event: Report,
    *,
    images: Path | None,
    size: int = 224,
    overwrite: bool = False,
    options: BundleOptions = PLAIN,
) -> Path:
    """The bundle `out` from the weights of others, for images of `size` pixels; returns `out`.

    Raises:
        UsageError: no such file, or no image to check with.
        RefusedError: a pickle with more than tensors in it, the weights of no known network, or
            `out` holds something else, and `overwrite` was not asked for.
        NumericsError: an exported model disagrees with the network; nothing is published.
    """
    source = of_file(file, size, on_event)
    return _export(source, out, on_event, images=images, overwrite=overwrite, options=options)


def _export(
    source: EncoderSource,
    out: Path,
    on_event: Report,
    *,
    images: Path | None,
    overwrite: bool,
    options: BundleOptions,
) -> Path:
    started = time.monotonic()
    index = _images(source, images, out)
    origin = {
        **source.origin,
        "encoder": weights.digest(source.encoder.state_dict()),
        "preprocessing": source.preprocessing.record(),
        "models": options.models,
        "license": options.license_name,
    }
    calibrate = "int8" in options.precisions
    if calibrate:
        origin["calibration"] = index.fingerprint
    is_there = _stands(out, origin, overwrite=overwrite)
    if not is_there:
        artifact.sweep(out.parent, out.name)
        chosen = samples.choose(index, source.preprocessing, on_event, calibrate=calibrate)
        publish(source, chosen, out, origin, on_event, options)
    size, models = source.preprocessing.size, tuple(options.models)
    on_event(Exported(time.monotonic() - started, out, size, models, is_there))
    return out


def publish(
    source: EncoderSource,
    chosen: Samples,
    out: Path,
    origin: dict[str, object],
    on_event: Report,
    options: BundleOptions = PLAIN,
) -> None:
    """Writes the bundle, reads it back, and gives it its name if all its models agree.

    Raises:
        NumericsError: one does not; nothing is published.
        MachineError: no space, or no permission.
    """
    described, prepared = source.described, source.preprocessing
    complete = dict(origin)  # the gates join it before the manifest is written
    with artifact.publish(out, contract.KIND, complete) as folder:
        weights.write(source.encoder.state_dict(), prepared, folder / contract.WEIGHTS)
        _write_models(source, chosen, folder, options)
        # The reference is the network that the published weights make, not the one at hand.
        reference = weights.load(folder / contract.WEIGHTS, described)
        vectors = verify.reference(reference, prepared, chosen.pixels)
        gates = _gates(vectors, source, chosen, folder, options)
        on_event(compared := verify.Gates(tuple(gates.values()), runtime.cpu()))
        verify.require(compared, out)
        complete["gates"] = {name: gate.record() for name, gate in gates.items()}
        complete["cpu"] = dataclasses.asdict(compared.cpu)
        shape = (described.backbone, described.stem, vectors.shape[1])
        config = contract.config(*shape, prepared, options.precisions)
        artifact.write_json(folder / contract.CONFIG, config)
        artifact.write_json(folder / contract.PREPROCESSOR, contract.preprocessor(prepared))
        golden.write(folder, prepared, options.precisions)
        card = Card(
            name=out.name,
            source=source,
            dimension=vectors.shape[1],
            origin=complete,
            gates=compared.markdown(),
            calibration=len(chosen.calibration),
        )
        artifact.write_file(folder / contract.CARD, card.text().encode())


def _write_models(
    source: EncoderSource, chosen: Samples, folder: Path, options: BundleOptions
) -> None:
    encoder, prepared, name = source.encoder, source.preprocessing, options.license_name
    for precision in options.precisions:
        path = folder / MODELS[precision]
        if precision == "int8":
            # Its importer takes a second, and parts of onnxruntime that nothing else needs.
            from btpipe.export import quantize  # noqa: PLC0415

            whole = folder / MODELS["fp32"]
            quantize.write(whole, chosen.calibration, prepared, path, license_name=name)
        else:
            onnx_model.write(encoder, prepared, path, precision=precision, license_name=name)
    if options.float_input:
        onnx_model.write_float(encoder, prepared, folder / FLOAT_MODEL, license_name=name)


def _gates(
    vectors: NDArray[np.float32],
    source: EncoderSource,
    chosen: Samples,
    folder: Path,
    options: BundleOptions,
) -> dict[str, verify.Gate]:
    """Each model's gate: fp16 on a GPU where onnxruntime can use one, the others on the CPU."""

    def gate_of(model: str, embed: verify.Embed, precision: Precision, on: str) -> verify.Gate:
        limits = verify.THRESHOLDS[precision]
        return verify.compare(vectors, embed, chosen, limits, model=model, provider=on)

    gates: dict[str, verify.Gate] = {}
    half: session.Device = "auto" if session.is_built_for_gpus() else "cpu"
    for precision in options.precisions:
        name, device = MODELS[precision], half if precision == "fp16" else "cpu"
        opened = session.Session(folder / name, device=device)
        gates[precision] = gate_of(name, opened.run, precision, opened.device)
        if precision == "int8":  # the others sum in float32 whatever is optimised
            opened = session.Session(folder / name, device="cpu", exact=True)
            exact = gate_of(name, opened.run, precision, "cpu, exact sums")
            gates[precision] = dataclasses.replace(gates[precision], exact=exact)
    if options.float_input:
        floats = session.FloatSession(folder / FLOAT_MODEL, source.preprocessing)
        gates["float-nchw"] = gate_of(FLOAT_MODEL, floats.run, "fp32", "cpu")
    return gates


def _images(source: EncoderSource, images: Path | None, out: Path) -> Index:
    """The images to calibrate and check on."""
    if images is not None:
        return build(images)[0]
    if source.index is None:
        raise UsageError(
            "no images to check the export on",
            where=out,
            expected="--images FOLDER, with images like those that it is to embed",
        )
    return source.index


def _stands(out: Path, origin: dict[str, object], *, overwrite: bool) -> bool:
    """Whether `out` is this very export already.

    Raises:
        RefusedError: it is something else that must not be replaced.
    """
    if not out.exists():
        return False
    if not (out / artifact.MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RefusedError(
            "exists and is no bundle", where=out, fix="export under another name with --out"
        )
    fix = "export under another name with --out, or replace it with --overwrite"
    try:
        previous = dict(contract.open_bundle(out).manifest.origin)
    except IntegrityError as error:
        if overwrite:
            return False
        raise RefusedError(f"is damaged or no bundle: {error.what}", where=out, fix=fix) from error
    if all(previous.get(key) == value for key, value in origin.items()):
        return True
    if overwrite:
        return False
    raise RefusedError(f"holds {_named(previous)}", where=out, expected=_named(origin), fix=fix)


def _named(origin: dict[str, object]) -> str:
    """What a bundle is from and what is in it, as far as two of one name may differ."""
    source = (
        f"{origin['source']}"
        if "source" in origin
        else f"run {origin.get('run')} at step {origin.get('step')}"
    )
    models = origin.get("models")
    held = ", ".join(map(str, models)) if isinstance(models, list) else contract.MODEL
    licence = f", licence {origin['license']}" if origin.get("license") else ""
    images = f", calibrated on {origin['calibration']}" if "calibration" in origin else ""
    return f"{source}, encoder {origin.get('encoder')}, {held}{images}{licence}"
