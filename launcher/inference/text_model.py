"""A model that continues text, whatever computes its logits."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from data.errors import DataError
from data.tokenizer import Tokenizer
from eval.sample import pieces_of_text
from launcher.errors import CheckpointError, ConfigError
from model.config import ModelConfig


class TextModel(ABC):
    """A model with its tokenizer."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    """None where there is none, or none that can be read."""
    first_token: int | None
    """The token before a text; None where neither the model nor a tokenizer says."""
    puts_first_token: bool
    """Whether the tokenizer puts it in front of every text."""
    tokenizer_problem: str | None
    """Why the model's own tokenizer cannot be read, if it was found."""

    @property
    @abstractmethod
    def weights_bytes(self) -> int:
        """Size of the weights."""

    @abstractmethod
    def continuation(self, prompt_tokens: Sequence[int], **choice: Any) -> Iterator[int]:
        """Continue tokens, as `eval.sample.generate` does, with its choices and errors."""

    def generate_tokens(self, prompt_tokens: Sequence[int], **choice: Any) -> Iterator[int]:
        """Continue tokens; see `generate`. Without a tokenizer the model does not end the document.

        Args:
            prompt_tokens: at least one.
            choice: as for `eval.sample.generate`.

        Raises:
            ConfigError: the prompt fills the context; or a number is out of its range.
            NotFiniteError: the model's logits are NaN or infinite; raised when the token is due.
        """
        own = () if self.tokenizer is None else (self.tokenizer.end_of_document,)
        try:
            return self.continuation(prompt_tokens, **{"end_tokens": own, **choice})
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def prompt_tokens(self, prompt: str) -> list[int]:
        """The tokens of a text that the model shall continue.

        The first token is in front of them if the tokenizer puts it there, if it ends documents, so that each document
        of training came after it, or if there is no other.

        Raises:
            CheckpointError: there is no tokenizer.
            DataError: it cannot be read, or the prompt is not text.
        """
        tokenizer = self.required_tokenizer()
        assert self.first_token is not None, "a tokenizer has an end of document"
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the prompt is not text: {error}; write it in UTF-8") from error
        tokens = tokenizer.encode(prompt)
        begins = self.puts_first_token or self.first_token == tokenizer.end_of_document or not tokens
        return [self.first_token, *tokens] if begins else tokens

    def generate(self, prompt: str, **choice: Any) -> Iterator[str]:
        """Continue a text; yields pieces as they come.

        It ends where the model ends the document, after ``max_tokens``, or where the context is full.

        Args:
            prompt: the text.
            choice: ``max_tokens``, ``temperature``, ``top_p`` and ``seed``, as for `eval.sample.generate`.

        Raises:
            CheckpointError: there is no tokenizer.
            DataError: it cannot be read.
            ConfigError: the prompt fills the context; or a number is out of its range.
            NotFiniteError: the model's logits are NaN or infinite; raised when the piece is due.
        """
        prompt_tokens = self.prompt_tokens(prompt)
        return pieces_of_text(self.required_tokenizer(), self.generate_tokens(prompt_tokens, **choice), prompt_tokens)

    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            CheckpointError: there is none.
            DataError: it cannot be read.
        """
        if self.tokenizer_problem is not None:
            raise DataError(self.tokenizer_problem)
        if self.tokenizer is None:
            raise CheckpointError("the model's tokenizer was not found; name its file (--tokenizer, tokenizer=)")
        return self.tokenizer
