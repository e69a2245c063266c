"""The errors that decide a run's exit code.

Exit codes: 0 done; 1 it failed; 2 the user's input is wrong; 75 try again (stopped on request, checkpoint saved);
93 never restart. `mcore_swift.cli` maps the classes below to them; everything else is a failure with a traceback.
"""

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_TRY_AGAIN = 75
EXIT_NEVER_RESTART = 93


class InputError(ValueError):
    """The user's input is wrong. The message is shown alone, without a traceback, and the exit code is 2.

    It names the file, key or row, says what was found and what is allowed.
    """


class DamagedCheckpoint(InputError):
    """A checkpoint is not what was written: an earlier one may still be good."""


class NeverRestart(Exception):
    """The run must not go on, nor be started again by a machine: another attempt has taken it over. Exit code 93."""


class StopRequested(Exception):
    """The run was asked to stop (a signal), has saved its checkpoint, and can be started again: exit code 75."""


def nearest(name: str, valid: "list[str] | tuple[str, ...]") -> str:
    """Returns " Did you mean 'x'?" for the valid name closest to `name`, or "" when none is close."""
    import difflib

    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
