"""Errors that a user can cause, and the exit status that each one ends with."""

from __future__ import annotations

EXIT_FAILED = 1
"""Exit status of a command whose work failed after it had begun."""
EXIT_CONFIGURATION_ERROR = 2
"""Exit status of a command that was refused before it wrote anything."""
EXIT_STOPPED = 3
"""Exit status of a training that a signal stopped: the same command continues it."""
EXIT_HANG = 4
"""Exit status of a run that made no progress, see --hang_timeout."""
EXIT_INTERRUPTED = 130
"""Exit status of a command that was interrupted from the keyboard."""


class Reported:
    """An error of which the user may have been told already."""

    reported = False
    """Whether it has been printed, so that the command does not print it again."""


class ConfigurationError(Reported, ValueError):
    """Something the user asked for cannot be done as asked.

    The message is one line that says what is wrong and which option or file to change.
    Commands print it and end with :data:`EXIT_CONFIGURATION_ERROR`.
    """

    def __str__(self) -> str:
        # What it quotes, such as the value of an option, may hold any character.
        return super().__str__().replace("\r", "\\r").replace("\n", "\\n")


class DataError(ConfigurationError):
    """A data folder, shard, manifest or tokenizer is missing, damaged or does not fit."""


class TrainingError(Reported, RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class RunStoppedError(Reported, RuntimeError):
    """A signal stopped the run; what it has done is saved."""
