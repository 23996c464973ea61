"""Errors that the user can mend, and what their messages are made of. The command line prints the message and exits with 2."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: an option, a row, a path, a missing extra.

    The message says what came, what was wanted and what to do; it is shown without a traceback.
    """


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after a checkpoint was written (exit code 130). The message says where."""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 4
        self.maxlevel = 2


def shown(value: object) -> str:
    """A value as Python writes it, cut before it is written: what came may be of any size and depth."""
    return _SHORT.repr(value)


_SHORT = _Short()


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"` for a near miss, else an empty string."""
    near = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
