"""The command `btpipe`: an exit code for each kind of error, a message instead of a traceback."""

import sys
from collections.abc import Sequence

from btpipe.errors import BtpipeError

INTERRUPTED = 130
"""The exit code of a second Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line: the process's own, or these arguments."""
    from btpipe.cli import app

    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--json" in words:
        _run_for_a_machine(words)
        return
    try:
        app(words)
    except BtpipeError as error:
        if _is_bug(error):
            raise
        kind = "" if error.exit_code == 75 else "error: "
        sys.stderr.write(f"{kind}{error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run_for_a_machine(words: list[str]) -> None:
    """The same, but every error is a line of JSON; a bug has its traceback as well."""
    from btpipe import events, progress
    from btpipe.cli import app

    with progress.show("json") as on_event:
        try:
            interrupted = app(words, standalone_mode=False) == INTERRUPTED
        except BtpipeError as error:
            parts = error.what, error.where, error.expected, error.fix
            on_event(events.Error(error.exit_code, type(error).__name__, *parts))
            if _is_bug(error):
                raise
            sys.exit(error.exit_code)
        except Exception as error:
            # What typer raises at a wrong option has an exit code, and no public name.
            code = getattr(error, "exit_code", 0)
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            on_event(events.Error(code or 1, type(error).__name__, message))
            if not code:
                raise
            sys.exit(code)
        if interrupted:
            on_event(events.Error(INTERRUPTED, "KeyboardInterrupt", "interrupted"))
            sys.exit(INTERRUPTED)


def _is_bug(error: BtpipeError) -> bool:
    return type(error) is BtpipeError and error.exit_code == 1


if __name__ == "__main__":
    main()
