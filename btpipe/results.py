"""What commands made, in numbers; kinds that hold more than numbers stand beside their command."""

import dataclasses
from pathlib import Path

from btpipe.events import Finished


@dataclasses.dataclass(frozen=True)
class Sharded(Finished):
    """`images` in so many shards in the folder `out`, and how small and fast they became.

    `decoded_per_cpu_second`: images, on a sample; `before`: of the inputs. `share_of_bytes` and
    `times_faster` are of both. What stood there is not decoded again: the speeds are not a number.
    """

    job = "shard"

    out: Path
    images: int
    shards: int
    rejects: int
    bytes: int
    bytes_before: int
    decoded_per_cpu_second: float
    decoded_per_cpu_second_before: float
    share_of_bytes: float
    times_faster: float
    nothing_to_do: bool = False

    @property
    def text(self) -> str:
        if self.nothing_to_do:
            return f"nothing to do: {self.out} holds these shards"
        return (
            f"{self.out}: {self.images:,} images in {self.shards:,} shards,"
            f" {self.rejects:,} rejects;"
            f" {self.bytes / 1e6:,.1f} MB, {self.bytes_before / 1e6:,.1f} before"
            f" ({self.share_of_bytes:.0%}); {self.decoded_per_cpu_second:,.0f} images decoded per"
            f" CPU-second, {self.decoded_per_cpu_second_before:,.0f} before"
            f" ({self.times_faster:.1f} times)"
        )


@dataclasses.dataclass(frozen=True)
class Pretrained(Finished):
    """A run is at its last step, which is `step`; this start did `done` of them."""

    job = "pretrain"

    run: str
    step: int
    done: int
    nothing_to_do: bool = False

    @property
    def text(self) -> str:
        if self.nothing_to_do:
            return f"nothing to do: {self.run} is trained to its last step"
        return f"{self.done} steps, {self.run}"


@dataclasses.dataclass(frozen=True)
class Exported(Finished):
    """A bundle for images of `size` x `size` pixels, and the files of its models."""

    job = "export"

    out: Path
    size: int
    models: tuple[str, ...]
    nothing_to_do: bool = False

    @property
    def text(self) -> str:
        if self.nothing_to_do:
            return f"{self.out} holds this encoder already: nothing to do"
        return f"{self.out}: {self.size} pixels in, published ({', '.join(self.models)})"


@dataclasses.dataclass(frozen=True)
class Embedded(Finished):
    """A table of `rows` vectors of a bundle, named by its digest, and of `rejects` without one.

    `embedded` of the rows are new, `reused` were known from an earlier table; `dropped` rows of
    that are listed no more (-1: there was none). `unread` of the rejects could not be read for the
    machine's reasons: the same command makes them. `images_per_second` is over what this process
    embedded itself.
    """

    job = "embed"

    out: Path
    rows: int
    rejects: int
    embedded: int
    dimension: int
    bundle: str
    engine: str
    precision: str
    images_per_second: float
    nothing_to_do: bool
    reused: int = 0
    dropped: int = -1
    unread: int = 0

    @property
    def text(self) -> str:
        if self.nothing_to_do:
            return f"{self.out} is finished: nothing to do"
        summary = (
            f"{self.out}: {self.rows} vectors of {self.dimension}, {self.rejects} rejects,"
            f" {self.images_per_second:.1f} images/s"
        )
        if self.dropped < 0:
            return summary
        counts = f"{self.embedded} embedded, {self.reused} as they were, {self.dropped} dropped"
        return f"{summary}; {counts}"


@dataclasses.dataclass(frozen=True)
class Merged(Finished):
    """The tables of `shards` shares are one, of `rows` vectors and of `rejects` without one."""

    job = "merge"

    out: Path
    rows: int
    rejects: int
    shards: int
    nothing_to_do: bool = False

    @property
    def text(self) -> str:
        if self.nothing_to_do:
            return f"{self.out} is finished: nothing to do"
        return f"{self.out}: {self.rows} vectors, {self.rejects} rejects of {self.shards} shards"


@dataclasses.dataclass(frozen=True)
class DupesFound(Finished):
    """The groups of one picture in `table`, listed in `out`; `spare` of its pictures are copies."""

    job = "dupes"

    table: Path
    out: Path
    page: Path | None
    groups: int
    spare: int
    pictures: int

    @property
    def text(self) -> str:
        paths = f"{self.out} and {self.page}" if self.page else f"{self.out}"
        spare = f"{self.spare:,} of {self.pictures:,} pictures to spare"
        return f"{paths}: {self.groups:,} groups, {spare}"
