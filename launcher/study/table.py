"""What a study would train and need, as numbers and as lines for people."""

import multiprocessing
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection

from launcher.inference.inputs import input_problems
from launcher.plan.disk import existing_part
from launcher.plan.gpus import named_gpu
from launcher.plan.memory import checkpoint_bytes
from launcher.plan.plan import Plan, make_plan
from launcher.process.console import Console, human_bytes, human_count, human_time
from launcher.process.torchrun import num_gpus
from launcher.study.arms import Arm
from launcher.study.config import Keep
from launcher.study.dispatch import start_fork_server
from launcher.study.jobs import Job
from launcher.study.sharing import Sharing
from launcher.study.worker import Place
from model.size import flops_per_token, num_linear_parameters

ENOUGH_TOKENS = 15
"""Tokens per ternary parameter below which a 16-bit model is not trained enough to tell what a switch costs."""

MOST_FLOPS = 2e12
"""FLOPs of a step on a CPU above which it is not measured: that would take minutes."""

SECONDS_TO_MEASURE = 300.0
SECONDS_TO_DIE = 10.0

Stretch = tuple[Plan, int, int]
"""A plan, and the steps that are finished where a part of it begins and ends."""


def stretches(arms: Sequence[Arm], sharing: Sharing) -> tuple[list[Stretch], list[Stretch]]:
    """What is trained: all arms, each by itself; and trunks, each once, with what follows them of each arm."""
    alone = [(arm.plan, arm.plan.first_step, arm.plan.total_steps) for arm in arms]
    trunks = [(trunk.arm.plan, trunk.begin, trunk.end) for trunk in sharing.trunks]
    return alone, trunks + [(arm.plan, sharing.begin_of(arm), arm.plan.total_steps) for arm in arms]


def num_steps(trained: Sequence[Stretch]) -> int:
    """Steps of all stretches."""
    return sum(end - begin for _, begin, end in trained)


def num_tokens(trained: Sequence[Stretch]) -> int:
    """Tokens of all stretches."""
    return sum(plan.tokens_before(end) - plan.tokens_before(begin) for plan, begin, end in trained)


def show_arms(arms: Sequence[Arm], sharing: Sharing, console: Console) -> None:
    """Print the arms with the trunks that they continue, and what sharing saves."""
    ends = {trunk.name: trunk for trunk in sharing.trunks}
    rows = [["arm", "begins at", "steps", "switches at"]]
    for arm in arms:
        parent = sharing.parents[arm.name]
        switches = [f"{phase.start}" for phase in arm.plan.phases[1:]]
        begin = f"step {ends[parent].end} of trunk {parent}" if parent else "the beginning"
        rows.append([arm.name, begin, f"{arm.plan.total_steps - sharing.begin_of(arm):,}", ", ".join(switches) or "-"])
    console.aligned(rows)
    console.line()
    if sharing.trunks:
        direct = Counter(parent for parent in sharing.parents.values() if parent)
        direct.update(trunk.parent for trunk in sharing.trunks if trunk.parent)
        shown = [["trunk", "steps", "continued by"]]
        shown += [[trunk.name, f"{trunk.begin} to {trunk.end}", f"{direct[trunk.name]}"] for trunk in sharing.trunks]
        console.aligned(shown)
        console.line()
    for sentence in sharing.partings:
        console.line(sentence)


def show_totals(arms: Sequence[Arm], sharing: Sharing, console: Console) -> None:
    """Print what sharing saves, and warnings about tokens."""
    alone, shared = stretches(arms, sharing)
    steps, tokens_of = (num_steps(alone), num_steps(shared)), (num_tokens(alone), num_tokens(shared))
    console.line(
        f"{len(arms)} arms and {len(sharing.trunks)} trunks: {steps[1]:,} steps instead of {steps[0]:,} "
        f"({human_count(tokens_of[1])} tokens instead of {human_count(tokens_of[0])}); sharing saves "
        f"{1 - tokens_of[1] / tokens_of[0]:.0%}."
    )
    tokens = sorted({arm.tokens for arm in arms})
    if len(tokens) > 1:
        given = f"{human_count(tokens[0])} to {human_count(tokens[-1])}"
        console.line(f"WARNING: the arms have {given} tokens; losses at different numbers of tokens do not compare.")
    if (ratio := min(map(_tokens_per_parameter, arms))) < ENOUGH_TOKENS:
        console.line(
            f"WARNING: {ratio:.1f} tokens per ternary parameter. Below {ENOUGH_TOKENS} a 16-bit model is not trained "
            "enough, and rounding it costs little."
        )


def _tokens_per_parameter(arm: Arm) -> float:
    return arm.tokens / num_linear_parameters(arm.config.model)


def show_needs(
    jobs: Sequence[Job],
    place: Place,
    console: Console,
    *,
    num_places: int,
    keep: Keep,
    gpu: str | None,
    utilization: float,
) -> None:
    """Print hours, disk and what is missing.

    Args:
        jobs: of the study.
        place: of one of the workers.
        console: to print to.
        num_places: number of workers.
        keep: as `Study.keep`.
        gpu: the GPU for which hours are estimated; None measures steps on this machine.
        utilization: share of the peak of ``gpu`` that is reached.
    """
    seconds: float | None
    if gpu is not None:
        name, found = named_gpu(gpu)
        per_second = utilization * found.peak_flops_per_second * place.num_ranks
        seconds = sum(flops_of(job) for job in jobs) / per_second
        by = f"at {utilization:.0%} of the peak of {name}"
    else:
        seconds, by = measured_seconds(jobs, place)
    took = "not estimated" if seconds is None else f"about {human_time(seconds / num_places)}"
    rows = [["time", f"{took} with {num_places} at once, {by}"], ["disk", disk_in_words(jobs, place, keep, num_places)]]
    missing = {key: problem for job in jobs if not job.is_trunk for key, problem in input_problems(job.config)}
    console.aligned(rows + [[f"missing: {key}", problem] for key, problem in missing.items()])


def flops_of(job: Job, precision: str | None = None) -> float:
    """FLOPs of a job's steps, or of those in one precision."""
    plan = job.plan
    starts = {phase.start for phase in plan.phases} | {start for start, _ in plan.lengths}
    inside = [step for step in starts if job.begin < step < job.end]
    return sum(
        plan.flops_per_token_at(begin) * (plan.tokens_before(end) - plan.tokens_before(begin))
        for begin, end in pairwise(sorted({job.begin, *inside, job.end}))
        if precision in (None, plan.phase_of(begin).precision)
    )


def measured_seconds(jobs: Sequence[Job], place: Place) -> tuple[float | None, str]:
    """Seconds of all jobs one after the other, from steps that are measured here, and in words what they are from.

    The arm with the most precisions is measured; other models count by their FLOPs.
    """
    job = max(jobs, key=lambda job: len({phase.precision for phase in job.plan.phases}))
    plan = job.plan
    last = plan.total_steps - 1
    flops = flops_per_token(plan.config.model, plan.length_at(last)) * plan.tokens_at(last)
    if num_gpus() == 0 and flops > MOST_FLOPS:
        return None, f"because a step has {human_count(flops)} FLOPs; name a GPU with --gpu"
    parent, child = multiprocessing.Pipe(duplex=False)
    alone = make_plan(replace(plan.config, engine=replace(plan.config.engine, replicas=1)), 1)
    process = start_fork_server().Process(target=send_seconds_apart, args=(alone, place.threads, child))
    process.start()
    child.close()
    try:
        per_step = parent.recv() if parent.poll(SECONDS_TO_MEASURE) else {}
    except EOFError:
        per_step = {}
    process.kill()
    process.join(SECONDS_TO_DIE)
    if not per_step:
        return None, "because its steps could not be measured here; name a GPU with --gpu"
    rate = {name: value / flops for name, value in per_step.items()}
    slowest = max(rate.values())
    seconds = sum(flops_of(job, name) * rate.get(name, slowest) for job in jobs for name in ("16-bit", "ternary"))
    measured = " and ".join(f"{value:.3g} s in {name}" for name, value in sorted(per_step.items()))
    return seconds / place.num_ranks, f"by steps measured here: a step takes {measured}; without starts and evaluation"


def send_seconds_apart(plan: Plan, threads: int, answer: Connection) -> None:
    """Measure in a worker, which alone imports torch."""
    from launcher.study.speed import send_seconds

    send_seconds(plan, threads, answer)


def disk_in_words(jobs: Sequence[Job], place: Place, keep: Keep, num_places: int) -> str:
    """Space for checkpoints: what stays at the end, and the most that there is before."""
    sizes = {job.name: checkpoint_bytes(job.plan) for job in jobs}
    own = [job for job in jobs if not job.is_trunk]
    each = {"none": 0, "ends": 1}
    stays = sum(sizes[job.name] * each.get(keep, len(job.plan.phases) + job.config.checkpoint.keep_last) for job in own)
    while_running = sum(sizes[job.name] for job in jobs if job.is_trunk)
    while_running += num_places * max(
        sizes[job.name] * (len(job.plan.phases) + job.config.checkpoint.keep_last + 1) for job in jobs
    )
    free = shutil.disk_usage(existing_part(place.out)).free
    lacks = ": TOO LITTLE" if free < stays + while_running else ""
    return (
        f"{human_bytes(stays)} of checkpoints at the end, up to {human_bytes(stays + while_running)} before; "
        f"{human_bytes(free)} free{lacks}"
    )
