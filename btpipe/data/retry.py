"""Reading again what a disk or a network failed to give, before a file is blamed."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Content = TypeVar("Content")

RETRY_SECONDS = (0.1, 0.5, 2.0)
"""Pauses before a read that failed for the disk's or the network's reasons is tried again."""
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.EREMOTEIO,
    }
)
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP: timed out, too many requests, the server's own failures."""


def read_patiently(read: Callable[[], Content]) -> Content:
    """What `read` returns; after a transient error it is asked again, three times in 2.6 seconds.

    Raises:
        Exception: whatever `read` raised last.
    """
    for pause in RETRY_SECONDS:
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(pause)
    return read()


def is_transient(error: Exception) -> bool:
    """Whether it is the disk's or the network's failure, which may pass, and not the file's."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT:
        return True
    return getattr(error, "status", None) in TRANSIENT_STATUS  # as HTTP clients name it
