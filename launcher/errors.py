"""What goes wrong with the files of a run, apart from what reads and writes them, which takes a second to import."""


class LogError(ValueError):
    """A file in a run's folder is not what was written there; says which, where in it, and what is wrong."""
