"""The excess of a run over its 16-bit twin: a run that goes on in 16 bits from where this one switches.

A run that began from a checkpoint (`checkpoint.start_from`, `tritrain convert`) has no steps before its switch in its
log, so what the switch did shows only against the run that the checkpoint is of. Both are compared at equal tokens,
those before the checkpoint included. If they see the same batches, logged losses are subtracted; otherwise their
levels, since batches differ by more than most effects.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.checkpoint.folders import MANIFEST, complete_checkpoints
from launcher.config.averaging import without_averaged
from launcher.config.file import parse_yaml
from launcher.errors import ConfigError
from launcher.report.history import LOSS, History, curves
from launcher.report.plots import INK, RUN_COLOURS, figure_of, styled, thin, token_axis
from launcher.report.runs import find_run
from launcher.report.summary import RunSummary, summarize
from launcher.run.level import Curve, highest_level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT = "validation/loss"

OBSERVING = ("workers", "cache", "prepare", "validation_rows")
"""Keys of `data` that change no batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Excess:
    """How far a run is above its twin from its switch on."""

    twin: str
    """The twin's name."""
    tokens: NDArray[np.float64]
    """[N] of the run, in the middle of what each value is of."""
    values: NDArray[np.float64]
    """[N] in nats per token."""
    weights: NDArray[np.float64]
    """[N] tokens that each value stands for."""
    same_batches: bool
    """Whether logged losses are compared, and not levels."""
    offset_tokens: int
    """Tokens before the run's checkpoint that its own count leaves out."""
    at_end: float | None
    """Difference of the held-out losses at the run's last step, in nats per token, if the twin is in 16 bits there."""

    @property
    def peak(self) -> float:
        """The highest level of the difference, in nats per token."""
        return highest_level(Curve(at=self.tokens, num_steps=np.maximum(self.weights, 1), values=self.values))[0]

    @property
    def area(self) -> float:
        """The differences times their tokens, summed, in nats."""
        return float(self.values @ self.weights)


@styled()
def excess_figure(excess: Excess) -> "Figure":
    """Draw how far a run is above its twin over its tokens."""
    figure = figure_of(9, 2.8)
    axes, kept = figure.subplots(), thin(excess.values, 300)
    axes.axhline(0, color=INK, lw=0.8)
    axes.plot(excess.tokens[kept], excess.values[kept], color=RUN_COLOURS[0], lw=1.3, gid="excess")
    axes.set_ylabel("above its twin, nats/token")
    token_axis(axes)
    return figure


def find_twin(run: Path) -> Path | None:
    """The run whose checkpoint a run began with, if it is still where it was and has a log; None without one."""
    source = _source_of(run)
    folder = None if source is None else source.parent.parent
    return folder if folder is not None and (folder / "metrics.jsonl").is_file() and folder != run else None


def excess_over(run: RunSummary, twin: Path) -> Excess | None:
    """Compare a run with its twin; None if the twin has no 16-bit steps after the run's switch, or the run no others.

    Raises:
        FileNotFoundError, LogError: the twin is no run, or its log is damaged.
    """
    other = summarize(twin)
    begin = next((span.first_tokens for span in run.history.phases if span.precision == "ternary"), None)
    if begin is None or LOSS not in run.history.series or LOSS not in other.history.series:
        return None
    offset = _offset_of(run, other.history)
    ours, theirs = _by_tokens(run.history, begin), _by_tokens(other.history, 0, precision="16-bit")
    common = sorted(part for part in ours if (part[0] + offset, part[1] + offset) in theirs)
    same_batches = not offset and bool(common) and _batches_of(run) == _batches_of(other)
    if same_batches:
        tokens = np.asarray([(first + last) / 2 for first, last in common])
        values = np.asarray([ours[part] - theirs[part] for part in common])
        weights = np.asarray([float(last - first) for first, last in common])
    else:
        tokens, values = _between_levels(run.history, other.history, begin, offset)
        weights = np.gradient(tokens) if len(tokens) > 1 else np.zeros(len(tokens))
    if not len(values):
        return None
    return Excess(
        twin=other.name,
        tokens=tokens,
        values=values,
        weights=weights,
        same_batches=same_batches,
        offset_tokens=offset,
        at_end=_at_end(run.history, other.history, offset),
    )


def named_excess(run: RunSummary, twin: Path) -> Excess:
    """As `excess_over`, for a twin that a person has named.

    Raises:
        ConfigError: it is no run, or has nothing to compare with.
    """
    try:
        found = excess_over(run, find_run(twin))
    except (ConfigError, FileNotFoundError) as error:
        raise ConfigError(f"--twin {error}") from None
    if found is None:
        raise ConfigError(f"--twin {twin}: has no logged 16-bit steps after the switch of {run.name} to compare with")
    return found


def _source_of(run: Path) -> Path | None:
    """The checkpoint that a run began with: by its configuration, or by the record of its conversion."""
    config = parse_yaml((run / "config.yaml").read_text(), str(run / "config.yaml"))
    source = (config.get("checkpoint") or {}).get("start_from")
    for folder in complete_checkpoints(run / "checkpoints")[-1:] if source is None else ():
        manifest = _manifest_of(folder)
        source = (manifest.get("provenance") or {}).get("source")
    return Path(without_averaged(source)) if isinstance(source, str) and "://" not in source else None


def _manifest_of(checkpoint: Path) -> dict[str, Any]:
    try:
        found = json.loads((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _offset_of(run: RunSummary, twin: History) -> int:
    """Tokens that the checkpoint was trained on and the run does not count as its own."""
    source = _source_of(run.folder)
    if source is None:
        return 0
    tokens = _manifest_of(source).get("tokens")
    if not isinstance(tokens, int) and source.name.startswith("step-"):  # the checkpoint is gone
        steps = twin.series[LOSS]
        tokens = round(float(np.interp(int(source.name[5:]), steps.steps, steps.tokens)))
    return tokens - run.history.phases[0].first_tokens if isinstance(tokens, int) else 0


def _batches_of(run: RunSummary) -> Any:
    """What decides which batches a run sees."""
    data = dict(parse_yaml(run.config_text, "config.yaml").get("data") or {})
    return {key: value for key, value in data.items() if key not in OBSERVING}


def _by_tokens(history: History, begin: int, precision: str | None = None) -> dict[tuple[int, int], float]:
    """Training losses from a place on, by the tokens before and after the steps that each is the mean of."""
    found: dict[tuple[int, int], float] = {}
    for span in history.phases:
        if precision in (None, span.precision):
            part = history.series[LOSS].of_phase(span.index)
            firsts = [span.first_tokens, *part.tokens.tolist()]
            for first, last, value in zip(firsts, part.tokens.tolist(), part.values.tolist(), strict=False):
                if first >= begin and np.isfinite(value):
                    found[first, last] = value
    return found


def _between_levels(
    run: History, twin: History, begin: int, offset: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ours, theirs = _levels(run, "ternary"), _levels(twin, "16-bit")
    at = ours[0] + offset
    keep = (ours[0] >= begin) & (at >= theirs[0].min(initial=np.inf)) & (at <= theirs[0].max(initial=-np.inf))
    if not keep.any():
        return np.empty(0), np.empty(0)
    return ours[0][keep], ours[1][keep] - np.interp(at[keep], *theirs)


def _levels(history: History, precision: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    phases = {span.index for span in history.phases if span.precision == precision}
    parts = [curve for curve in curves(history, LOSS) if curve.phase in phases]
    if not parts:
        return np.empty(0), np.empty(0)
    return np.concatenate([part.level_tokens for part in parts]), np.concatenate([part.levels for part in parts])


def _at_end(run: History, twin: History, offset: int) -> float | None:
    if HELD_OUT not in run.series or HELD_OUT not in twin.series:
        return None
    ours = run.series[HELD_OUT]
    there: dict[int, float] = {}
    for span in twin.phases:
        if span.precision == "16-bit":
            theirs = twin.series[HELD_OUT].of_phase(span.index)
            there |= dict(zip(theirs.tokens.tolist(), theirs.values.tolist(), strict=True))
    other = there.get(int(ours.tokens[-1]) + offset)
    return None if other is None else float(ours.values[-1]) - other
