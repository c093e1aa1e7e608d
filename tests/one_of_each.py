"""A folder with one of each thing that btpipe writes, made once for the whole session."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_run import shared_home

from btpipe.data import shard_job
from btpipe.data.index import build
from btpipe.data.scan import scan
from btpipe.embed.job import embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.events import ignore


def one_of_each(factory: pytest.TempPathFactory) -> Path:
    """images/ runs/tiny/ exports/tiny/ v.parquet v.rejects.parquet i.parquet (decoded) small/."""
    home = factory.getbasetemp() / "one-of-each"
    if home.exists():
        return home
    copy(shared_home(factory), home)
    embed(
        home / "images",
        home / "v.parquet",
        EncoderConfig(home / "exports/tiny", device="cpu"),
        ignore,
    )
    scan(home / "images", home / "i.parquet", ignore, depth="decode")
    listed, refused = build(home / "images")
    options = shard_job.ShardOptions(shorter_side=24, quality=90, shard_bytes=20_000)
    shard_job.write(listed, refused, home / "small", options, ignore)
    return home


def copy(home: Path, to: Path) -> Path:
    """The same under another name, by hard links: replace files, never write into them."""
    shutil.copytree(home, to, copy_function=os.link)
    return to


def replace(path: Path, content: bytes) -> None:
    """Other content under the name; whoever shares the old one by a link keeps it."""
    path.unlink()
    path.write_bytes(content)
