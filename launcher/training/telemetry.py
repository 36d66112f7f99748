"""When quantization is measured, over all ranks, and the rows of the log that result.

The measurements of a step (see `quant.telemetry`) stay on the device until the next logged step, when the host waits
for the device anyway. Only then are the ranks' parts summed, in one all-reduce, and read.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.engine.contract import Engine
from launcher.plan.course import Course, Phase
from quant.linear import quantized_layers
from quant.telemetry import MOST_FLIPS, SUMS, WEIGHT_FIGURES, Measurement, Probe


def is_measured(step: int, phase: Phase, interval_steps: int) -> bool:
    """Return whether the step of this number, counted from 0, is measured.

    Measured are every ``interval_steps``-th step of the run, the last step of the phase and, until the first interval
    is over, the first, second, fourth, eighth and so on of the phase, because most happens right after a switch.
    """
    finished, of_phase = step + 1, step + 1 - phase.start
    is_early = of_phase < interval_steps and of_phase & (of_phase - 1) == 0
    return finished % interval_steps == 0 or finished == phase.end or is_early


def telemetry_of(course: Course, phase: Phase | None, engine: Engine) -> "Telemetry | None":
    """Create the telemetry of a phase; None if it is not ternary or the configuration turns telemetry off."""
    interval_steps = course.config.logging.quantization_interval_steps
    if phase is None or phase.quantization is None or interval_steps is None:
        return None
    return Telemetry(engine, phase, course, interval_steps)


class Telemetry:
    """Measures the quantized layers of one phase; flips and drift are counted from its first measurement on.

    Args:
        engine: with its model quantized.
        phase: the ternary phase that it is in.
        course: of the run.
        interval_steps: how often to measure.
    """

    def __init__(self, engine: Engine, phase: Phase, course: Course, interval_steps: int) -> None:
        self._phase, self._course, self._interval_steps = phase, course, interval_steps
        layers = quantized_layers(engine.model)
        self._names = list(layers)
        mine = {s.name: (s.start, s.tensors["weight"].numel()) for s in engine.shards() if s.primary}
        self._probe = Probe(layers.values(), [mine.get(f"{name}.weight", (0, 0)) for name in layers])
        self._num_weights = torch.tensor([float(layer.in_features * layer.out_features) for layer in layers.values()])
        self._measurement: Measurement | None = None
        self._pending: list[tuple[int, Measurement, Tensor]] = []
        self._since_step: int | None = None
        self._first_scales: Tensor | None = None

    def begin(self, step: int) -> None:
        """Begin the step of this number, counted from 0."""
        self._measures, self._compares_next = self._is_measured(step), self._is_measured(step + 1)
        self._finished_steps = step + 1

    def look(self, engine: Engine, tokens_BT: Tensor, labels_BT: Tensor) -> None:
        """Measure a micro-batch, if this step is to be measured, in a forward pass of its own.

        What is trained is then the same with and without telemetry, and a compiled model stays whole.
        """
        self._measurement = None
        if not (self._measures or self._compares_next):
            return
        self._probe.attach(measure=self._measures, compare_next=self._compares_next)
        with torch.no_grad():
            engine.token_nll(tokens_BT, labels_BT)
        self._measurement = self._probe.detach()

    def look_at_gradients(self, engine: Engine) -> None:
        """Record the norms of the layers' gradients, before the optimizer's step clips them."""
        if self._measurement is None:
            return
        parts = engine.gradient_squares()
        none = torch.zeros((), device=engine.device)
        squares = torch.stack([parts.get(f"{name}.weight", none).float() for name in self._names])
        self._pending.append((self._finished_steps, self._measurement, squares))

    def collect(self) -> list[dict[str, Any]]:
        """Sum over ranks what was measured since the last call, and return it as rows; the host waits here."""
        rows = []
        for step, measured, squares in self._pending:
            parts = torch.cat([measured.sums.flatten(), measured.flip_counts, squares.double()])
            dist.all_reduce(parts)
            sums, flip_counts, squares = parts.cpu().split([measured.sums.numel(), MOST_FLIPS + 1, len(squares)])
            layers = dict(zip(WEIGHT_FIGURES, measured.figures.cpu().T, strict=True))
            layers |= self._of_sums(dict(zip(SUMS, sums.view(-1, len(SUMS)).T, strict=True)), measured.has_flips)
            is_first = self._first_scales is None
            if self._first_scales is None:
                self._since_step, self._first_scales = step, layers["scale"]
            layers["scale_drift"] = layers["scale"] / self._first_scales - 1
            weights = self._num_weights / self._num_weights.sum()
            totals = {f"quant/{name}": float((weights * values).sum()) for name, values in layers.items()}
            layers["grad_norm"] = squares.sqrt()
            rows.append(
                {
                    "step": step,
                    "tokens": self._course.tokens_before(step),
                    "phase": self._phase.index,
                    "precision": self._phase.precision,
                    **totals,
                    "quant/grad_norm": float(squares.sum().sqrt()),
                    "quant/since_step": self._since_step,
                    "quant/threshold_distances": (measured.distances.cpu() / self._num_weights.sum()).tolist(),
                    "quant/flips": (flip_counts / self._num_weights.sum()).tolist(),
                    "quant/layers": ({"names": self._names} if is_first else {})
                    | {name: [float(f"{value:.5g}") for value in values.tolist()] for name, values in layers.items()},
                }
            )
        self._pending.clear()
        return rows

    @staticmethod
    def _of_sums(sums: dict[str, Tensor], has_flips: bool) -> dict[str, Tensor]:
        """Figures of each layer, computed from sums over ranks."""
        figures = {"moved_share": sums["moved"] / sums["num_weights"]}
        if has_flips:
            figures["flip_rate"] = sums["flipped"] / sums["num_weights"]
        if sums["num_inputs"].all():
            figures["input_error"] = (sums["input_error"] / sums["input"].clamp(min=1e-30)).sqrt()
            figures["clipped_share"] = sums["clipped"] / sums["num_inputs"]
        return figures

    def _is_measured(self, step: int) -> bool:
        return step < self._phase.end and is_measured(step, self._phase, self._interval_steps)
