"""The errors that a user can put right, and the one handler that reports them.

Their text is all that a user needs to see: what was wrong, where, and what would be right. Anything else that is raised
is a defect, and its traceback belongs in a bug report. The packages `data` and `eval` import nothing from here and have
errors of their own, which `USER_ERRORS` names as well.
"""

import os
import sys
import traceback

from data.errors import DataError
from data.messages import safe_message
from eval.errors import NotFiniteError


class UserError(Exception):
    """A user can put this right; the text says what was wrong, where, and what would be right."""


class ConfigError(UserError):
    """The configuration is wrong; one problem a line, each beginning with the key's path."""


class NoTimeError(ConfigError):
    """The job ends before a run could train and save; a study starts no other run in it."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; says which file, what is wrong and what to do."""


class TrainingError(UserError):
    """Training cannot continue; says why and what may help."""


class PlacementError(UserError):
    """Ranks are not spread over hosts as they must be; says which rank is on which host."""


class StartError(ConnectionError):
    """Ranks do not meet; says who is missing, or what cannot be reached. Each rank may see it alone."""


class FirstRankError(Exception):
    """The first rank has failed in what it does for all, and says why; the others have nothing to add."""


class LogError(UserError):
    """A file in a run's folder is not what a run writes; says which file, which line, and what is wrong."""


class MetricError(UserError, KeyError):
    """A run has logged no metric of this name, or none that can be drawn; a `KeyError` too, as of any mapping."""

    __str__ = Exception.__str__  # a KeyError's is in quotes


USER_ERRORS = (UserError, DataError, NotFiniteError)
"""For `except`: all errors that a user can put right."""


def report_error(error: Exception, rank: int | None = None) -> int:
    """Print an error to stderr: a sentence if a user can put it right, else its traceback.

    Args:
        error: what was raised.
        rank: this process's, to be named. Where None is given, the first rank reports what a user can put right for
            all, since they fail alike; anything else is reported by each rank that it happens to.

    Returns:
        The exit code: 2 if a user can put it right, else 1.
    """
    is_shared = rank is None and isinstance(error, USER_ERRORS)
    is_for_user = isinstance(error, (*USER_ERRORS, OSError))
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) if is_for_user else "".join(traceback.format_exception(error)).rstrip()
    this_rank = os.environ.get("RANK") if rank is None else rank
    if this_rank is not None and not is_shared:
        text = f"rank {this_rank}: {text}"
    if not is_shared or this_rank in (None, "0"):
        print(safe_message(text), file=sys.stderr, flush=True)  # noqa: T201
    return 2 if is_for_user else 1
