"""The one exception of this package for what the person in front of it can put right."""


class DataError(ValueError):
    """A corpus, tokenizer or prepared folder is not what it should be; says where, what, and what would be right."""
