"""Where images come from: folders, named files, lists, tar shards, parquet rows, URLs."""

from btpipe.data.sources.source import Kind, Source

__all__ = ["Kind", "Source"]
