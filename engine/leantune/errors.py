"""Every error a user can cause, in one place: the message names the thing and the fix."""


class LeantuneError(Exception):
    """Base of all errors that leantune raises on purpose; the CLI prints it without a traceback."""


class ConfigError(LeantuneError):
    """A setting that is unknown, out of range, or at odds with another."""


class CheckpointError(LeantuneError):
    """A model, adapter or training-state file that is missing, damaged, or cannot be written."""


class DataError(LeantuneError):
    """A record, a data file or a template that cannot be used as it is."""


class TrainingError(LeantuneError):
    """A run that cannot go on, such as a loss that is not finite."""
