"""`tritrain status`: the state of runs, from small files in their folders. They may run on other machines.

A run leaves `running` in its `state.json` when it begins and another word when it ends. Where all of its processes were
killed nobody is left to write that word, so a run that says `running` and has been silent for too long is `stalled`.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from data.messages import printable, safe_message
from launcher.checkpoint.folders import MANIFEST, complete_checkpoints
from launcher.checkpoint.location import is_local, to_location
from launcher.config.file import parse_yaml
from launcher.config.sections import SILENT_BEATS
from launcher.errors import ConfigError, UserError
from launcher.plan.batches import GlobalBatch
from launcher.process.console import human_count, human_time
from launcher.report.runs import find_runs
from launcher.run.log_keys import DRAWN
from launcher.run.requeue import read_lines

HEARTBEAT_SECONDS = 60
"""A rank whose heartbeat is older than this, and than `SILENT_BEATS` of them, is not heard of."""


SILENT_SECONDS = 1800
"""The same for a run without heartbeats, of which only logged steps and checkpoints are seen."""


TAIL_BYTES = (1 << 16, 1 << 22)
"""How much of the end of `metrics.jsonl` is read, and how much where no logged step is in that."""


MESSAGE_LINES = 4


STATES = {
    "running": "green",
    "stalled": "bold red",
    "failed": "bold red",
    "unreadable": "bold red",
    "interrupted": "yellow",
    "not started": "dim",
    "complete": "bold",
}


TROUBLE = ("stalled", "failed", "unreadable")
"""States that make the command's exit code 1."""


OFF_TERMINAL_COLUMNS = 160


@dataclass
class RunStatus:
    """The state of one run; a value that its folder does not show is None."""

    run: str
    """Its folder."""
    state: str = "not started"
    phase: str | None = None
    """Precision of the phase that it is in."""
    step: int | None = None
    total_steps: int | None = None
    tokens_per_second: float | None = None
    remaining_seconds: float | None = None
    """What is left, at the last logged rate."""
    checkpoint: str | None = None
    """The newest complete one, where checkpoints are on a file system."""
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    restarts: int | None = None
    """Starts but the first."""
    loss: float | None = None
    """Training loss as last logged."""
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    """Tokens drawn from each source so far, as last logged; empty of a run with a single one."""
    message: str | None = None
    """Why it failed or was stopped, or who is not heard of."""
    notes: list[str] = field(default_factory=list)
    """Files that are not as they should be."""


def status_of(run: Path, now: float) -> RunStatus:
    """The status of a run at ``now``, in Unix seconds; files that are not as a run writes them become notes."""
    status = RunStatus(str(run))
    notes = status.notes
    row: dict[str, Any] = {}
    config: dict[str, Any] = {}
    with _noting("config.yaml", notes):
        config = _mapping(parse_yaml((run / "config.yaml").read_text(), "config.yaml"))
    with _noting("metrics.jsonl", notes):
        row = last_logged_row(run / "metrics.jsonl")
        if row:
            status.step, status.tokens_per_second = int(row["step"]), float(row["throughput/tokens_per_second"])
            status.loss = float(row["train/loss"]) if "train/loss" in row else None  # left out where it is not finite
            drawn = {key.removeprefix(DRAWN): int(value) for key, value in row.items() if key.startswith(DRAWN)}
            status.tokens_by_source = {safe_message(path): tokens for path, tokens in drawn.items()}
    with _noting("starts.jsonl", notes):
        lines = [line for line in (run / "starts.jsonl").read_bytes().splitlines() if line.strip()]
        starts = read_lines(run / "starts.jsonl", "step")
        status.restarts = max(0, len(starts) - 1)
        if damaged := len(lines) - len(starts):
            notes.append(f"starts.jsonl has {damaged} damaged line{'s' if damaged > 1 else ''}, not counted")
    with _noting("checkpoints", notes):
        _look_at_checkpoints(status, run, config, now)
    if (run / "state.json").exists():
        status.state = "unreadable"
        with _noting("state.json", notes):
            state = _mapping(json.loads((run / "state.json").read_text()))
            status.state, status.message = str(state["status"]), state.get("message")
            if "reason" in state:
                status.message = f"stopped: {state['reason']}"
    if status.state == "running":
        with _noting("state.json", notes):  # which may be taken away as it is looked at
            status.message = _silence(status, run, now)
        status.state = "stalled" if status.message else "running"
    if "phase_steps" in config:
        with _noting("config.yaml", notes):
            ends = list(accumulate(config["phase_steps"]))
            at = next((index for index, end in enumerate(ends) if (status.step or 0) < end), len(ends) - 1)
            status.total_steps, status.phase = ends[-1], config["phases"][at]["precision"]
    if status.step and status.total_steps and row and status.state != "complete":
        with _noting("config.yaml", notes):
            remaining_tokens = tokens_between(config, status.step, status.total_steps)
            status.remaining_seconds = remaining_tokens / row["throughput/tokens_per_second"]
    status.message = None if status.message is None else safe_message(status.message)
    status.notes = [safe_message(note) for note in notes]
    return status


def tokens_between(config: dict[str, Any], step: int, end: int) -> int:
    """Tokens of the steps of a run from one number of finished steps to another; its configuration is not checked."""
    training, length = _mapping(config["training"]), _mapping(config["data"])["sequence_length"]
    full = training.get("global_batch_sequences") or training["global_batch_tokens"] // length
    warmup = [(stage["sequences"], stage["until_tokens"]) for stage in training.get("batch_warmup") or ()]
    batch = GlobalBatch.of(full, warmup, length)
    return int((batch.before(end) - batch.before(step)) * length)


@contextmanager
def _noting(name: str, notes: list[str]) -> Iterator[None]:
    """Make a note of a file that is damaged, half-written or of another making; one that is absent is no matter."""
    try:
        yield
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, UserError) as error:
        notes.append(f"{name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError("no mapping is in it")
    return content


def last_logged_row(path: Path) -> dict[str, Any]:
    """The last row of a `metrics.jsonl` that is of a logged step, read from its end; empty where there is none."""
    for limit in TAIL_BYTES:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # cut off by the limit, or still being written
                continue
            if isinstance(row, dict) and "throughput/tokens_per_second" in row:
                return row
        if size <= limit:
            break
    return {}


def _look_at_checkpoints(status: RunStatus, run: Path, config: dict[str, Any], now: float) -> None:
    """Fill in the newest complete checkpoint; stores that take time to ask are left out, with a note."""
    folder = _mapping(config.get("checkpoint") or {}).get("folder")
    location = to_location(folder) if folder else run / "checkpoints"
    if not is_local(location):
        status.notes.append(f"checkpoints are in {location}, which is not asked")
        return
    newest = next(reversed(complete_checkpoints(location)), None)
    if newest is not None:
        status.checkpoint, status.checkpoint_step = str(newest), int(newest.name.removeprefix("step-"))
        status.checkpoint_age_seconds = max(0.0, now - (newest / MANIFEST).stat().st_mtime)
        status.step = max(status.step or 0, status.checkpoint_step)


def _silence(status: RunStatus, run: Path, now: float) -> str | None:
    """Why a run that says that it is running is taken not to be; notes the step that its slowest rank is at."""
    files = [run / name for name in ("state.json", "starts.jsonl", "metrics.jsonl", "checkpoints")]
    written = max(path.stat().st_mtime for path in files if path.exists())
    if not (run / "heartbeats.json").exists():
        if now - written > SILENT_SECONDS:
            return f"has written nothing for {human_age(now - written)}, and has no heartbeats; its job may be gone"
        return None
    with _noting("heartbeats.json", status.notes):
        heartbeats = _mapping(json.loads((run / "heartbeats.json").read_text()))
        # Of an earlier start they may be old, and this one's not be there yet.
        heard = max(float(heartbeats["time"]), (run / "state.json").stat().st_mtime)
        limit = max(HEARTBEAT_SECONDS, SILENT_BEATS * float(heartbeats.get("beat_seconds", 0)))
        if now - heard > limit:
            return f"no heartbeat for {human_age(now - heard)}: its job was killed, or its first rank hangs"
        lost = [
            f"rank {rank['rank']} on {rank['host']} for {human_age(heartbeats['time'] - rank['seen'])}, "
            f"in step {rank['step']}, {rank['doing']}"
            for rank in heartbeats["ranks"]
            if heartbeats["time"] - rank["seen"] > limit
        ]
        if lost:
            return f"not heard of: {'; '.join(lost)}"
        status.step = max(status.step or 0, min(rank["step"] for rank in heartbeats["ranks"]))
    return None


def show(statuses: Sequence[RunStatus]) -> RenderableType:
    """Print a table of runs and, below it, their problems."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("state", "phase"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "tokens/s", "left", "checkpoint, age", "restarts", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for status in statuses:
        table.add_row(
            Text(printable(status.run)),
            Text(printable(status.state), style=STATES.get(status.state, "")),
            Text(printable(str(status.phase or "-"))),
            _of(status.step, status.total_steps),
            _shown(status.tokens_per_second, human_count),
            _shown(status.remaining_seconds, _left),
            _checkpoint(status),
            _shown(status.restarts, str),
            _shown(status.loss, "{:.4f}".format),
        )
    below: list[RenderableType] = []
    for status in statuses:
        lines = (status.message or "").strip().splitlines()
        if len(lines) > MESSAGE_LINES:
            lines = [f"... (all of it is in {status.run}/state.json)", *lines[-MESSAGE_LINES:]]
        if status.tokens_by_source:
            drawn = (f"{human_count(tokens)} from {path}" for path, tokens in status.tokens_by_source.items())
            lines.append(f"tokens drawn: {', '.join(drawn)}")
        if lines := [*lines, *status.notes]:
            text = Text(printable("\n".join(lines)))
            below += [Text(f"\n{printable(status.run)}", style="bold"), Padding(text, (0, 0, 0, 2))]
    return Group(table, *below)


def _of(step: int | None, total_steps: int | None) -> str:
    return f"{_shown(step, '{:,}'.format)} of {total_steps:,}" if total_steps else _shown(step, "{:,}".format)


def _shown(value: Any, shape: Any) -> str:
    return "-" if value is None else shape(value)


def _checkpoint(status: RunStatus) -> str:
    if status.checkpoint_step is None or status.checkpoint_age_seconds is None:
        return "-"
    return f"{status.checkpoint_step:,}, {human_age(status.checkpoint_age_seconds)}"


def _left(seconds: float) -> str:
    return human_time(seconds) if seconds < 86_400 else f"{seconds / 86_400:.1f} d"


def human_age(seconds: float) -> str:
    """A duration in its largest unit: 40 s, 12 min, 5 h, 3 d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_status(folders: Sequence[Path], *, as_json: bool, watch_seconds: float | None) -> int:
    """Print the state of runs, once or until interrupted.

    Returns:
        An exit code: 0, or 1 where a run has failed, is stalled or cannot be read; of watching, 0.

    Raises:
        ConfigError: a folder is no run and holds none, or the options exclude each other.
    """
    if as_json and watch_seconds is not None:
        raise ConfigError("--json and --watch exclude each other")

    def look() -> list[RunStatus]:
        return [status_of(run, time.time()) for run in find_runs(folders)]

    statuses = look()
    console = RichConsole(highlight=False)
    if not console.is_terminal:  # where lines are not cut at a window's edge
        console.width = OFF_TERMINAL_COLUMNS
    if as_json:
        console.print(json.dumps([asdict(status) for status in statuses], indent=2), markup=False, soft_wrap=True)
    elif watch_seconds is None:
        console.print(show(statuses))
    else:
        watch(look, console, watch_seconds)
        return 0
    return int(any(status.state in TROUBLE for status in statuses))


def watch(look: Callable[[], list[RunStatus]], console: RichConsole, seconds: float) -> None:
    """Show how runs stand, again and again until interrupted: in place in a terminal, else one below the other."""
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
                while True:
                    live.update(show(look()), refresh=True)
                    time.sleep(seconds)
        while True:
            console.print(time.strftime("%H:%M:%S"), show(look()), "", sep="\n")
            time.sleep(seconds)
