"""The exception of this package for a model whose results are no numbers."""


class NotFiniteError(ArithmeticError):
    """A model's log-likelihood or logits are NaN or infinite; the message says for which text."""
