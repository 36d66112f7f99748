"""Held-out loss and samples of a run, on the live, sharded model, without a second copy."""

import torch
import torch.distributed as dist

from data.errors import DataError
from data.loader import TrainingData, token_bytes, validation_rows
from data.tokenizer import load_tokenizer
from eval.perplexity import HeldOutLoss, held_out_loss
from eval.sample import pieces_of_text, sample_tokens
from launcher.engine.contract import Engine
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks, everyones

SAMPLE_WINDOW_TOKENS = 256


class HeldOut:
    """The held-out rows and the tokenizer. Every method is a collective."""

    def __init__(self, plan: Plan, ranks: Ranks, data: TrainingData) -> None:
        config = plan.config
        self._plan, self._ranks = plan, ranks
        self._tokenizer_path = data.tokenizer_path
        self._batches = []
        if config.data.validation_rows:
            self._batches = validation_rows(
                config.data,
                vocab_size=config.model.vocab_size,
                micro_batch_sequences=config.training.micro_batch_sequences,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        self._token_bytes_V = token_bytes(config.data, config.model.vocab_size)

    def measure(self, engine: Engine) -> HeldOutLoss | None:
        """Return the held-out loss of the current model; None if no rows are held out."""
        if not self._plan.config.data.validation_rows:
            return None
        with torch.no_grad():
            return held_out_loss(
                engine.token_nll,
                self._batches,
                self._token_bytes_V,
                dist.all_reduce,
            )

    def sample(self, engine: Engine) -> dict[str, str]:
        """Return the configured prompt and its continuation by the model.

        Raises:
            NotFiniteError: the model's logits are NaN or infinite, on all ranks alike.
            DataError: a rank cannot read the tokenizer; raised on all ranks alike.
        """
        config = self._plan.config
        tokenizer, problems = None, []
        try:
            tokenizer = load_tokenizer(self._tokenizer_path)
        except (DataError, OSError) as error:
            problems = [str(error)]
        if problems := everyones(problems, self._ranks):
            raise DataError("; ".join(problems))
        assert tokenizer is not None
        prompt = config.evaluation.sample_prompt or ""
        prompt_tokens = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
        with torch.no_grad():
            tokens = sample_tokens(
                engine.logits,
                prompt_tokens,
                num_tokens=config.evaluation.sample_tokens,
                window_tokens=min(config.data.sequence_length, SAMPLE_WINDOW_TOKENS),
                end_token=tokenizer.end_of_document,
                seed=config.run.seed,
            )
        return {"prompt": prompt, "completion": "".join(pieces_of_text(tokenizer, tokens, prompt_tokens))}
