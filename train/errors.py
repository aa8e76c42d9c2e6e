"""The one exception that a command turns into a line for its user."""


class InputError(ValueError):
    """Something the user gave (a flag, a file, a folder) cannot be used.

    The message is one line that names the argument or file, what was expected and what came. Commands print it
    as `error: …` on standard error and exit with status 2.
    """


class RankLost(Exception):
    """Another process of this run died, left or hangs, so that this one cannot go on.

    The message is one line that names it. Commands print it as `error: …` on standard error and exit with status 1.
    """
