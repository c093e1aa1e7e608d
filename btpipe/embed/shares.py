"""One of several shares of an input's rows, for plain schedulers: `--shard i/n`, from 0."""

import dataclasses
import re

from btpipe.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Share:
    """The `number`-th of `count` runs of neighbouring rows, about as many in each."""

    number: int = 0
    count: int = 0

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "2/8" is the third of eight; "" is everything.

        Raises:
            UsageError: anything else.
        """
        if not text:
            return cls()
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise UsageError(f"--shard {text}", expected="i/n with i from 0 to n - 1, such as 0/8")
        return cls(int(match[1]), int(match[2]))

    @property
    def text(self) -> str:
        """As `parse` takes it."""
        return f"{self.number}/{self.count}" if self.count else ""

    def rows(self, total: int) -> range:
        """Its rows of `total`."""
        if not self.count:
            return range(total)
        return range(self.number * total // self.count, (self.number + 1) * total // self.count)
