"""Every error that a user can cause or meet, with the exit code the command line ends with.

BtpipeError            1    a bug, when it is raised bare
|- UsageError          2    arguments, paths, recipes
|  `- RecipeError      2    a recipe that cannot be read or means nothing
|- BudgetError         3    finished, but more inputs were bad than `max_bad` allows
|- RefusedError        4    going on would change the result silently
|  `- IntegrityError   4    a file is not what its manifest says
|     `- NewerError    4    a file is whole, and made by a newer btpipe
|- MachineError        5    disk, permission, memory, a lost rank
|  `- LostRankError    5    another rank is gone, and this one cannot go on without it
|- NumericsError       6    not finite, or an export that disagrees
`- Stopped            75    asked to stop; the state is saved, the same command goes on
"""


class BtpipeError(Exception):
    """What was found, where, what was expected instead and what to do about it.

    The command line prints the message and ends with `exit_code`; no traceback.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", expected: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.fix = what, str(where), expected, fix
        lines = [f"{where}: {what}" if where else what]
        if expected:
            lines.append(f"expected: {expected}")
        if fix:
            lines.append(f"to do: {fix}")
        super().__init__("\n".join(lines))


class UsageError(BtpipeError):
    """Arguments or paths that name nothing btpipe can work on."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read, has an unknown key, or a value out of its range."""


class BudgetError(BtpipeError):
    """More inputs were bad than `max_bad` allows; what was finished is kept."""

    exit_code = 3


class RefusedError(BtpipeError):
    """Going on would mix two runs, models or data sets, and nobody would notice."""

    exit_code = 4


class IntegrityError(RefusedError):
    """A file is missing, changed, or newer than this btpipe reads."""


class NewerError(IntegrityError):
    """A file of a newer format: nothing is wrong with it, but this btpipe cannot read it."""


class MachineError(BtpipeError):
    """The machine failed: disk, permission, memory, or a rank that was lost."""

    exit_code = 5


class LostRankError(MachineError):
    """Another rank of the job is gone or does not answer; what it met itself is the cause."""


class NumericsError(BtpipeError):
    """A loss or gradient that is not finite, or an export that disagrees with the network."""

    exit_code = 6


class Stopped(BtpipeError):
    """Asked to stop by a signal. The state is saved; the same command goes on."""

    exit_code = 75
