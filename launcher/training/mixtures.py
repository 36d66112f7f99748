"""The data of a run's phases: all of them are checked when the run starts, and counted as they are drawn.

Each phase has one `DataConfig` (`Course.data_of`), from which `launcher.training.step.open_data` opens a stream at the
step's position. Only the stream of the present phase is open. The small files of the others are read at the start, so
that a folder that is missing is not found hours later.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import TrainingData, fingerprints
from data.mixture import Source
from data.sources import template_path
from launcher.plan.plan import Plan
from launcher.process.console import human_count
from launcher.process.ranks import Ranks
from launcher.run.log_keys import DRAWN
from launcher.run.metrics_log import MetricsLog

JOINED_BY = "+"


def phase_fingerprints(plan: Plan, ranks: Ranks, data: TrainingData) -> tuple[str, ...]:
    """Return, for each phase, the fingerprint of the mixtures that are used up to it; a collective.

    It is that of one mixture after the other, in order of first use. So that of a run with one mixture is its own.

    Args:
        plan: of the run.
        ranks: this rank among all.
        data: of one of its phases, open.

    Raises:
        DataError: the data of a phase are missing, or do not fit those of another.
    """
    config = plan.config.data
    mixtures = list(dict.fromkeys(phase.sources for phase in plan.phases))
    if mixtures == [config.sources]:
        return (data.fingerprint,) * len(plan.phases)
    found = fingerprints(
        config,
        [plan.data_of(next(phase for phase in plan.phases if phase.sources == sources)) for sources in mixtures],
        vocab_size=plan.config.model.vocab_size,
        global_batch_sequences=plan.batch.unit,
        rank=ranks.rank,
    )
    return tuple(
        JOINED_BY.join(found[: 1 + max(mixtures.index(phase.sources) for phase in plan.phases[: index + 1])])
        for index in range(len(plan.phases))
    )


def template_of(plan: Plan) -> Path | None:
    """The chat template of a run's chats, on this machine once the data were opened; None of a run without chats."""
    sources = (phase.sources[0] for phase in plan.phases if phase.objective != "next-token")
    first = next(sources, None)
    return None if first is None else template_path(first, plan.config.data.cache)


class DrawnTokens:
    """Counts the tokens that are drawn from each source, over all ranks and all starts of a run.

    Args:
        plan: of the run. A run with a single source needs no counts, and has none.
        ranks: this rank among all.
        log: of the run, which has the counts of earlier starts; None on ranks that do not write it.
    """

    def __init__(self, plan: Plan, ranks: Ranks, log: MetricsLog | None) -> None:
        self._paths = list(dict.fromkeys(source.path for phase in plan.phases for source in phase.sources))
        self._row_tokens, self._device = plan.config.data.sequence_length, ranks.device
        self._rows = torch.zeros(len(self._paths), dtype=torch.int64)
        self._by_phase = dict(log.drawn) if log else {}

    def add(self, sources: tuple[Source, ...], rows: Tensor) -> None:
        """Count rows of this rank, int64, [sources]."""
        for source, count in zip(sources, rows.tolist(), strict=True):
            self._rows[self._paths.index(source.path)] += count

    def log(self, phase: int) -> Mapping[str, int]:
        """Return the tokens of the run so far by their key in the log; a collective."""
        if len(self._paths) < 2:
            return {}
        rows = self._rows.to(self._device, copy=True)
        dist.all_reduce(rows)
        self._rows.zero_()
        tokens = dict(self._by_phase[max(self._by_phase)]) if self._by_phase else {}
        for path, count in zip(self._paths, rows.tolist(), strict=True):
            if count:
                tokens[DRAWN + path] = tokens.get(DRAWN + path, 0) + count * self._row_tokens
        self._by_phase[phase] = tokens
        return tokens

    def sentence(self, phase: int) -> str | None:
        """The tokens of a phase by source, in words; None of a run with a single source."""
        if phase not in self._by_phase:
            return None
        before = self._by_phase[max(earlier)] if (earlier := [each for each in self._by_phase if each < phase]) else {}
        tokens = {key: count - before.get(key, 0) for key, count in self._by_phase[phase].items()}
        total = sum(tokens.values())
        shares = [
            f"{human_count(count)} tokens ({count / total:.1%}) from {key.removeprefix(DRAWN)}"
            for key, count in tokens.items()
            if count
        ]
        return f"phase {phase} has drawn {', '.join(shares)}" if shares else None
