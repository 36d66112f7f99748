"""`tritrain doctor`: find what would stop or slow down a run, before it starts.

`srun`, `torchrun` and `deepspeed` start ranks of it as they do of training:
`torchrun ... -m launcher.doctor --config FILE [key.sub=value ...]`. Every rank looks around itself, all together try
what lies between them (`launcher.doctor.facts`), and what was found is judged (`launcher.doctor.checks`).
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from data.messages import safe_message
from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.location import check_writable, is_local
from launcher.config.file import load_config
from launcher.doctor import checks
from launcher.doctor.checks import Verdict
from launcher.doctor.facts import (
    ALL_REDUCE_BYTES,
    PROBE_BYTES,
    SECONDS_TO_APPEAR,
    DiskProbe,
    RankFacts,
    clock_offsets,
    gather,
    look_around,
    look_for,
    measure_all_reduce,
    probe_disk,
    requirements,
)
from launcher.errors import USER_ERRORS, CheckpointError, report_error
from launcher.plan.disk import existing_part
from launcher.plan.plan import Plan, make_plan
from launcher.plan.table import describe
from launcher.process.exchange import value_of_first
from launcher.process.ranks import Ranks, process_group
from launcher.run.automatic import concrete
from launcher.run.folder import RunFolder

TIMEOUT_SECONDS = 120


OFF_TERMINAL_COLUMNS = 120


LEVEL_STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "failure": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; returns an exit code: 0, 1 where a check failed, 2 where the configuration is wrong."""
    parser = argparse.ArgumentParser(description="One rank of a check before a run.")
    parser.add_argument("--config", type=Path, help="YAML file of the run that is planned")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment has it too")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override one key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    joined, rank = False, None  # the rank is named from where it may fail alone
    try:
        config = load_config(options.config, options.overrides) if options.config else None
        with process_group(TIMEOUT_SECONDS) as ranks:
            joined = True
            plan = make_plan(concrete(config, ranks)[0], ranks.world_size) if config else None
            rank = ranks.rank if ranks.world_size > 1 else None
            verdicts = examine(ranks, plan)
            if ranks.is_first:
                show(verdicts, ranks.world_size, as_json=options.as_json)
            return int(any(verdict.level == "failure" for verdict in verdicts))
    except Exception as error:
        if isinstance(error, USER_ERRORS) or (joined and isinstance(error, OSError)):
            code = report_error(error, rank)
            if rank is not None:
                os._exit(code)  # the process group cannot be left in order: the others may be anywhere
            return code
        text = traceback.format_exc() if joined else not_joined(error)
        text = safe_message(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: {text}")
        print(text, file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)  # as above


def not_joined(error: Exception) -> str:
    """The message of a rank that did not meet the others."""
    host, env = socket.gethostname(), os.environ
    try:
        address = socket.gethostbyname(host)
    except OSError as problem:
        address = f"unknown ({problem})"
    return (
        f"did not meet the others: {' '.join(str(error).split())}\n"
        f"  MASTER_ADDR {env.get('MASTER_ADDR')}, MASTER_PORT {env.get('MASTER_PORT')}, WORLD_SIZE "
        f"{env.get('WORLD_SIZE')}; {host} is {address}; GLOO_SOCKET_IFNAME {env.get('GLOO_SOCKET_IFNAME', 'not set')}\n"
        "  All ranks must be started, with a GPU for each or none; MASTER_ADDR must be reached from every host; and "
        "where a host's own name leads to 127.x, GLOO_SOCKET_IFNAME must name the interface that the hosts share."
    )


def examine(
    ranks: Ranks,
    plan: Plan | None,
    *,
    clock: Callable[[], float] = time.time,
    probe_bytes: int = PROBE_BYTES,
    all_reduce_bytes: Sequence[int] = ALL_REDUCE_BYTES,
    seconds_to_appear: float = SECONDS_TO_APPEAR,
) -> list[Verdict]:
    """Measure and judge; a collective, with the same verdicts on all ranks."""
    config, required = plan.config if plan else None, requirements()
    facts = [RankFacts(**fact) for fact in gather(asdict(look_around(ranks, config, required)), ranks)]
    all_reduces = measure_all_reduce(ranks, all_reduce_bytes)
    offsets = clock_offsets(ranks, clock)
    of_folder = examine_folder(facts, ranks, plan, probe_bytes, seconds_to_appear)

    device_bytes, host_bytes = None, None
    if plan is not None:
        device_bytes, host_bytes = checks.planned_bytes(plan, on_gpu=ranks.device.type == "cuda")
    return [
        checks.check_versions(facts, required),
        checks.check_torchvision(facts),
        checks.check_gpus(facts),
        checks.check_gpu_memory(facts, device_bytes),
        checks.check_host_memory(facts, host_bytes),
        checks.check_host_names(facts),
        *checks.check_all_reduce(all_reduces, several_hosts=checks.num_hosts(facts) > 1),
        checks.check_clocks(facts, offsets),
        *of_folder,
        checks.check_paths(facts),
        *checks.check_limits(facts),
        checks.check_shared_memory(facts, plan),
        checks.check_leftovers(facts),
        checks.check_environment(facts),
    ]


def examine_folder(
    facts: Sequence[RankFacts], ranks: Ranks, plan: Plan | None, probe_bytes: int, seconds_to_appear: float
) -> list[Verdict]:
    """Check the disk of the run's folder, or of the working directory without a plan; a collective."""
    run = RunFolder(plan.config) if plan else None
    shared = ["", "", ""]  # where, what was written there, why it could not be
    if ranks.is_first:
        wanted = run.path if run else Path()
        try:
            folder = tempfile.mkdtemp(prefix="tritrain-doctor-", dir=existing_part(wanted))
            written = os.urandom(16).hex()
            Path(folder, "written").write_text(written)
            shared = [folder, written, ""]
        except OSError as error:
            shared = [str(wanted), "", str(error)]
    folder, written, problem = value_of_first(shared) if ranks.world_size > 1 else shared
    place = str(Path(folder).parent)
    if problem:
        return [Verdict("disk", "failure", problem, "The run's folder must be one that can be written to.")]
    try:
        seen = gather(look_for(Path(folder, "written"), seconds_to_appear), ranks)
        mine = asdict(probe_disk(Path(folder), probe_bytes, ranks.rank)) if seen[ranks.rank] == written else None
        probes = [DiskProbe(**probe) for probe in gather(mine, ranks) if probe is not None]
        free = shutil.disk_usage(folder).free if ranks.is_first else 0
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    verdicts = [checks.check_shared_folder(facts, seen, written, place)]
    if plan is None or run is None:
        skipped = Verdict("disk space", "skipped", "needs a configuration")
        return [*verdicts, skipped, checks.check_disk_speed(probes, None, place)]
    numbers = describe(plan)
    size, kept = numbers["checkpoint_bytes"], numbers["checkpoints_kept"]
    if not is_local(run.checkpoints):
        return [*verdicts, *examine_store(run, ranks), checks.check_disk_speed(probes, None, place)]
    if ranks.is_first:
        free = shutil.disk_usage(existing_part(run.checkpoints)).free
    there = len(complete_checkpoints(run.checkpoints))
    return [
        *verdicts,
        checks.check_disk_space(gather(free, ranks)[0], size, kept, there, str(run.checkpoints)),
        checks.check_disk_speed(probes, size, place),
    ]


def examine_store(run: RunFolder, ranks: Ranks) -> list[Verdict]:
    """Return whether each rank can write to the store that checkpoints go to; a collective."""
    try:
        check_writable(run.checkpoints)
        problem = ""
    except CheckpointError as error:
        problem = f"rank {ranks.rank}: {error}"
    if problems := [text for text in gather(problem, ranks) if text]:
        return [Verdict("store", "failure", "; ".join(problems), "Every rank writes its part of a checkpoint there.")]
    return [Verdict("store", "ok", f"every rank can write to {run.checkpoints}; its room is not asked")]


def show(verdicts: Sequence[Verdict], world_size: int, *, as_json: bool) -> None:
    """Print verdicts as a table and a last sentence, or as JSON."""
    counts = {level: sum(verdict.level == level for verdict in verdicts) for level in LEVEL_STYLES}
    console = RichConsole(highlight=False)
    if not console.is_terminal:
        console.width = OFF_TERMINAL_COLUMNS
    if as_json:
        told = {"problems": counts["failure"], "warnings": counts["warning"], "ranks": world_size}
        told["checks"] = [asdict(verdict) for verdict in verdicts]  # type: ignore[assignment]
        console.print(json.dumps(told, indent=2), markup=False, soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("check", "", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for verdict in verdicts:
        found = Text(safe_message(verdict.found), style="dim" if verdict.level == "skipped" else "")
        if verdict.advice:
            found.append(f"\n{safe_message(verdict.advice)}", style="bold")
        table.add_row(verdict.check, Text(verdict.level, style=LEVEL_STYLES[verdict.level]), found)
    console.print(table)
    problems, warnings = (
        _count(counts[level], what) for level, what in (("failure", "problem"), ("warning", "warning"))
    )
    console.print(f"\n{problems.capitalize()}, {warnings}.")


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
