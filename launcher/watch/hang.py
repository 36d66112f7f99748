"""Explain a hang: stacks, collectives in flight, and the ranks that the others wait for.

Each process group numbers its collectives, and PyTorch's flight recorder keeps the last of them, with gloo as with NCCL
(https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html). In a program that is the same on all ranks,
the rank that has entered fewer of them than the others is the one that these wait for.
"""

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.saver import SAVER_GROUP
from launcher.watch.heartbeat import Pulse

ROOT = Path(__file__).resolve().parents[2]


def collectives() -> Iterator[dict[str, Any]]:
    """Entries of NCCL's flight recorder, where this build of torch has it, and of that of the other backends."""
    for recorder in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if (dump := getattr(torch._C._distributed_c10d, recorder, None)) is not None:
            yield from json.loads(dump()).get("entries", [])


def is_in_flight(entry: Mapping[str, Any]) -> bool:
    """Return whether a collective has been begun and not ended."""
    return not entry["retired"] and entry["state"] != "completed"


def where(thread_id: int | None) -> str:
    """The innermost function of Tritrain's that a thread is in, and the innermost of all."""
    frame = innermost = sys._current_frames().get(thread_id or 0)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(ROOT):
        frame = frame.f_back
    if frame is None or innermost is None:
        return "no code of Tritrain's"
    place = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno})"
    return place if innermost is frame else f"{place}, in {innermost.f_code.co_name}"


def report(rank: int, pulse: Pulse) -> dict[str, Any]:
    """The activity of this rank, for the verdict."""
    at = pulse.at
    entered: dict[str, int] = {}
    waiting = None
    for entry in collectives():
        name, description = entry["process_group"]
        if not entry["is_p2p"]:
            backend = entry["profiling_name"].split(":")[0]  # a group of both gloo and NCCL counts for each
            group = SAVER_GROUP if description == SAVER_GROUP else f"{backend} {name}"
            entered[group] = max(entered.get(group, 0), entry["collective_seq_id"])
            if is_in_flight(entry) and group != SAVER_GROUP:
                waiting = entry["profiling_name"]
    return {
        "rank": rank,
        "step": at.step,
        "doing": at.doing,
        "seconds": round(time.monotonic() - at.since, 1),
        "where": where(threading.main_thread().ident),
        "entered": entered,
        "waiting": waiting,
    }


def write_dump(path: Path, reason: str, name: str, seen: Mapping[str, Any]) -> None:
    """Write what this rank knows: what it is at, the stacks of its threads, and its last collectives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(f"{name}\n{reason}\n{json.dumps(seen)}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0, 2)
        file.write("\nCollectives, the last one last:\n")
        for entry in sorted(collectives(), key=lambda entry: entry["time_created_ns"])[-50:]:
            flight = "IN FLIGHT" if is_in_flight(entry) else "ended"
            file.write(
                f"{flight:<9} {entry['profiling_name']} #{entry['collective_seq_id']} of group "
                f"{' '.join(entry['process_group'])}, sizes {entry['input_sizes']} to {entry['output_sizes']}\n"
            )


def behind(reports: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ranks that the others wait for: those furthest behind in collectives, else in steps; none if all are even."""
    groups = {group for seen in reports for group in seen["entered"]}
    for chosen in (groups - {SAVER_GROUP}, groups & {SAVER_GROUP}):
        lags = {seen["rank"]: 0 for seen in reports}
        for group in chosen:
            entered = {seen["rank"]: seen["entered"][group] for seen in reports if group in seen["entered"]}
            for rank, number in entered.items():
                lags[rank] += max(entered.values()) - number
        if lags and (largest := max(lags.values())) > min(lags.values()):  # even lags are of groups that cross
            return [rank for rank, lag in lags.items() if lag == largest]
    steps = {seen["rank"]: seen["step"] for seen in reports}
    last = min(steps.values(), default=0)
    return [rank for rank, step in steps.items() if step == last < max(steps.values())]


def verdict(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Name the ranks that keep the others waiting: those that gave no report, else those that are behind.

    Args:
        reports: of those ranks that gave one.
        names: what to call each rank.
    """
    if silent := set(range(len(names))) - {seen["rank"] for seen in reports}:
        gone = " and ".join(names[rank] for rank in sorted(silent))
        return f"{gone} cannot be heard any more: dead, cut off, without power, or standing still."
    stragglers = behind(reports)
    others = [seen for seen in reports if seen["rank"] not in stragglers]
    waiting = sorted({seen["waiting"] for seen in others if seen["waiting"]})
    wait = (
        f"wait in {' and '.join(waiting)}" if waiting else f"are at {' and '.join({seen['doing'] for seen in others})}"
    )
    if not stragglers:
        places = " or ".join(sorted({seen["where"] for seen in reports}))
        return f"No rank is behind: all {wait}, in {places}."
    sentences = [
        f"{names[seen['rank']]} is behind: it is at {seen['doing']} after step {seen['step']}, in {seen['where']}"
        for seen in reports
        if seen["rank"] in stragglers
    ]
    return f"{'; '.join(sentences)}; the others {wait}."
