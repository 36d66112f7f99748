"""How the distance from 16 bits falls with the tokens that are trained in ternary: a power law, fitted to a study.

    distance(D) = scale * D^-exponent + floor

The distance is the held-out loss of an arm minus that of the 16-bit baseline with the same seed and as many tokens. It
spans orders of magnitude, so logarithms are compared: the fit is least squares in them, by Levenberg and Marquardt's
method (J. Soc. Ind. Appl. Math. 11, 1963). A floor is kept only where it makes the fit better than chance would, by the
F test for nested models with 95 %, and not where the points settle no exponent, as a cliff before a plateau. Intervals
are those of the linearized fit, with Student's t.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.study.analysis import Group
from launcher.study.figures import Line, arms_of
from launcher.study.intervals import Estimate, t_quantile
from launcher.study.results import switch_step

FEWEST_POINTS = 4
"""Numbers of tokens: one more than a power law with a floor has parameters."""

ROUNDS = 200


@dataclass(frozen=True, kw_only=True)
class TokenFit:
    """The power law of one line of arms."""

    scale: float
    """Distance above the floor after one token, in nats per token."""
    exponent: Estimate
    floor: Estimate | None
    """What no number of tokens removes, in nats per token; None where it does not differ from 0 beyond noise."""
    spread: float
    """Standard deviation of the logarithms about the fit."""

    def distance(self, tokens: float) -> float:
        """In nats per token, after this many ternary tokens."""
        return self.scale * tokens**-self.exponent.mean + (self.floor.mean if self.floor else 0.0)


def ternary_tokens(group: Group) -> int | None:
    """Tokens of an arm from its switch on; None for what does not switch, or has not begun."""
    plan = next((each.arm.plan for each in group.members if each.arm is not None), None)
    step = None if plan is None else switch_step(plan)
    return None if plan is None or step is None else plan.total_tokens - plan.tokens_before(step)


def axis_of_tokens(groups: Sequence[Group]) -> str | None:
    """The axis along which arms switch at one step, and train for different numbers of tokens from there on."""
    arms = [group for group in arms_of(groups) if ternary_tokens(group) is not None]
    for axis in dict.fromkeys(axis for group in arms for axis in group.point if axis != "switch"):
        lines: dict[Line, list[Group]] = {}
        for group in arms:
            lines.setdefault(without(group, axis), []).append(group)
        if all(_differ_in_tokens_alone(line) for line in lines.values()):
            return axis
    return None


def _differ_in_tokens_alone(line: Sequence[Group]) -> bool:
    switches = {switch_step(each.arm.plan) for group in line for each in group.members if each.arm is not None}
    return len(switches) == 1 and len(line) == len({ternary_tokens(group) for group in line}) > 1


def without(group: Group, axis: str) -> Line:
    """The values of an arm on the other axes."""
    return tuple((name, value) for name, value in group.point.items() if name != axis)


def above_dense_at(points: Mapping[int, Sequence[float]]) -> dict[int, Sequence[float]]:
    """The points of which all seeds are above 16 bits.

    Others have no logarithm. A point is left out as a whole, since the mean of those seeds alone that are above would
    be too high.
    """
    return {tokens: values for tokens, values in points.items() if values and min(values) > 0}


def fit_tokens(points: Mapping[int, Sequence[float]]) -> TokenFit | str:
    """Fit the distances of one line of arms.

    Args:
        points: by the number of ternary tokens, the distance of each seed, in nats per token.

    Returns:
        The fit, or in words why there is none.
    """
    above = above_dense_at(points)
    if len(above) < FEWEST_POINTS:
        return f"arms at fewer than {FEWEST_POINTS} numbers of tokens are complete and above 16 bits with all seeds"
    pairs = [(tokens, value) for tokens, values in above.items() for value in values]
    tokens_N, values_N = np.asarray(pairs, np.float64).T
    unit = math.exp(np.log(tokens_N).mean())  # tokens at which slope and level are independent
    plain = _power_law(tokens_N / unit, values_N)
    tries = [_with_floor(tokens_N / unit, values_N, start) for start in (0.2, 0.5, 0.9)]
    floored = min((fit for fit in tries if fit is not None), key=lambda fit: fit[1], default=plain)
    degrees = len(pairs) - 3
    # Of one degree of freedom, F is the square of t.
    is_better = plain[1] - floored[1] > t_quantile(degrees) ** 2 * floored[1] / degrees
    (theta, rest, inverse), degrees = (floored, degrees) if is_better and floored[0][2] > 0 else (plain, degrees + 1)
    variance = rest / degrees
    estimates = [
        _estimate(value, math.sqrt(variance * inverse[place, place]), degrees, len(pairs))
        for place, value in enumerate(theta)
    ]
    return TokenFit(
        scale=math.exp(theta[0]) * unit ** theta[1],
        exponent=estimates[1],
        floor=estimates[2] if len(theta) > 2 else None,
        spread=math.sqrt(variance),
    )


Fitted = tuple[NDArray[np.float64], float, NDArray[np.float64]]
"""Logarithm of the scale, exponent and perhaps floor; the sum of squares; and the inverse of the normal equations."""


def _power_law(tokens_N: NDArray[np.float64], values_N: NDArray[np.float64]) -> Fitted:
    design = np.stack([np.ones_like(tokens_N), -np.log(tokens_N)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    theta = inverse @ design.T @ np.log(values_N)
    rest = np.log(values_N) - design @ theta
    return theta, float(rest @ rest), inverse


@np.errstate(all="ignore")  # a step too far has no finite sum of squares, and is not taken
def _with_floor(tokens_N: NDArray[np.float64], values_N: NDArray[np.float64], start: float) -> Fitted | None:
    """Fit from a floor of this share of the smallest value; None if the points do not settle all three parameters."""
    floor = start * values_N.min()
    theta = np.append(_power_law(tokens_N, values_N - floor)[0], floor)
    damping = 1e-3

    def of(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
        falling = np.exp(theta[0] - theta[1] * np.log(tokens_N))
        total = falling + theta[2]
        slopes = np.stack([falling, -np.log(tokens_N) * falling, np.ones_like(falling)], axis=1) / total[:, None]
        rest = np.log(values_N) - np.log(total)
        return rest, float(rest @ rest), slopes

    rest, square, slopes = of(theta)
    for _ in range(ROUNDS):
        normal = slopes.T @ slopes
        try:
            step = np.linalg.solve(normal + damping * np.diag(normal.diagonal()), slopes.T @ rest)
        except np.linalg.LinAlgError:
            return None
        tried = theta + step
        tried[2] = max(tried[2], 0.0)
        found = of(tried)
        if found[1] < square:
            theta, (rest, square, slopes), damping = tried, found, damping / 3
        else:
            damping *= 4
    if not np.isfinite(slopes).all() or np.linalg.matrix_rank(slopes) < slopes.shape[1]:
        return None
    inverse = np.linalg.inv(np.linalg.qr(slopes, mode="r"))  # so that the diagonal below cannot be negative
    return theta, square, inverse @ inverse.T


def _estimate(value: float, error: float, degrees: int, num: int) -> Estimate:
    reach = t_quantile(degrees) * error
    return Estimate(
        mean=float(value), low=float(value - reach), high=float(value + reach), standard_error=error, num=num
    )
