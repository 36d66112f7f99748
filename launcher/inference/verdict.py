"""Judge a published model: what is stored in it, what it computes, and whether the two can be right.

Whoever made the file may have put nothing into a matrix, the wrong scale beside it, or a tokenizer of another model,
and no program that loads it says so.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.tokenizer import Tokenizer
from eval.perplexity import LARGEST_EXPONENT
from launcher.errors import CheckpointError
from launcher.formats.published import Coded, Published, counted, named
from launcher.inference.streamed import streamed_nll
from launcher.process.console import without_nan
from model.size import block_of, is_in_block, parameter_shapes

SAMPLE = (
    "The river rises in the mountains and flows through a wide valley to the sea. In spring, when the snow melts, its "
    "water covers the fields on both sides. People have lived here for a long time. They grow corn and fruit, keep "
    "sheep, and build their houses on the hills, where the water does not come. Every year they wait for the flood, "
    "and every year it makes the ground good again."
)
"""What models are tried on if no text is named."""

SAMPLE_TOKENS = 256
"""Of a text, to find out the convention of scales."""

MOST_TOKENS = 8192
"""Of a text, to measure the perplexity on."""

WINDOW_TOKENS = 1024
DECISIVE_NATS = 0.5
"""Difference of two losses per token that decides between them."""

FEW = 0.01
"""Share of codes other than -1, 0 and +1 that is taken for damage, in a format that has all four codes of 2 bits."""


@dataclass
class Verdict:
    """Everything that was found about a model."""

    location: str
    form: str
    problems: list[str]
    notes: list[str]
    num_parameters: int = 0
    shares: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Shares of -1, 0 and +1, by matrix."""
    blocks: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """The same over all coded matrices of a block."""
    scales: str = "no codes"
    """`as declared`, `inverted`, `not decided`, or `no codes`."""
    nats_per_token: float | None = None
    num_tokens: int = 0

    @property
    def perplexity(self) -> float | None:
        """Of the text, per token; None if it was not measured."""
        nats = self.nats_per_token
        return nats if nats is None else math.exp(nats) if nats < LARGEST_EXPONENT else math.inf

    def as_json(self) -> dict[str, Any]:
        """What programs read."""
        text = {"num_tokens": self.num_tokens, "nats_per_token": self.nats_per_token, "perplexity": self.perplexity}
        return {
            "location": self.location,
            "sound": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "format": self.form,
            "num_parameters": self.num_parameters,
            "scales": self.scales,
            "layers": [{"layer": block, **_named_shares(shares)} for block, shares in sorted(self.blocks.items())],
            "matrices": {name: _named_shares(shares) for name, shares in self.shares.items()},
            "text": None if self.nats_per_token is None else without_nan(text),
        }


def _named_shares(shares: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("minus", "zero", "plus"), shares, strict=True))


def judge(
    published: Published, text: str | None = None, place: str = "", tokenizer: Tokenizer | None = None
) -> Verdict:
    """Read a model once to look at its parameters, and again to compute with it.

    Args:
        published: the model.
        text: to measure it on; None leaves that out.
        place: where the text is from.
        tokenizer: of the model; by default its own.
    """
    verdict = Verdict(published.location, published.form, published.problems, published.notes)
    levels = _look_at_parameters(published, verdict)
    if tied := published.tied_problem():
        verdict.problems.append(tied)
    tokenizer = _fitting(published, verdict, tokenizer)
    damaged = bool(verdict.problems)
    if levels or text is not None:
        _compute(published, verdict, levels, tokenizer, text, place, damaged=damaged)
    return verdict


def _look_at_parameters(published: Published, verdict: Verdict) -> dict[str, float]:
    """Look for what no trained parameter has; returns the mean level of each coded matrix."""
    expected = parameter_shapes(published.config) if published.config else {}
    found: dict[str, list[str]] = defaultdict(list)
    counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.int64))
    levels: dict[str, float] = {}
    for name in published.stored:
        try:
            weights = published.read(name)
        except CheckpointError as error:
            verdict.problems.append(f"{error}; take another copy of this file, or export the model again")
            continue
        values = weights.codes if isinstance(weights, Coded) else weights
        verdict.num_parameters += values.numel()
        if name in expected and tuple(values.shape) != expected[name]:
            verdict.problems.append(f"{name} is {tuple(values.shape)}, and the architecture has {expected[name]}")
        numbers = weights.level if isinstance(weights, Coded) else weights
        bad = int((~numbers.isfinite()).sum())
        if bad:
            what = "scales" if isinstance(weights, Coded) else "values"
            verdict.problems.append(
                f"{name}: {bad} of {numbers.numel()} {what} are NaN or infinite, the first at "
                f"{tuple((~numbers.isfinite()).nonzero()[0].tolist())}; export the model again from a sound checkpoint"
            )
        if not values.any() and not name.endswith(".bias"):
            found["zero"].append(name)
        if isinstance(weights, Coded):
            levels |= _look_at_codes(name, weights, published, verdict, found, counts)
    for kind, sentence in SENTENCES.items():
        if found[kind]:
            verdict.problems.append(sentence.format(number=counted(found[kind], "parameter"), names=named(found[kind])))
    verdict.blocks = {block: _shares(each) for block, each in counts.items()}
    return levels


SENTENCES = {
    "zero": "{number} with zeros only: {names}; what should be there was lost. Export the model again",
    "constant": "{number} with the same code everywhere: {names}; no training leaves that. Export the model again",
    "sign": "{number} with scales that are 0 or negative: {names}; scales must be positive. Export the model again",
}


def _look_at_codes(
    name: str,
    weights: Coded,
    published: Published,
    verdict: Verdict,
    found: dict[str, list[str]],
    counts: dict[int, Tensor],
) -> dict[str, float]:
    codes_OI, level = weights
    numbers = torch.stack([(codes_OI == code).sum() for code in (-1, 0, 1)])
    other = codes_OI.numel() - int(numbers.sum())
    if other and (published.only_ternary or other < FEW * codes_OI.numel()):
        verdict.problems.append(
            f"{name}: {other} of {codes_OI.numel()} codes are none of -1, 0 and +1; the file is damaged, or its bytes "
            "are arranged in another way. Export the model again"
        )
    elif other:
        verdict.notes.append(f"{name} has codes of 2 bits other than -1, 0 and +1: it is not ternary")
        return {}
    if codes_OI.numel() > 1 and codes_OI.any() and (codes_OI == codes_OI[0, 0]).all():
        found["constant"].append(name)
    verdict.shares[name] = _shares(numbers)
    if is_in_block(name):
        counts[block_of(name)] += numbers
    used = level[level != 0] if codes_OI.any() else level.new_empty(0)
    if (level < 0).any() or (codes_OI.any() and not len(used)):
        found["sign"].append(name)
    return {name: used.abs().mean().item()} if len(used) else {}


def _shares(numbers: Tensor) -> tuple[float, float, float]:
    minus, zero, plus = (numbers / max(int(numbers.sum()), 1)).tolist()
    return minus, zero, plus


def _fitting(published: Published, verdict: Verdict, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer, if there is one that fits the vocabulary."""
    try:
        tokenizer = tokenizer or published.tokenizer()
    except DataError as error:
        verdict.notes.append(f"its tokenizer was not read: {error}")
        return None
    if tokenizer is None:
        verdict.notes.append("it has no tokenizer that is read here")
        return None
    rows = published.config.vocab_size if published.config else None
    if rows is not None and tokenizer.vocab_size > rows:
        verdict.problems.append(
            f"its tokenizer has {tokenizer.vocab_size} tokens and the embedding {rows} rows; it is the tokenizer of "
            "another model, or the embedding was not enlarged. Put the right one into the folder"
        )
        return None
    if rows is not None and tokenizer.vocab_size < rows // 2:
        verdict.notes.append(f"its tokenizer has only {tokenizer.vocab_size} of {rows} tokens; is it the right one?")
    return tokenizer


def _compute(
    published: Published,
    verdict: Verdict,
    levels: dict[str, float],
    tokenizer: Tokenizer | None,
    text: str | None,
    place: str,
    *,
    damaged: bool,
) -> None:
    """Find out whether the scales or their reciprocals are right, and how well the model predicts a text."""
    verdict.scales = "not decided" if levels else "no codes"
    reason = (
        "its architecture is not known"
        if published.config is None
        else "it has no tokenizer that fits"
        if tokenizer is None
        else "of the problems above"
        if damaged
        else None
    )
    suspects = _suspects(levels)
    if reason:
        if text is not None:
            verdict.problems.append(f"the perplexity on {place} was not measured, because {reason}")
        if suspects:
            verdict.problems.append(_suspicion(suspects, levels))
        elif levels:
            verdict.notes.append(f"whether scales are s or 1/s was not tried, because {reason}")
        return
    assert published.config is not None
    assert tokenizer is not None
    uniform = math.log(tokenizer.vocab_size)
    try:
        if levels:
            rows = _rows(published, tokenizer, text or SAMPLE, SAMPLE_TOKENS)
            _decide(published, verdict, levels, suspects, rows, uniform)
        if text is not None:
            rows = _rows(published, tokenizer, text, MOST_TOKENS)
            nats = streamed_nll(published, rows)
            verdict.nats_per_token, verdict.num_tokens = math.fsum(nats) / len(nats), len(nats)
            if not verdict.nats_per_token < uniform:
                verdict.problems.append(
                    f"{place} costs {verdict.nats_per_token:.2f} nats per token, and guessing among "
                    f"{tokenizer.vocab_size} tokens {uniform:.2f}: the model predicts nothing. Its weights, scales or "
                    "tokenizer are not those of a trained model, or the text is in a language that it does not know"
                )
    except (CheckpointError, DataError) as error:
        verdict.problems.append(f"the model could not be computed: {error}")


def _suspects(levels: dict[str, float]) -> list[str]:
    """Matrices whose level is nearer to the reciprocal of what is usual for their kind than to that itself."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in levels:
        kinds[name.split(".")[-2] if "." in name else name].append(name)
    found = []
    for names in kinds.values():
        usual = torch.tensor([math.log(levels[name]) for name in names]).median().item()
        found += [name for name in names if abs(math.log(levels[name]) - usual) > abs(math.log(levels[name]) + usual)]
    return [name for name in levels if name in set(found)]


def _suspicion(suspects: list[str], levels: dict[str, float]) -> str:
    other = {kind.split(".")[-2] for kind in suspects}
    usual = [level for name, level in levels.items() if name not in suspects and name.split(".")[-2] in other]
    beside = f", elsewhere in such layers {sum(usual) / len(usual):.3g}" if usual else ""
    return (
        f"{counted(suspects, 'matrix')} with a scale that looks like its reciprocal ({levels[suspects[0]]:.3g}"
        f"{beside}): {named(suspects)}; export the model again, or store 1/scale there"
    )


def _decide(
    published: Published,
    verdict: Verdict,
    levels: dict[str, float],
    suspects: list[str],
    rows: list[list[int]],
    uniform: float,
) -> None:
    """Compare the loss with scales as they are declared, all inverted, and some inverted."""

    def loss(inverted: Collection[str]) -> float:
        nats = streamed_nll(published, rows, inverted)
        return math.fsum(nats) / len(nats) if all(map(math.isfinite, nats)) else math.inf

    declared, other = loss(()), loss(levels.keys())
    some = loss(suspects) if suspects else math.inf
    best = min(declared, other, some)
    if best >= uniform - DECISIVE_NATS or (best < declared and declared - best < DECISIVE_NATS):
        if suspects:
            verdict.problems.append(_suspicion(suspects, levels))
        else:
            verdict.notes.append(
                f"whether scales are s or 1/s was not decided: a text costs {declared:.2f} nats per token in one way "
                f"and {other:.2f} in the other, and guessing {uniform:.2f}; --text names a text that the model knows"
            )
        return
    if best == declared:
        verdict.scales = "as declared"
    elif best == some:
        verdict.problems.append(_suspicion(suspects, levels))
        verdict.scales = "inverted"
    else:
        verdict.scales = "inverted"
        verdict.problems.append(
            f"scales are stored as their reciprocals: a text costs {declared:.2f} nats per token with them, and "
            f"{other:.2f} with 1/scale. {_remedy(published)}"
        )


def _remedy(published: Published) -> str:
    if "BitNet" in published.form:
        wrong, right = ("bitlinear", "autobitlinear")[:: -1 if "autobitlinear" in published.form else 1]
        return f'Set "linear_class" in config.json to "{right}"; "{wrong}" is not what wrote them'
    return "Export the model again, with 1/scale"


def _rows(published: Published, tokenizer: Tokenizer, text: str, most: int) -> list[list[int]]:
    """The first tokens of a text in windows, after the token that texts begin with.

    A window begins with the last token of the one before, as in `tritrain perplexity`.

    Raises:
        DataError: the text has none.
    """
    config = published.config
    assert config is not None
    tokens: Sequence[int] = tokenizer.encode(text)[:most]
    if not tokens:
        raise DataError("the text is empty")
    first = tokenizer.end_of_document if published.first_token is None else published.first_token
    width = min(WINDOW_TOKENS, config.max_sequence_length)
    stream = [first, *tokens]
    return [stream[start : start + width + 1] for start in range(0, len(tokens), width)]
