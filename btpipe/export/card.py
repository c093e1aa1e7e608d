"""The model card: what a person reads before using a bundle."""

import dataclasses

from btpipe import __version__
from btpipe.export.contract import MODEL, WEIGHTS, Preprocessing

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


@dataclasses.dataclass(frozen=True)
class Card:
    """What the card is filled with. Digests are sha256 in hex."""

    name: str
    architecture: str
    stem: str
    dimension: int
    preprocessing: Preprocessing
    run: str
    step: int
    trained: bool
    recipe_digest: str
    recipe_toml: str
    data_fingerprint: str
    images: int
    checkpoint: str
    encoder_digest: str
    gate_table: str

    def text(self) -> str:
        """The card in Markdown, with the front matter that model hubs read."""
        parts = [self._front_matter(), self._summary(), self._use(), self._origin()]
        parts.append(f"## Recipe\n\n```toml\n{self.recipe_toml.strip()}\n```\n")
        return "\n".join(parts)

    def _front_matter(self) -> str:
        tags = "\n".join(f"  - {tag}" for tag in ("feature-extraction", "barlow-twins", "btpipe"))
        return (
            "---\n"
            "license: other\n"
            "license_name: to-be-chosen-by-the-owner-of-the-weights\n"
            "pipeline_tag: image-feature-extraction\n"
            f"tags:\n{tags}\n---\n"
        )

    def _summary(self) -> str:
        made = (
            f"trained by Barlow Twins for {self.step} steps on {self.images} images"
            if self.trained
            else "as initialised, with batch norm's statistics measured on training images:"
            " a baseline to compare trained encoders with"
        )
        return (
            f"# {self.name}\n\n"
            f"A {self.architecture} encoder (stem: {self.stem}), {made}.\n"
            f"It turns an image into a vector of {self.dimension} numbers.\n\n"
            "Intended use: search, grouping, near-duplicates and simple classifiers on images\n"
            "like those it was trained on. Not intended for decisions about people; what its\n"
            "training images leave out or overstate, its vectors do too. The licence is for the\n"
            "owner of the training images and weights to choose.\n"
        )

    def _use(self) -> str:
        size, resize = self.preprocessing.size, self.preprocessing.resize
        small = self.stem == "small"
        used = HOW_TO_USE.format(
            name=self.name,
            dimension=self.dimension,
            architecture=self.architecture,
            stem=SMALL_STEM if small else "",
            weights=WEIGHTS,
            model=MODEL,
            size=size,
            timm=" (timm has no network with this stem: only the files beside it)" if small else "",
        )
        return (
            f"## Use\n\n{used}\nPreprocessing: turned as EXIF says, shorter side to {resize}"
            f" pixels ({self.preprocessing.interpolation}, antialiased), centre {size} x {size},"
            f" pixels / 255"
            f" minus {list(self.preprocessing.mean)}, over {list(self.preprocessing.std)}.\n"
        )

    def _origin(self) -> str:
        return (
            "## Agreement of torch and onnxruntime\n\n"
            f"{self.gate_table}\n\n"
            "## Origin\n\n"
            "| | |\n|---|---|\n"
            f"| run, step | {self.run}, {self.step} |\n"
            f"| recipe | {self.recipe_digest} |\n"
            f"| training images | {self.images}, {self.data_fingerprint} |\n"
            f"| checkpoint | {self.checkpoint or 'none'} |\n"
            f"| encoder's tensors | {self.encoder_digest} |\n"
            f"| made by | btpipe {__version__} |\n"
        )
