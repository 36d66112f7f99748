"""The page about a study."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from launcher.process.console import human_count
from launcher.report.elements import MISSING, html_figure, html_page, html_table
from launcher.report.plots import to_svg
from launcher.study.analysis import (
    SCRATCH,
    SIXTEEN,
    Gap,
    Group,
    against_best,
    best_of,
    dense_of,
    effects_of,
    gaps_of,
    scratches_of,
)
from launcher.study.config import NO_BASELINE
from launcher.study.figures import above_dense, arms_of, has_switch_axis
from launcher.study.held_equal import FIRST, differing, held_equal, sizes
from launcher.study.intervals import Estimate
from launcher.study.reading import Findings
from launcher.study.table import ENOUGH_TOKENS
from launcher.study.token_figure import token_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 12
"""Differences from the best arm, and values of a key, that the page shows."""

CAPTIONS = {
    "loss": (
        "Training loss",
        "A panel for each combination of the other axes. Above: faint, each seed; bold, their mean. Arms are drawn "
        "from their switch on, since before it they are their 16-bit twin. Below: the same minus the loss of the twin, "
        "or of the 16-bit baseline for what does not switch, on the same batches; dots mark the switches. High spikes "
        "leave the axis.",
    ),
    "switch": (
        "When to switch",
        "Mean over seeds with its 95 % interval. Intervals of absolute losses include the spread between seeds, which "
        "all arms share; on the right it is taken out, by subtracting the 16-bit baseline of the same seed. Points are "
        "moved sideways a little, so that their intervals can be told apart.",
    ),
    "gap": (
        "Share of the fair gap",
        "0: ternary from scratch with the best quantizer of this study. 100: 16 bits. Intervals are Fieller's, for "
        "95 %, paired by seed. Read it beside the absolute losses: the share moves with both ends.",
    ),
    "excess": (
        "What the switch costs",
        "Above the 16-bit twin at equal tokens: the highest level of the difference of training losses after the "
        "switch; the differences times their tokens, summed; and the difference of the held-out losses at the end. A "
        "peak that is no higher than the end is no spike, but what ternary costs. An arm whose learning rate differs "
        "from that of all twins in the second half of the steps after its switch is not shown.",
    ),
    "tokens": (
        "How much data",
        "Against the tokens that are trained in ternary. Left: the held-out loss above the 16-bit baseline of as many "
        "tokens, paired by seed, mean and 95 % interval, which is cut at a fifth of the mean where it reaches 0; lines "
        "are power laws. Right: the losses themselves.",
    ),
    "arms": (
        "All arms",
        "Left: a dot for each seed, a diamond for their mean. Right: the difference from the best arm, paired by seed, "
        "with its 95 % interval; hollow where it is within noise.",
    ),
}

METHOD = (
    "Intervals are two-sided, for 95 %, by Student's t over seeds; n is the number of seeds. Differences are taken "
    "within seeds. Ratios have Fieller's interval (1954). “Within noise” means that the interval holds 0. No "
    "interval is corrected for the number of comparisons: of 20 differences that are none, one is called one. Learning "
    "rates are chosen by the held-out loss that is reported, which favors what was tried at more rates."
)


def study_page(findings: Findings, groups: Sequence[Group], figures: "Mapping[str, Figure]") -> str:
    """The HTML page about a study; it loads nothing from elsewhere."""
    return html_page(
        f"Study: {findings.folder.resolve().name}", _verdicts(findings, groups), _body(findings, groups, figures)
    )


def _verdicts(findings: Findings, groups: Sequence[Group]) -> Iterator[str]:
    complete = [record for record in findings.records if record.status == "complete"]
    without = sum(record.loss is None for record in complete)
    but = f", {without} of them without a held-out loss at the end" if without else ""
    yield f"<p>{len(complete)} of {len(findings.records)} arms are complete{but}.</p>"
    best = best_of(groups)
    if best is None:
        is_complete = any(
            each.status == "complete" and each.point["baseline"] == NO_BASELINE for each in findings.records
        )
        reason = "complete arms have no held-out loss" if is_complete else "no arm of the grid is complete yet"
        yield f'<p class="verdict">There is nothing to compare: {reason}.</p>'
        return
    yield f'<p class="verdict">{escape(_sentence(best, groups))}</p>'
    for record in findings.records:
        if record.num_damaged:
            yield (
                f"<p>Warning: {record.num_damaged} lines of the log of {escape(record.name)} are damaged, and what "
                "they said is missing here.</p>"
            )
    for sentence in _cautions(findings, groups, best):
        yield f"<p>{escape(sentence)}</p>"


def _sentence(best: Group, groups: Sequence[Group]) -> str:
    text = f"The best arm is {best.name}: {interval(best.mean('held_out_loss'), 4)} nats per token"
    text += f" ({interval(best.mean('held_out_bits_per_byte'), 4)} bits per byte)."
    above = above_dense(best, groups)
    if above is not None:
        text += f" That is {signed_interval(above)} from 16 bits at equal tokens, paired by seed."
    gaps = gaps_of(best, groups)
    if gaps and (share := gaps[0].share_of(best)) is not None:
        known = "fair gap" if not gaps[0].problems else "gap (see below why it may not be fair, or say little)"
        text += f" It closes {percent(share)} of the {known}, {signed_interval(gaps[0].size)} nats per token."
    return text


def _cautions(findings: Findings, groups: Sequence[Group], best: Group) -> Iterator[str]:
    """What the study cannot say, and why."""
    num_arms = sum(bool(group.losses) for group in arms_of(groups))
    if num_arms > 1:
        yield (
            f"It is the best of {num_arms} arms, chosen by the losses that are shown here, which favors luck: on other "
            "seeds expect less of it."
        )
    if all(len(group.members) < 2 for group in groups):
        yield "There is one seed, so nothing says what is noise; seeds often differ by more than recipes do."
    for baseline, own in ((SIXTEEN, dense_of(best, groups)), (SCRATCH, scratches_of(best, groups))):
        if not any(group.baseline == baseline and group.losses for group in groups):
            yield f"There is no complete {baseline} baseline, so no gap can be measured, nor a share of it."
        elif not own:
            yield (
                f"Warning: no complete {baseline} baseline has the architecture, optimizer and schedule of the best "
                "arm. What sets it apart from baselines with others may be these alone; add its own."
            )
    if not has_switch_axis(groups):
        yield "No switch points are compared, so nothing here says when to switch."
    ratios = [ratio for record in findings.records if (ratio := record.tokens_per_parameter) is not None]
    if ratios and min(ratios) < ENOUGH_TOKENS:
        yield (
            f"Warning: {min(ratios):.1f} tokens per ternary parameter. Below {ENOUGH_TOKENS} a 16-bit model is not "
            "trained enough, and rounding it costs little, whatever the recipe."
        )
    tokens = {record.arm.tokens for record in findings.records if record.arm is not None}
    if len(tokens) > 1:
        yield (
            f"Warning: arms have {human_count(min(tokens))} to {human_count(max(tokens))} tokens; losses at different "
            "numbers of tokens do not compare."
        )
    ties = [
        each for each in against_best(groups) if each.first.baseline == NO_BASELINE and each.by_seed.is_within_noise
    ]
    if ties:
        named = "; ".join(each.first.name for each in ties[:3])
        more = f" and {len(ties) - 3} more" if len(ties) > 3 else ""
        yield f"Within noise of the best arm, paired by seed: {named}{more}."


def _body(findings: Findings, groups: Sequence[Group], figures: "Mapping[str, Figure]") -> Iterator[str]:
    for name in ("switch", "gap", "tokens", "loss", "excess", "arms"):
        if name in figures:
            title, caption = CAPTIONS[name]
            yield f"<h2>{title}</h2>"
            yield html_figure(to_svg(figures[name], f"study-{name}", title), caption)
        if name == "gap":
            yield from _gaps(groups)
        if name == "tokens" and name in figures:
            yield html_table(_TOKEN_COLUMNS, token_rows(groups))
    yield "<h2>Arms in numbers</h2>"
    yield html_table(_ARM_COLUMNS, (_arm_row(group, groups) for group in groups))
    yield f'<p class="note">{METHOD}</p>'
    yield from _differences(groups)
    yield from _equal(findings)
    yield from _without_result(findings)


_ARM_COLUMNS = (
    "Arm",
    "Seeds",
    "Learning rate",
    "Held-out, nats/token",
    "Bits/byte",
    "Above 16 bits, paired",
    "Share of fair gap",
    "Excess: peak",
    "Excess: area, nats",
    "Excess: end",
)


def _arm_row(group: Group, groups: Sequence[Group]) -> tuple[str, ...]:
    gaps = gaps_of(group, groups) if group.losses and group.baseline not in (SIXTEEN, SCRATCH) else []
    rate = MISSING if group.rate is None else f"{group.rate}, best of {len(group.rates)}"
    area = group.mean("excess_area")
    return (
        group.name,
        f"{len(group.losses)} of {group.num_seeds}",
        rate,
        interval(group.mean("held_out_loss"), 4),
        interval(group.mean("held_out_bits_per_byte"), 4),
        signed_interval(above_dense(group, groups)),
        percent(gaps[0].share_of(group)) if gaps else MISSING,
        _peak(group),
        MISSING if area is None else human_count(area.mean),
        signed_interval(group.mean("excess_at_end")),
    )


def _peak(group: Group) -> str:
    """The excess's peak, and where it is."""
    peak, steps = group.mean("excess_peak"), group.mean("excess_peak_steps")
    if peak is None or steps is None:
        return MISSING
    return f"{interval(peak, 3)}, at step {steps.mean:.0f}"


_TOKEN_COLUMNS = (
    "Arms",
    "Exponent",
    "Twice the tokens multiply the distance by",
    "Floor, nats/token",
    "Ternary tokens",
)


def _gaps(groups: Sequence[Group]) -> Iterator[str]:
    """The fair gaps and why one may not be; and the best share of each gap, the fair one first."""
    found: dict[tuple[str, str], tuple[bool, Gap, Group]] = {}
    for group in arms_of(groups):
        for position, gap in enumerate(gaps_of(group, groups) if group.losses else []):
            key = (gap.dense.name, gap.scratch.name)
            best = found.get(key)
            if best is None or _share(gap.share_of(group)) > _share(best[1].share_of(best[2])):
                found[key] = (position == 0, gap, group)
    if not found:
        return
    yield "<h2>Gaps</h2>"
    rows = []
    for is_fair, gap, group in sorted(found.values(), key=lambda each: (each[1].dense.name, not each[0])):
        sigmas = MISSING if gap.size.sigmas is None else f"{gap.size.sigmas:.1f}"
        kind = "fair gap" if is_fair else "gap to another scratch"
        name = f"{kind}: {gap.scratch.name} minus {gap.dense.name}"
        rows.append((name, signed_interval(gap.size), sigmas, percent(gap.share_of(group)), group.name))
    yield html_table(("Gap", "Size, nats/token", "Standard errors", "Largest share closed", "By"), rows)
    yield (
        '<p class="note">The fair gap is between 16 bits and ternary from scratch with the same architecture, '
        "optimizer and schedule and the best quantizer of this study, each at its best learning rate. A share of "
        "another gap mostly says how bad that scratch is.</p>"
    )
    problems = dict.fromkeys(
        f"{gap.scratch.name} minus {gap.dense.name}: {problem}."
        for _, gap, _ in found.values()
        for problem in gap.problems
    )
    if problems:
        yield "<ul>" + "".join(f"<li>{escape(problem)}</li>" for problem in problems) + "</ul>"


def _share(estimate: Estimate | None) -> float:
    return -math.inf if estimate is None or not math.isfinite(estimate.mean) else estimate.mean


def _differences(groups: Sequence[Group]) -> Iterator[str]:
    effects = effects_of(groups)
    yield "<h2>Differences</h2>"
    if effects:
        rows = (
            (f"{axis}: {value} minus {first}", signed_interval(estimate), noise(estimate), f"{pairs}")
            for axis, value, first, estimate, pairs in effects
        )
        yield html_table(("All else equal", "Nats/token, paired by seed", "", "Pairs of arms averaged"), rows)
    yield from _excess_effects(groups)
    nearest = against_best(groups)
    if nearest:
        best = best_of(groups)
        assert best is not None
        rows_of_best = (
            (
                each.first.name,
                signed_interval(each.by_seed),
                noise(each.by_seed),
                MISSING if each.by_row is None else signed_interval(each.by_row),
            )
            for each in nearest[:MOST_SHOWN]
        )
        yield f"<h3>Minus {escape(best.name)}, the best arm</h3>"
        yield html_table(
            ("Arm", "Nats/token, paired by seed", "", "Paired by held-out row, for these models"), rows_of_best
        )
        if len(nearest) > MOST_SHOWN:
            yield f'<p class="note">The {MOST_SHOWN} nearest of {len(nearest)}; all are in the JSON file.</p>'
    if not effects and not nearest:
        yield "<p>No two arms have a complete seed in common.</p>"


def _excess_effects(groups: Sequence[Group]) -> Iterator[str]:
    """What each axis changes in the excess over the twin."""
    columns = ("excess_peak", "excess_area", "excess_at_end")
    found: dict[str, dict[str, Estimate]] = {}
    for column in columns:
        for axis, value, first, estimate, _ in effects_of(groups, column):
            found.setdefault(f"{axis}: {value} minus {first}", {})[column] = estimate
    if found:
        rows = (
            (name, *(_effect(effects.get(column), column) for column in columns)) for name, effects in found.items()
        )
        yield "<h3>What an axis changes in the excess over the twin</h3>"
        yield html_table(("All else equal", "Peak, nats/token", "Area, nats", "At the end, nats/token"), rows)


def _effect(estimate: Estimate | None, column: str) -> str:
    if estimate is None:
        return MISSING
    is_noise = ", within noise" if estimate.is_within_noise else ""
    if column != "excess_area":
        return signed_interval(estimate) + is_noise
    ends = [] if estimate.low is None or estimate.high is None else [estimate.low, estimate.high]
    words = [human_count(abs(value)) if value >= 0 else f"-{human_count(-value)}" for value in (estimate.mean, *ends)]
    text = f"{words[0]} ({words[1]} to {words[2]})" if ends else words[0]
    return text.replace("-", "\N{MINUS SIGN}") + is_noise


def _equal(findings: Findings) -> Iterator[str]:
    equal, differ = held_equal(findings), differing(findings)
    if not equal:
        return
    yield "<h2>Held equal</h2>"
    first = {key: equal[key] for key in FIRST if equal.get(key, "null") != "null"}
    yield html_table(("Key", "Value"), (sizes(findings) | first).items())
    everything = "\n".join(f"{key}: {value}" for key, value in equal.items())
    yield f"<details><summary>All {len(equal)} keys</summary><pre>{escape(everything)}</pre></details>"
    yield "<h3>Different between arms</h3>"
    rows = []
    for key, values in differ.items():
        shown = ", ".join(value or "(none)" for value in values[:MOST_SHOWN])
        rows.append((key, shown + (f" and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else "")))
    yield html_table(("Key", "Values"), rows)


def _without_result(findings: Findings) -> Iterator[str]:
    left = [record for record in findings.records if record.loss is None]
    if left:
        yield "<h2>Arms without a result</h2>"
        rows = ((each.name, each.status, f"{each.row.get('steps') or 0:,}", each.message or MISSING) for each in left)
        yield html_table(("Arm", "Status", "Steps", "Message"), rows)


def interval(estimate: Estimate | None, digits: int) -> str:
    """A mean with half of its interval, and n if there is none."""
    if estimate is None:
        return MISSING
    text = f"{estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} \N{PLUS-MINUS SIGN} {(estimate.high - estimate.low) / 2:.{digits}f}"


def signed_interval(estimate: Estimate | None) -> str:
    """A difference with its interval."""
    if estimate is None:
        return MISSING
    text = f"{estimate.mean:+.4f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" ({estimate.low:+.4f} to {estimate.high:+.4f})"
    return text.replace("-", "\N{MINUS SIGN}")


def percent(estimate: Estimate | None) -> str:
    """A share with its interval, in percent."""
    if estimate is None or not math.isfinite(estimate.mean):
        return MISSING
    text = f"{100 * estimate.mean:.0f} %"
    if estimate.has_interval:
        text += f" ({100 * (estimate.low or 0):.0f} to {100 * (estimate.high or 0):.0f})"
    elif estimate.low is not None:
        text += " (no limits: the gap itself is within noise)"
    return text.replace("-", "\N{MINUS SIGN}")


def noise(estimate: Estimate) -> str:
    """Whether a difference is noise."""
    return {True: "within noise", False: "", None: f"n = {estimate.num}: not known"}[estimate.is_within_noise]
