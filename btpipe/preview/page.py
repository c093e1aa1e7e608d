"""The views of images as one page of HTML with all that was drawn; nothing in it is loaded."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from btpipe import artifact
from btpipe.preview.samples import Sample, SampleView, color

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --muted: #666; --paper: #fff; --frame: #ececec;
  --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --muted: #9a9a9a; --paper: #161616;
  --frame: #262626; --line: #333; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--paper);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; }
.sub { color: var(--muted); margin: 0 0 20px; }
.sample { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px;
  padding: 20px 0; border-top: 1px solid var(--line); }
@media (max-width: 720px) { .sample { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; min-width: 0; }
.frame { aspect-ratio: 1; background: var(--frame); display: grid; place-items: center; }
.frame svg, .frame img { display: block; width: 100%; height: 100%; object-fit: contain; }
.small { image-rendering: pixelated; }
figcaption { margin: 8px 0 4px; font-weight: 600; overflow-wrap: anywhere; }
.view figcaption { color: color-mix(in srgb, var(--view) 75%, var(--ink)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; color: var(--muted); padding: 1px 12px 1px 0;
  white-space: nowrap; vertical-align: top; width: 1%; }
td { padding: 1px 0; overflow-wrap: anywhere; }
.off td { color: var(--muted); }
.halo, .edge { fill: none; vector-effect: non-scaling-stroke; }
.halo { stroke: #fff; stroke-width: 5; } .edge { stroke: var(--view); stroke-width: 2.5; }
details { margin-top: 16px; } pre { background: var(--frame); padding: 12px; overflow-x: auto; }
"""
NOTHING = "no"


def write_page(path: Path, samples: Sequence[Sample], title: str, about: str, recipe: str) -> None:
    """Writes the page; `recipe` is the resolved one as TOML.

    Raises:
        MachineError: no space, or no permission.
    """
    body = "\n".join(_sample(sample) for sample in samples)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="sub">{html.escape(about)}</p>\n{body}\n'
        f"<details><summary>The recipe, resolved</summary><pre>{html.escape(recipe)}</pre>"
        "</details>\n</body>\n</html>\n"
    )
    artifact.write_file(path, page.encode())


def numbers(view: SampleView) -> list[tuple[str, str]]:
    """(what, what was drawn) of a view, in the order in which it happens."""
    signs = {"hue": "+"}
    factors = [(name, f"{value:{signs.get(name, '')}.4f}") for name, value in view.factors]
    return [
        ("crop", f"{view.width} x {view.height} at {view.left}, {view.top}"),
        ("of the image", f"{view.share:.1%}, ratio {view.width / view.height:.3f}"),
        ("flip", "yes" if view.flip else NOTHING),
        ("vertical flip", "yes" if view.vertical_flip else NOTHING),
        ("turn", f"{90 * view.turns}\u00b0" if view.turns else NOTHING),
        *(factors or [("jitter", NOTHING)]),
        ("gray", "yes" if view.gray else NOTHING),
        ("blur", f"sigma {view.sigma:.3f} pixels" if view.sigma else NOTHING),
        ("solarize", "yes" if view.solarize else NOTHING),
    ]


def _sample(sample: Sample) -> str:
    views = "\n".join(_view(view, number + 1) for number, view in enumerate(sample.views))
    size = f"{sample.width} x {sample.height}"
    return (
        f'<section class="sample">\n<figure><div class="frame">{_original(sample)}</div>'
        f"<figcaption>{html.escape(sample.path)}</figcaption>{_table([('size', size)])}</figure>\n"
        f"{views}\n</section>"
    )


def _original(sample: Sample) -> str:
    """The image with the crops over it, in its own pixels' numbers."""
    width, height = sample.width, sample.height
    boxes = []
    for number, view in enumerate(sample.views):
        box = f'x="{view.left}" y="{view.top}" width="{view.width}" height="{view.height}"'
        boxes += [
            f'<rect class="halo" {box}/>',
            f'<rect class="edge" style="--view:{color(number)}" {box}/>',
        ]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="original with crops">'
        f'<image href="{_embedded(sample.original, "JPEG")}" width="{width}" height="{height}"/>'
        f"{''.join(boxes)}</svg>"
    )


def _view(view: SampleView, number: int) -> str:
    small = ' class="small"' if len(view.pixels) < 160 else ""
    source = _embedded(Image.fromarray(view.pixels), "PNG")
    return (
        f'<figure class="view" style="--view:{color(number - 1)}"><div class="frame">'
        f'<img{small} alt="view {number}" src="{source}"></div>'
        f"<figcaption>view {number}</figcaption>{_table(numbers(view))}</figure>"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    off = {True: ' class="off"', False: ""}
    lines = [
        f"<tr{off[value == NOTHING]}><th>{name}</th><td>{value}</td></tr>" for name, value in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _embedded(picture: Image.Image, kind: str) -> str:
    content = io.BytesIO()
    picture.save(content, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
