"""A module that ends every process that is started to import it."""

import multiprocessing
import sys

if multiprocessing.current_process().name != "MainProcess":
    sys.exit(9)


def decode(task: str) -> str:
    """Never called."""
    return task
