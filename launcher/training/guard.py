"""Guards against loss spikes: outlier steps are skipped, and a loss that does not recover is noticed.

Both use the losses and gradient norms of the last steps, which stay on the device. All ranks hold the same values and
so agree on every decision. The values are in every checkpoint, so that a resumed run decides as if never stopped.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.sections import OutlierConfig
from launcher.process.ranks import Ranks

SMOOTHED_STEPS = 32
"""How many steps' losses are averaged where the loss before a switch and that after it are compared."""


class Window:
    """The last ``length`` finite values of a quantity that every step has, on the device."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.length = length
        self._values = torch.zeros(length, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, value: Tensor) -> None:
        """Add a 0-dim value in place of the oldest, unless it is not finite."""
        place = self._count % len(self._values)
        finite = value.isfinite()
        self._values.scatter_(0, place, torch.where(finite, value, self._values.gather(0, place)))
        self._count += finite

    def bound(self, sigmas: float) -> Tensor:
        """Return the mean plus ``sigmas`` population standard deviations, 0-dim; infinite until the window is full."""
        variance, mean = torch.var_mean(self._values, correction=0)
        return torch.where(self._count[0] < len(self._values), torch.inf, mean + sigmas * variance.sqrt())

    def mean(self) -> float | None:
        """Return the mean of the values so far, or None if there are none; the host waits for the device."""
        count = min(int(self._count), len(self._values))
        return float(self._values[:count].double().mean()) if count else None

    def clear(self) -> None:
        """Forget all values."""
        self._values.zero_()
        self._count.zero_()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"values": self._values.tolist(), "count": int(self._count)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._values.copy_(torch.tensor(state["values"]))
        self._count.fill_(state["count"])


class SpikeGuard:
    """Watches the loss and the gradient norm of every step. Does nothing if neither guard is on.

    Skipped outliers enter the windows as well. So one outlier is skipped, and a lasting change of level is not: of n
    steps, no more than n / (sigmas^2 + 1) can be so far above their mean, which is 3 of 128 for 6, so that a fourth
    step of the new level is taken. They are no reason to give up the run either, other than gradients that stay
    non-finite.

    Args:
        outliers: which steps are skipped; None: none.
        smooths: whether the smoothed loss before and after a switch will be asked for.
        ranks: this rank among all.
    """

    def __init__(self, outliers: OutlierConfig | None, *, smooths: bool, ranks: Ranks) -> None:
        self._outliers, self._ranks = outliers, ranks
        self._windows: dict[str, Window] = {}
        if outliers is not None:
            self._windows |= {name: Window(outliers.window_steps, ranks.device) for name in ("losses", "grad_norms")}
        if smooths:
            self._windows["smoothed"] = Window(SMOOTHED_STEPS, ranks.device)
        self._loss = torch.zeros((), device=ranks.device)
        self._skipped = torch.zeros((), device=ranks.device)
        self._reported = 0
        self.loss_before: float | None = None
        """Smoothed loss before the last switch."""

    def limit(self, loss: Tensor) -> Tensor | None:
        """Return the gradient norm above which this step is an outlier; -1 if its loss already is one.

        Args:
            loss: this rank's mean loss, 0-dim.
        """
        if not self._windows:
            return None
        self._loss = loss.clone()
        dist.all_reduce(self._loss)
        self._loss /= self._ranks.world_size
        if self._outliers is None:
            return None
        highest = self._windows["losses"].bound(self._outliers.sigmas)
        return torch.where(self._loss > highest, -1.0, self._windows["grad_norms"].bound(self._outliers.sigmas))

    def add(self, grad_norm: Tensor, skipped: Tensor) -> Tensor:
        """Record a step, after `limit`; returns, 0-dim, whether it was skipped because it was not finite."""
        outlier = skipped * grad_norm.isfinite()
        self._skipped += outlier
        for name, window in self._windows.items():
            window.add(grad_norm if name == "grad_norms" else self._loss)
        return skipped - outlier

    def newly_skipped(self) -> tuple[int, int]:
        """Return the outliers skipped since the last call, and in total; the host waits for the device."""
        total = int(self._skipped) if self._outliers is not None else self._reported
        new, self._reported = total - self._reported, total
        return new, total

    def enter_phase(self) -> None:
        """Start over after a switch, which changes the level of losses and gradients."""
        if "smoothed" in self._windows:
            self.loss_before = self._windows["smoothed"].mean()
        for window in self._windows.values():
            window.clear()

    @property
    def loss_after(self) -> float | None:
        """Smoothed loss now."""
        return self._windows["smoothed"].mean()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain numbers."""
        windows = {name: window.state() for name, window in self._windows.items()}
        return {"windows": windows, "skipped": int(self._skipped), "loss_before": self.loss_before}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave.

        A window that the checkpoint does not have, or has in another length, begins empty, as it does after a switch;
        whether the guards of a run may change is decided where its configuration is compared.
        """
        for name, window in self._windows.items():
            stored = state["windows"].get(name)
            if stored is not None and len(stored["values"]) == window.length:
                window.load(stored)
        self._skipped.fill_(state["skipped"])
        self._reported, self.loss_before = state["skipped"], state["loss_before"]
