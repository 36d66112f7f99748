"""The exception of this package for everything that a user can fix."""


class DataError(ValueError):
    """A corpus, tokenizer or prepared folder is wrong; the message says which, what is wrong, and how to fix it."""
