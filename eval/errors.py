"""The exception of this package for a model whose results are no numbers."""


class NotFiniteError(ArithmeticError):
    """A model's log-likelihood or logits are NaN or infinite; the message says for which text."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; the model is broken, or its activations overflow in this dtype")
