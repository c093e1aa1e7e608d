"""The command `btpipe`: an exit code for each kind of error, a message instead of a traceback."""

import sys

from btpipe.errors import BtpipeError


def main() -> None:
    """Runs the command line."""
    from btpipe.cli import app

    try:
        app()
    except BtpipeError as error:
        if type(error) is BtpipeError and error.exit_code == 1:
            raise
        kind = "" if error.exit_code == 75 else "error: "
        sys.stderr.write(f"{kind}{error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
