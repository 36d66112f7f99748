"""`tritrain plan --switch`: when to switch, by published laws and by one's own studies, and where they disagree."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.plan import Plan
from launcher.plan.switch_laws import LAWS, TERNARY_BITS, Setting
from launcher.process.console import Console, human_count
from launcher.study.analysis import groups_of
from launcher.study.config import is_of_study
from launcher.study.reading import read_study
from launcher.study.results import switch_share
from launcher.study.switch_fit import Fit, fit_switch
from model.size import num_linear_parameters, num_parameters

DISAGREEMENT = 0.1
"""Difference of two shares of the run that is called a disagreement."""


def show_switch(plan: Plan, studies: Sequence[Path], console: Console, *, as_json: bool) -> None:
    """Print the proposals for a run.

    Args:
        plan: of the run; its size and its tokens count.
        studies: folders of studies to fit.
        console: for people.
        as_json: print JSON instead.

    Raises:
        ConfigError: a folder is no study's, or its files are damaged.
    """
    model = plan.config.model
    setting = Setting(parameters=num_parameters(model), tokens=plan.total_tokens, bits=TERNARY_BITS)
    own = switch_share(plan)
    fits = {str(folder): _fit(folder) for folder in studies}
    shares = {law.name: law.share(setting) for law in LAWS}
    if as_json:
        found: dict[str, Any] = {
            **asdict(setting),
            "configured_share": own,
            "published": [
                {
                    "name": law.name,
                    "source": law.source,
                    "share": shares[law.name],
                    "holds_here": law.holds_for(setting),
                    "found_for": law.found_for,
                }
                for law in LAWS
            ],
            "studies": [
                {"folder": name, **({"problem": fit} if isinstance(fit, str) else asdict(fit))}
                for name, fit in fits.items()
            ],
        }
        console.line(json.dumps(found, indent=2))
        return
    ratio = plan.total_tokens / num_linear_parameters(model)
    console.line(
        f"{human_count(setting.parameters)} parameters, {human_count(setting.tokens)} tokens ({ratio:.3g} for each "
        f"ternary parameter), {setting.bits:.2f} bits. Shares of the run in 16 bits:"
    )
    rows = [["configured", _percent(own), ""]] if own is not None else []
    for law in LAWS:
        here = "like this run" if law.holds_for(setting) else "OTHER than this run"
        rows.append([f"{law.name} ({law.source})", _percent(shares[law.name]), here])
    rows += [[f"your study {name}", _fit_text(fit), ""] for name, fit in fits.items()]
    console.aligned(rows)
    console.line()
    for law in LAWS:
        console.line(f"{law.name}: found for {law.found_for}.")
    for name, fit in fits.items():
        for sentence in _remarks(fit, ratio):
            console.line(f"{name}: {sentence}")
    console.line()
    for sentence in disagreements(shares, fits):
        console.line(sentence)


def _fit(folder: Path) -> Fit | str:
    if not is_of_study([folder]):
        raise ConfigError(f"--study {folder}: is no study's folder; it needs study.yaml and results.json")
    findings = read_study(folder)
    return fit_switch(groups_of(findings))


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"


def _fit_text(fit: Fit | str) -> str:
    if isinstance(fit, str):
        return "none"
    interval = "" if fit.low is None or fit.high is None else f" ({fit.low:.0%} to {fit.high:.0%})"
    return _percent(fit.share) + interval


def _remarks(fit: Fit | str, ratio: float) -> list[str]:
    """What a fit is from, and what limits it."""
    if isinstance(fit, str):
        return [f"{fit}."]
    seeds = "one seed, so without an interval" if fit.num_seeds == 1 else f"{fit.num_seeds} seeds"
    points = f"{len(fit.tried)} switch points of {fit.line}"
    if fit.is_parabola:
        found = [f"a parabola through {points}, {seeds}."]
    else:
        interval = ", and the interval spans those within noise of it" if fit.num_seeds > 1 else ""
        found = [
            f"the losses at {points} are no parabola with a lowest place, {seeds}: this is the best arm{interval}."
        ]
    if len(fit.within_noise) == len(fit.tried):
        found.append("these arms do not tell where the best switch is.")
    if fit.is_at_edge:
        found.append(
            f"the best share is at the edge of those that were tried, {min(fit.tried):.0%} to {max(fit.tried):.0%}; it "
            "may lie beyond."
        )
    if len(fit.within_noise) > 1:
        found.append(
            f"within noise of the best arm, paired by seed: {', '.join(f'{share:.0%}' for share in fit.within_noise)}."
        )
    if fit.tokens_per_parameter is not None:
        found.append(
            f"it had {fit.tokens_per_parameter:.3g} tokens for each ternary parameter, this run has {ratio:.3g}."
        )
    return found


def disagreements(shares: dict[str, float | None], fits: dict[str, Fit | str]) -> list[str]:
    """Sentences about proposals that differ."""
    known = {name: share for name, share in shares.items() if share is not None}
    lowest, highest = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
    found = []
    if known[highest] - known[lowest] > DISAGREEMENT:
        found.append(
            f"The published proposals DISAGREE: {_percent(known[lowest])} by {lowest}, {_percent(known[highest])} by "
            f"{highest}. They differ in schedule, quantizer, size and number of seeds, which were never separated."
        )
    fitted = {name: fit for name, fit in fits.items() if isinstance(fit, Fit)}
    for name, fit in fitted.items():
        low = (fit.share if fit.low is None else fit.low) - DISAGREEMENT
        high = (fit.share if fit.high is None else fit.high) + DISAGREEMENT
        others = [f"{law} ({_percent(share)})" for law, share in known.items() if not low <= share <= high]
        if others:
            found.append(f"{name} DISAGREES with {', '.join(others)}.")
    if (
        len(fitted) > 1
        and (spread := [fit.share for fit in fitted.values()])
        and max(spread) - min(spread) > DISAGREEMENT
    ):
        found.append(f"Your studies DISAGREE with each other: {_percent(min(spread))} to {_percent(max(spread))}.")
    if fitted:
        found.append(
            "Trust the study that is most like this run: in size, tokens for each parameter, schedule and data."
        )
    else:
        found.append("Nothing here settles it for this run. `tritrain study` does; name its folder with --study.")
    return found
