"""Held-out loss and samples of a run, on the live, sharded model, without a second copy."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from data.chat_template import ChatTemplate, Message
from data.config import DataConfig
from data.errors import DataError
from data.loader import IGNORED_LABEL, TrainingData, held_out_first_token, token_bytes, validation_rows
from data.tokenizer import load_tokenizer
from eval.perplexity import HeldOutLoss, held_out_loss
from eval.sample import pieces_of_text, sample_tokens
from launcher.engine.contract import Engine
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks, everyones
from launcher.run.log_keys import PREFERENCE_LOSS, REWARD_ACCURACY, REWARD_MARGIN
from launcher.training.averaging import averaged_weights
from launcher.training.mixtures import template_of
from launcher.training.teacher import Teacher
from model.preference import chosen_labels

SAMPLE_WINDOW_TOKENS = 256
PREFERENCES = tuple(f"validation/{end}" for end in (PREFERENCE_LOSS, REWARD_MARGIN, REWARD_ACCURACY))
"""The keys of `model.transformer.Output.parts` of held-out pairs."""
UNTRAINED_ROWS = 16
"""Held-out rows that an untrained model computes."""


class HeldOut:
    """The held-out rows and the tokenizer. Every method is a collective.

    `pairs` are this rank's micro-batches if the rows are pairs, and empty if not.

    Args:
        plan: of the run.
        ranks: this rank among all.
        data: with the run's tokenizer.
        of: the data whose rows they are; by default the run's.
    """

    def __init__(self, plan: Plan, ranks: Ranks, data: TrainingData, of: DataConfig | None = None) -> None:
        config = plan.config
        self.of = of or config.data
        self._plan, self._ranks = plan, ranks
        self._tokenizer_path = data.tokenizer_path
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._batches = []
        if config.data.validation_rows:
            self._batches = validation_rows(
                self.of,
                vocab_size=config.model.vocab_size,
                micro_batch_sequences=config.training.micro_batch_sequences,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        if any(phase.preference and plan.held_out_of(phase) == self.of for phase in plan.phases):
            # The loss of text is that of the chosen answers; both sides are for `measure_preferences`.
            self.pairs = self._batches
            self._batches = [(tokens_BT, chosen_labels(tokens_BT, labels_BT)) for tokens_BT, labels_BT in self.pairs]
        self._first_token = held_out_first_token(self.of, config.model.vocab_size)
        self._token_bytes_V = token_bytes(self.of, config.model.vocab_size)

    def measure(self, engine: Engine, got_on: Callable[[], None] = lambda: None) -> HeldOutLoss | None:
        """Return the held-out loss of the current model; None if no rows are held out.

        ``got_on`` is called after every few rows, on all ranks alike.
        """
        if not self._plan.config.data.validation_rows:
            return None
        with engine.keeping_apart(self._first_token):
            return self._loss(engine.token_nll, _watched(self._batches, got_on))

    def measure_rows(
        self, engine: Engine, got_on: Callable[[], None] = lambda: None
    ) -> tuple[HeldOutLoss | None, Tensor]:
        """As `measure`, with the nats and the tokens of each of R rows, float64 [2, R] on the CPU."""
        micro, world_size = self._plan.config.training.micro_batch_sequences, self._ranks.world_size
        sums_2R = torch.zeros(2, len(self._batches) * micro * world_size, dtype=torch.float64)
        first_rows = iter(range(self._ranks.rank * micro, sums_2R.shape[1], world_size * micro))

        def counted(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
            nll_BT = engine.token_nll(tokens_BT, labels_BT)
            rows = slice(first := next(first_rows), first + micro)
            sums_2R[0, rows] = nll_BT.double().sum(1).cpu()
            sums_2R[1, rows] = (labels_BT != IGNORED_LABEL).sum(1).double().cpu()
            return nll_BT

        if not self._batches:
            return None, sums_2R
        with engine.keeping_apart(self._first_token):
            loss = self._loss(counted, _watched(self._batches, got_on))
        dist.all_reduce(sums_2R)
        return loss, sums_2R[:, sums_2R[1] > 0]

    def measure_preferences(
        self, engine: Engine, reference: Teacher | None, got_on: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Return the means over the held-out pairs, by keys of the log; nothing where there are none."""
        if not self.pairs or reference is None:
            return {}
        sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
        with engine.keeping_apart(self._first_token), torch.no_grad():
            for batch in _watched(self.pairs, got_on):
                tokens_BT, labels_BT = (each.to(engine.device) for each in batch)
                units = reference.units(tokens_BT, labels_BT).double()
                with reference.teaching(tokens_BT, batch) as lesson:
                    parts = engine.forward(tokens_BT, labels_BT, teacher=lesson).parts
                assert parts is not None
                sums += torch.cat([parts.double() * units, units[None]])
        dist.all_reduce(sums)
        *totals, count = sums.tolist()
        return {key: total / count for key, total in zip(PREFERENCES, totals, strict=True)}

    def measure_averaged(self, engine: Engine, got_on: Callable[[], None] = lambda: None) -> HeldOutLoss | None:
        """Return the held-out loss of the averaged weights; None if no step is averaged, or no rows are held out."""
        if engine.average is None or not int(engine.average.tokens):
            return None
        with averaged_weights(engine):
            return self.measure(engine, got_on)

    def estimate_untrained(self, engine: Engine) -> HeldOutLoss | None:
        """As `measure`, from the loss of the first rows: an untrained model predicts all tokens equally badly."""
        if not self._plan.config.data.validation_rows:
            return None
        with engine.keeping_apart(self._first_token):
            nats_per_token = self._loss(engine.token_nll, self._first_batches(UNTRAINED_ROWS)).nats_per_token
        return self._loss(lambda _, labels_BT: nats_per_token * (labels_BT != IGNORED_LABEL).double(), self._batches)

    def _loss(
        self, token_nll: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
    ) -> HeldOutLoss:
        with torch.no_grad():
            return held_out_loss(token_nll, batches, self._token_bytes_V, dist.all_reduce)

    def _first_batches(self, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the first rows, as many on every rank; no other rows in them count."""
        micro, world_size = self._plan.config.training.micro_batch_sequences, self._ranks.world_size
        for index, (tokens_BT, labels_BT) in enumerate(self._batches[: math.ceil(num_rows / (micro * world_size))]):
            first_row = (index * world_size + self._ranks.rank) * micro
            counts_B1 = torch.arange(first_row, first_row + micro)[:, None] < num_rows
            yield tokens_BT, labels_BT.where(counts_B1, IGNORED_LABEL)

    def sample(self, engine: Engine, got_on: Callable[[], None] = lambda: None) -> list[tuple[str, str]]:
        """Return the configured prompts, each with its continuation by the model.

        If the last phase learns from chats, a prompt is a user's message, written as the template writes it.

        Args:
            engine: with the model.
            got_on: called after each of them.

        Raises:
            NotFiniteError: the model's logits are NaN or infinite, on all ranks alike.
            DataError: a rank cannot read the tokenizer or the template; raised on all ranks alike.
        """
        config, problems = self._plan.config, []
        try:
            tokenizer = load_tokenizer(self._tokenizer_path)
            first, end_tokens = tokenizer.end_of_document, {tokenizer.end_of_document}
            prompts = [(prompt, [first, *tokenizer.encode(prompt)]) for prompt in config.evaluation.sample_prompts]
            if self._plan.phases[-1].objective != "next-token":
                template = ChatTemplate(tokenizer, template_of(self._plan))
                chats: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt, _ in prompts]
                prompts = [(template.text(chat, to_answer=True), template.prompt_tokens(chat)) for chat in chats]
                end_tokens = template.end_tokens()
        except (DataError, OSError) as error:
            problems = [str(error)]
        if problems := everyones(problems, self._ranks):
            raise DataError("; ".join(problems))
        found = []
        for prompt, prompt_tokens in prompts:
            with engine.keeping_apart(None), torch.no_grad():  # a chat may end its turns with the end of a document
                tokens = sample_tokens(
                    engine.logits,
                    prompt_tokens,
                    num_tokens=config.evaluation.sample_tokens,
                    window_tokens=min(config.data.sequence_length, SAMPLE_WINDOW_TOKENS),
                    end_tokens=end_tokens,
                    seed=config.run.seed,
                )
            text = "".join(pieces_of_text(tokenizer, tokens, prompt_tokens))
            found.append((prompt, text))
            got_on()
        return found


def _watched(batches: Iterable[tuple[Tensor, Tensor]], got_on: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, with a call after each."""
    for batch in batches:
        yield batch
        got_on()
