"""Which files end a process: found by halves, with the decoder of the worker that was lost."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence

from btpipe import runtime
from btpipe.data import supervisor
from btpipe.data.rejects import BadInputError
from btpipe.embed.messages import WorkerConfig

GPU_SECONDS = 60.0
"""Beside the time of a decode: CUDA's libraries are loaded and a decoder is made."""


def find(
    files: Mapping[int, bytes],
    config: WorkerConfig,
    *,
    limit_seconds: float,
    should_stop: Callable[[], bool],
) -> dict[int, BadInputError]:
    """The rows of those of the files that end or hang a process, and how.

    On a CPU each file is decoded alone, as a worker does. On a GPU all of them are decoded
    together, and where the process is lost each half of them, down to single files; a file that
    ends a process only beside others is not found, and nor are the others.

    Raises:
        MachineError: a process cannot start.
    """
    in_batches = config.gpu is not None
    groups = [sorted(files)] if in_batches else [[row] for row in sorted(files)]
    culprits: dict[int, BadInputError] = {}
    while groups:
        tasks = ((i, [files[row] for row in group]) for i, group in enumerate(groups))
        lost = {
            i: answer
            for i, answer in supervisor.supervise(
                functools.partial(decode_together, config),
                tasks,
                processes=1,
                limit_seconds=limit_seconds + GPU_SECONDS * in_batches,
                should_stop=should_stop,
            )
            if isinstance(answer, BadInputError)
        }
        culprits |= {groups[i][0]: how for i, how in lost.items() if len(groups[i]) == 1}
        halves = [half for i in lost if len(groups[i]) > 1 for half in _halves(groups[i])]
        groups = halves
    return culprits


def decode_together(config: WorkerConfig, contents: Sequence[bytes]) -> bool:
    """Decodes files as a worker does and forgets them: what counts is whether it survives."""
    if config.cores:
        runtime.keep_to(config.cores, config.gpu)
    # DALI is this process's business, not the job's.
    import numpy as np  # noqa: PLC0415

    from btpipe.data.pipeline import decode  # noqa: PLC0415

    files = [np.frombuffer(content, dtype=np.uint8) for content in contents]
    if config.gpu is None or config.decode:
        for file in files:
            with contextlib.suppress(BadInputError):
                (config.decode or decode.decode)(file)
    else:
        encoded = [parsed for file in files if (parsed := decode.parse(file)) is not None]
        decode.batch_decoder(0, config.encoder.threads or runtime.cores()).decode(encoded)
    return True


def _halves(group: list[int]) -> tuple[list[int], list[int]]:
    middle = len(group) // 2
    return group[:middle], group[middle:]
