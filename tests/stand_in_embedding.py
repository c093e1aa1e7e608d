"""A decoder that does to its process what a file says in its last bytes. Workers import it."""

import os
import signal
import time

import numpy as np
from numpy.typing import NDArray

KILL, HANG, CRASH, CROWD = b"<kill>", b"<hang>", b"<crash>", b"<crowd>"
CROWD_SECONDS = 1.0
"""In which a file that cannot bear company looks for any."""
_at_work: list[int] = []


def decode(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Dies, hangs or decodes; the marks follow the end of a JPEG, where no decoder looks.

    A file with the mark of a crowd dies when another is decoded meanwhile.
    """
    tail = content[-8:].tobytes()
    if tail.endswith(KILL):
        os.kill(os.getpid(), signal.SIGKILL)
    if tail.endswith(CRASH):
        os.kill(os.getpid(), signal.SIGSEGV)
    if tail.endswith(HANG):
        time.sleep(3600)
    _at_work.append(0)
    if tail.endswith(CROWD):
        seen, until = len(_at_work), time.monotonic() + CROWD_SECONDS
        while time.monotonic() < until:
            if len(_at_work) > seen:
                os.kill(os.getpid(), signal.SIGSEGV)
    # Where it decodes: the supervisor knows this module too, and loads no decoder.
    from btpipe.data.pipeline import decode as pipeline_decode  # noqa: PLC0415

    return pipeline_decode.decode(content)
