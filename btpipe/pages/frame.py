"""The frame of every page that explore writes: one HTML file, light and dark, nothing loaded."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

from btpipe import artifact

THUMBNAIL_SIDE = 160
"""Pixels of a thumbnail's longer side."""
THUMBNAIL_QUALITY = 80
THUMBNAIL_BYTES = 20_000_000
"""What the thumbnails of one page may take, as text in it."""

POLICY = (
    "default-src 'none'; img-src data: blob: file:; font-src data:;"
    " style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
"""What a browser may load for the page: what stands in it, and pictures of this machine."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --muted: #666; --paper: #fff; --frame: #ececec;
  --line: #ddd; --mark: #b3261e; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --muted: #9a9a9a; --paper: #161616;
  --frame: #262626; --line: #333; --mark: #ff8a80; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--paper);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0; font-weight: 600; }
.sub { color: var(--muted); margin: 0 0 20px; max-width: 900px; }
a { color: var(--link); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr));
  gap: 16px 14px; }
figure { margin: 0; min-width: 0; }
.picture { position: relative; aspect-ratio: 1;
  background: var(--frame); display: grid; place-items: center;
  border-radius: 4px; overflow: hidden; color: var(--muted); text-align: center; }
.picture img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
figcaption { margin-top: 6px; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
figcaption .number { font-variant-numeric: tabular-nums; font-weight: 600; }
figcaption .muted, .muted { color: var(--muted); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; color: var(--muted); padding: 1px 12px 1px 0; }
"""


def write(
    path: Path, title: str, about: str, body: str, *, style: str = "", script: str = ""
) -> None:
    """Writes a page: `body`, `style` and `script` are HTML, CSS and JavaScript, the rest text.

    Raises:
        MachineError: no space, or no permission.
    """
    artifact.write_file(path, frame(title, about, body, style=style, script=script).encode())


def frame(
    title: str,
    about: str,
    body: str,
    *,
    style: str = "",
    script: str = "",
    policy: str = POLICY,
) -> str:
    """The page that `write` writes."""
    end = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f'<h1>{text(title)}</h1>\n<p class="sub">{text(about)}</p>\n{body}\n{end}'
        "</body>\n</html>\n"
    )


def text(value: object) -> str:
    """A value as text of HTML, safe between tags and inside quotes."""
    return html.escape(str(value))


def thumbnail(picture: Image.Image, side: int = THUMBNAIL_SIDE) -> bytes:
    """A JPEG whose longer side is at most `side` pixels; nothing is enlarged."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=THUMBNAIL_QUALITY)
    return content.getvalue()


def embedded(jpeg: bytes) -> str:
    """A JPEG as an address that needs no file: data:image/jpeg;base64,..."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
