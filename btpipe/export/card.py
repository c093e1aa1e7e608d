"""The model card: what a person reads before using a bundle."""

import dataclasses
from collections.abc import Mapping

from btpipe import __version__
from btpipe.export.contract import FLOAT_MODEL, MODEL, MODELS, WEIGHTS
from btpipe.export.encoder_source import EncoderSource

HOW_TO_USE = """\
```python
import btpipe

encoder = btpipe.load("{name}")
vectors = encoder.embed(["a.jpg", "b.jpg"])  # (2, {dimension}) float32
```

```python
import safetensors.torch, torch, torchvision

network = torchvision.models.{architecture}()
network.fc = torch.nn.Identity(){stem}
network.load_state_dict(safetensors.torch.load_file("{weights}"))
```

`{model}` takes `images`, uint8 (n, {size}, {size}, 3) in RGB, and gives `embedding`, float32
(n, {dimension}); it normalises inside. `timm.create_model("local-dir:{name}", pretrained=True)`
and Hugging Face's image processors read the other files{timm}.
"""

SMALL_STEM = """
network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
network.maxpool = torch.nn.Identity()"""

OTHERS = {
    MODELS["fp16"]: "the same in half precision, for GPUs: as fp32 a CPU computes it no faster",
    MODELS[
        "int8"
    ]: "the same in int8, for CPUs, calibrated on {calibration} images; no CPU clips its sums",
    FLOAT_MODEL: "without the normalisation: takes normalised float32 (n, 3, {size}, {size})",
}

ORIGIN = {
    "run": "run",
    "step": "step",
    "recipe": "recipe",
    "changes": "changed on the way",
    "images": "training images",
    "data": "training images' fingerprint",
    "checkpoint": "checkpoint",
    "source": "file",
    "sha256": "file's sha256",
    "matched": "tensors taken from it",
    "left_out": "left out of it",
    "encoder": "encoder's tensors",
}
"""Keys of a manifest's origin that the card shows, and what it calls them."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What the card is filled with; `origin` is the manifest's, `gates` a table in Markdown."""

    name: str
    source: EncoderSource
    dimension: int
    origin: Mapping[str, object]
    gates: str
    calibration: int

    def text(self) -> str:
        """The card in Markdown, with the front matter that model hubs read."""
        parts = [self._front_matter(), self._summary(), self._use(), self._origin()]
        toml = self.source.recipe_toml.strip()
        parts += [f"## Recipe\n\n```toml\n{toml}\n```\n"] if toml else []
        return "\n".join(parts)

    def _front_matter(self) -> str:
        tags = ["feature-extraction", "btpipe"]
        tags += ["barlow-twins"] if "run" in self.origin else []
        unknown = "other\nlicense_name: to-be-chosen-by-the-owner-of-the-weights"
        return (
            f"---\nlicense: {self.origin['license'] or unknown}\n"
            "pipeline_tag: image-feature-extraction\n"
            f"tags:\n{chr(10).join(f'  - {tag}' for tag in tags)}\n---\n"
        )

    def _summary(self) -> str:
        described = self.source.described
        licence = (
            f"Licence: {self.origin['license']}."
            if self.origin["license"]
            else "The licence is for the owner of the training images and weights to choose."
        )
        return (
            f"# {self.name}\n\n"
            f"A {described.backbone} encoder (stem: {described.stem}), {self.source.provenance}.\n"
            f"It turns an image into a vector of {self.dimension} numbers.\n\n"
            "Intended use: search, grouping, near-duplicates and simple classifiers on images\n"
            "like those it was trained on. Not intended for decisions about people; what its\n"
            "training images leave out or overstate, its vectors do too.\n"
            f"{licence}\n"
        )

    def _use(self) -> str:
        prepared, described = self.source.preprocessing, self.source.described
        small = described.stem == "small"
        size = prepared.size
        used = HOW_TO_USE.format(
            name=self.name,
            dimension=self.dimension,
            architecture=described.backbone,
            stem=SMALL_STEM if small else "",
            weights=WEIGHTS,
            model=MODEL,
            size=size,
            timm=" (timm has no network with this stem: only the files beside it)" if small else "",
        )
        models = self.origin["models"]
        assert isinstance(models, list)
        others = "".join(
            f"* `{name}`: {OTHERS[name].format(calibration=self.calibration, size=size)}.\n"
            for name in models
            if name in OTHERS
        )
        return (
            f"## Use\n\n{used}\n{others}\n"
            f"Preprocessing: turned as EXIF says, shorter side to {prepared.resize}"
            f" pixels ({prepared.interpolation}, antialiased), centre {size} x {size},"
            f" pixels / 255 minus {list(prepared.mean)}, over {list(prepared.std)}.\n"
            "`golden/` holds drawn images and their vectors, to check another machine with.\n"
        )

    def _origin(self) -> str:
        facts = {name: self.origin[key] for key, name in ORIGIN.items() if self.origin.get(key)}
        rows = "".join(f"| {name} | {fact} |\n" for name, fact in facts.items())
        return (
            "## Agreement of torch and onnxruntime\n\n"
            f"{self.gates}\n\n"
            "## Origin\n\n"
            f"| | |\n|---|---|\n{rows}| made by | btpipe {__version__} |\n"
        )
