"""Every error that a user can put right."""


class PlacementError(ValueError):
    """Ranks are not spread over hosts as they must be; says which is where."""


class ConfigError(ValueError):
    """What is wrong with a configuration, one problem a line, each beginning with the key's path."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; says which file, what is wrong and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; says why and what may help."""


class LogError(ValueError):
    """A file in a run's folder is not what was written there; says which, where in it, and what is wrong."""
