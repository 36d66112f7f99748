"""Checks of `tritrain doctor`: pure functions from the ranks' facts to verdicts.

Speeds and sizes of disks and memory have binary prefixes (GiB, MiB/s), bandwidths between ranks decimal ones (GB/s), as
NCCL's tests do.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.requirements import Requirement

from data.shared_memory import ORDER_BYTES
from launcher.doctor.facts import SLOW_SETTINGS, AllReduce, DiskProbe, RankFacts
from launcher.plan.memory import offloaded_bytes_per_rank
from launcher.plan.plan import Plan
from launcher.plan.sources import most_rows
from launcher.plan.table import describe
from launcher.process.console import human_bytes

MOST_CLOCK_SKEW_SECONDS = 1.0


LEAST_OPEN_FILES, ENOUGH_OPEN_FILES = 1024, 4096


LEAST_SHARED_MEMORY_BYTES = 128 * 2**20
"""Above the 64 MiB that Docker gives: batches of the reading processes and `streaming`'s tables take some."""


NCCL_SHARED_MEMORY_BYTES = 64 * 2**20
"""For each rank with a GPU: NCCL's buffers between ranks of a host that reach each other in no other way."""


LEAST_BUS_GB_PER_SECOND = {("gloo", False): 0.05, ("gloo", True): 0.05, ("nccl", False): 5.0, ("nccl", True): 2.0}
"""By backend and whether there are several hosts: less has hardly another cause than a wrong way between ranks. Gigabit
Ethernet gives 0.1, PCIe 3 some 10, 25 Gbit Ethernet 3."""


MOST_CHECKPOINT_SECONDS = 300


RESERVE = 0.9
"""Share of a device's free memory that the plan's estimate may take; it leaves temporary buffers out."""


Level = Literal["ok", "skipped", "warning", "failure"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check."""

    check: str
    level: Level
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured, with units in the names."""


def named(ranks: Iterable[RankFacts]) -> str:
    """Ranks by host, for a person: `host1 (ranks 0 to 7), host2 (rank 8)`."""
    hosts: dict[str, list[int]] = {}
    for facts in ranks:
        hosts.setdefault(facts.host, []).append(facts.rank)
    return ", ".join(f"{host} ({_numbers(sorted(numbers))})" for host, numbers in hosts.items())


def _numbers(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def grouped(ranks: Sequence[RankFacts], values: Sequence[Any]) -> str:
    """Values that differ between ranks, with the ranks that have them."""
    groups: dict[Any, list[RankFacts]] = {}
    for facts, value in zip(ranks, values, strict=True):
        groups.setdefault(value, []).append(facts)
    return "; ".join(f"{value} on {named(group)}" for value, group in groups.items())


def num_hosts(ranks: Sequence[RankFacts]) -> int:
    """Hosts that ranks run on."""
    return len({facts.host for facts in ranks})


def check_versions(ranks: Sequence[RankFacts], required: Sequence[Requirement]) -> Verdict:
    """All ranks have the same versions and the same code, and the versions are supported.

    ``required`` is `launcher.doctor.facts.requirements`.
    """
    differing = []
    for name in ranks[0].versions:
        if len({facts.versions.get(name) for facts in ranks}) > 1:
            differing.append(f"{name} {grouped(ranks, [facts.versions.get(name, 'is missing') for facts in ranks])}")
    if differing:
        return Verdict(
            "versions",
            "failure",
            ". ".join(differing),
            "Install the same environment and code on all hosts, best on a disk that they share, or in an image.",
        )
    there = ranks[0].versions
    unsupported = [
        f"{requirement.name} {there.get(requirement.name, 'is missing')}, {requirement.specifier} is needed"
        for requirement in required
        if there.get(requirement.name) is None
        or not requirement.specifier.contains(there[requirement.name], prereleases=True)
    ]
    if unsupported:
        return Verdict("versions", "failure", "; ".join(unsupported), "`pip install -e .` brings those that fit.")
    shown = ("python", "torch", "CUDA", "NCCL", "deepspeed", "mosaicml-streaming")
    return Verdict("versions", "ok", ", ".join(f"{name} {there[name]}" for name in shown if name in there))


def check_torchvision(ranks: Sequence[RankFacts]) -> Verdict:
    """The installed torchvision was built for the installed torch; programs other than Tritrain do not repair it."""
    unfit = [facts for facts in ranks if not facts.torchvision_fits]
    if not unfit:
        return Verdict("torchvision", "ok", "fits torch, or is not installed")
    return Verdict(
        "torchvision",
        "warning",
        f"was built for another torch on {named(unfit)}; Tritrain works around it, but Transformers cannot load an "
        "exported model (operator torchvision::nms does not exist)",
        "With a CPU build of torch: pip install --force-reinstall --no-deps torchvision "
        "--index-url https://download.pytorch.org/whl/cpu, in the version that docs/installing.md names.",
    )


def check_gpus(ranks: Sequence[RankFacts]) -> Verdict:
    """Either no rank has a GPU, or each has one of its own and all are alike."""
    if all(facts.gpu is None for facts in ranks):
        found = "no GPU is seen; ranks compute on CPUs"
        if not any(facts.has_nvidia_device for facts in ranks):
            return Verdict("GPUs", "skipped", found)
        return Verdict(
            "GPUs",
            "failure",
            f"{found}, but there is a driver on {named(f for f in ranks if f.has_nvidia_device)}",
            "Install torch for CUDA (docs/installing.md), and ask the scheduler for GPUs.",
        )
    if any(facts.gpu is None for facts in ranks):
        lacking = named(facts for facts in ranks if facts.gpu is None)
        return Verdict("GPUs", "failure", f"no GPU is seen on {lacking}", "Look at nvidia-smi there.")
    if len({(facts.gpu, facts.gpu_bytes) for facts in ranks}) > 1:
        found = grouped(ranks, [f"{facts.gpu}, {human_bytes(facts.gpu_bytes)}" for facts in ranks])
        return Verdict("GPUs", "warning", found, "The slowest sets the pace, and the smallest what fits.")
    return Verdict("GPUs", "ok", f"{len(ranks)} of {ranks[0].gpu}, {human_bytes(ranks[0].gpu_bytes)}")


def planned_bytes(plan: Plan, *, on_gpu: bool) -> tuple[float, float]:
    """Estimate the bytes of GPU memory and of host memory that a rank needs.

    In the host's: all that the GPU's lacks, what is offloaded, and the copy that a checkpoint is written from.
    """
    numbers = describe(plan)
    device, host = float(numbers["total_bytes_per_rank"]), offloaded_bytes_per_rank(plan)
    if plan.config.checkpoint.asynchronous:
        host += float(numbers["checkpoint_bytes"]) / plan.world_size
    return (device, host) if on_gpu else (0.0, device + host)


def check_gpu_memory(ranks: Sequence[RankFacts], needed_bytes: float | None) -> Verdict:
    """The plan's estimate fits into what is free on each GPU."""
    if needed_bytes is None or all(facts.gpu is None for facts in ranks):
        return Verdict("GPU memory", "skipped", "needs a configuration and GPUs")
    tightest = min(ranks, key=lambda facts: facts.gpu_free_bytes)
    found = f"{human_bytes(needed_bytes)} of {human_bytes(tightest.gpu_free_bytes)} are needed on {named([tightest])}"
    level = _level(tightest.gpu_free_bytes, needed_bytes, needed_bytes / RESERVE)
    advice = "" if level == "ok" else (
        "Lower training.micro_batch_sequences, set training.activation_checkpointing, engine.reduce_gradients: "
        "micro-batch (FSDP2), a higher engine.zero_stage or engine.offload; and see nvidia-smi for what else is there."
    )  # fmt: skip
    return Verdict("GPU memory", level, found, advice)


def check_host_memory(ranks: Sequence[RankFacts], needed_bytes: float | None) -> Verdict:
    """Each host has enough free memory for its ranks."""
    if needed_bytes is None:
        return Verdict("host memory", "skipped", "needs a configuration")
    loads = [(facts, needed_bytes * _ranks_beside(facts, ranks)) for facts in ranks]
    tightest, load = min(loads, key=lambda pair: pair[0].free_memory_bytes - pair[1])
    free = tightest.free_memory_bytes
    found = f"{human_bytes(load)} of {human_bytes(free)} are needed on {tightest.host}"
    level = _level(free, load, load / RESERVE)
    advice = "" if level == "ok" else (
        "checkpoint.asynchronous=false and engine.offload=none need less; so do fewer ranks on a host."
    )  # fmt: skip
    return Verdict("host memory", level, found, advice)


def _ranks_beside(facts: RankFacts, ranks: Sequence[RankFacts]) -> int:
    return sum(other.host == facts.host for other in ranks)


def _level(there: float, least: float, enough: float) -> Level:
    return "failure" if there < least else "warning" if there < enough else "ok"


def check_all_reduce(results: Sequence[AllReduce], *, several_hosts: bool) -> list[Verdict]:
    """Sums are right, and the way between ranks is not hopelessly slow; one verdict for each backend."""
    if not results:
        return [Verdict("all-reduce", "skipped", "needs two ranks")]
    verdicts = []
    for backend in dict.fromkeys(result.backend for result in results):
        mine = [result for result in results if result.backend == backend]
        check = f"all-reduce, {backend}"
        found = "\n".join(
            f"{human_bytes(result.num_bytes)} in {1e3 * result.seconds:.3g} ms: algorithm "
            f"{result.algorithm_gb_per_second:.3g} GB/s, bus {result.bus_gb_per_second:.3g} GB/s"
            for result in mine
        )
        numbers = {
            f"{name}_gb_per_second_at_{result.num_bytes}_bytes": value
            for result in mine
            for name, value in (("algorithm", result.algorithm_gb_per_second), ("bus", result.bus_gb_per_second))
        }
        least = LEAST_BUS_GB_PER_SECOND[backend, several_hosts]
        if not all(result.is_right for result in mine):
            advice = "A sum over ranks is wrong: a GPU, a cable or a driver is broken. Leave that host out."
            verdicts.append(Verdict(check, "failure", found, advice, numbers))
        elif mine[-1].bus_gb_per_second < least:
            variables = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
            advice = (
                f"Below {least:g} GB/s: name the fast interface in {variables}; NCCL_DEBUG=INFO says what is taken."
            )
            verdicts.append(Verdict(check, "warning", found, advice, numbers))
        else:
            verdicts.append(Verdict(check, "ok", found, "", numbers))
    return verdicts


def check_clocks(ranks: Sequence[RankFacts], offsets_seconds: Sequence[float]) -> Verdict:
    """Clocks agree; by them logs are compared, and checkpoints and heartbeats dated."""
    if len(ranks) == 1:
        return Verdict("clocks", "skipped", "needs two ranks")
    worst = max(range(len(ranks)), key=lambda rank: abs(offsets_seconds[rank]))
    skew = offsets_seconds[worst]
    numbers = {"skew_seconds": skew}
    if abs(skew) > MOST_CLOCK_SKEW_SECONDS:
        found = (
            f"the clock of {named([ranks[worst]])} is {abs(skew):.3g} s {'ahead' if skew > 0 else 'behind'} rank 0's"
        )
        return Verdict("clocks", "warning", found, "Let chrony or ntpd set it.", numbers)
    return Verdict("clocks", "ok", f"within {1e3 * abs(skew):.2g} ms", "", numbers)


def check_disk_space(free_bytes: float, checkpoint_bytes: int, kept: int, there: int, place: str) -> Verdict:
    """The checkpoints that the plan keeps, and the one being written beside them, fit onto the disk."""
    needed = checkpoint_bytes * max(0, kept + 1 - there)
    found = (
        f"{human_bytes(free_bytes)} are free in {place}; {kept} checkpoints of {human_bytes(checkpoint_bytes)} are kept"
        f"{f', {there} exist already' if there else ''}, and one more while it is written: {human_bytes(needed)}"
    )
    level = _level(free_bytes, needed, 1.1 * needed)
    advice = "" if level == "ok" else "Make room, lower checkpoint.keep_last, or set run.folder or checkpoint.folder."
    return Verdict("disk space", level, found, advice, {"free_bytes": free_bytes, "needed_bytes": needed})


def check_disk_speed(probes: Sequence[DiskProbe], checkpoint_bytes: int | None, place: str) -> Verdict:
    """All ranks together write a checkpoint in minutes."""
    if failed := [f"rank {rank}: {probe.error}" for rank, probe in enumerate(probes) if probe.error]:
        return Verdict(
            "disk speed", "failure", "; ".join(failed), f"Each rank writes its part of a checkpoint to {place}."
        )
    write = sum(probe.num_bytes / probe.write_seconds for probe in probes)
    read = sum(probe.num_bytes / probe.read_seconds for probe in probes)
    numbers = {"write_bytes_per_second": write, "read_bytes_per_second": read}
    found = f"{place}: all ranks at once write {human_bytes(write)}/s and read {human_bytes(read)}/s"
    if checkpoint_bytes is None:
        return Verdict("disk speed", "ok", found, "", numbers)
    seconds = checkpoint_bytes / write
    found += f"; a checkpoint takes {seconds:.2g} s"
    if seconds > MOST_CHECKPOINT_SECONDS:
        advice = f"More than {MOST_CHECKPOINT_SECONDS} s: save seldom, on a faster disk, or to a store."
        return Verdict("disk speed", "warning", found, advice, numbers)
    return Verdict("disk speed", "ok", found, "", numbers)


def check_shared_folder(ranks: Sequence[RankFacts], seen: Sequence[str], written: str, place: str) -> Verdict:
    """Every host sees what the first rank wrote into the run's folder."""
    if num_hosts(ranks) == 1 and len(ranks) == 1:
        return Verdict("shared folder", "skipped", "needs two ranks")
    blind = [facts for facts, text in zip(ranks, seen, strict=True) if text != written]
    if blind:
        found = f"{place}: what {named(ranks[:1])} wrote is not seen, or is another file, on {named(blind)}"
        return Verdict("shared folder", "failure", found, "Set run.folder to a disk that all hosts mount, at one path.")
    return Verdict("shared folder", "ok", f"all ranks see what rank 0 writes to {place}")


def check_paths(ranks: Sequence[RankFacts]) -> Verdict:
    """Every path that the run still reads exists on every host that needs it, with the same content."""
    paths = list(dict.fromkeys(path for facts in ranks for path in facts.paths))
    if not paths:
        return Verdict("paths", "skipped", "the run reads none" if ranks[0].has_plan else "needs a configuration")
    problems = []
    for path in paths:
        needing = [facts for facts in ranks if path in facts.paths]  # a host that has no tokens yet needs the text
        digests = [facts.paths[path] for facts in needing]
        if None in digests:
            problems.append(f"{path} is missing on {named([facts for facts in needing if facts.paths[path] is None])}")
        elif len(set(digests)) > 1:
            problems.append(f"{path} differs: {grouped(needing, digests)}")
    if problems:
        return Verdict("paths", "failure", "; ".join(problems), "Copy or mount it there, at the same path.")
    return Verdict("paths", "ok", f"{', '.join(paths)}: on every host")


def check_limits(ranks: Sequence[RankFacts]) -> list[Verdict]:
    """Open files, and memory that may be locked where there is RDMA."""
    least = min(ranks, key=lambda facts: facts.open_files)
    level = _level(least.open_files, LEAST_OPEN_FILES, ENOUGH_OPEN_FILES)
    advice = "" if level == "ok" else f"`ulimit -n {16 * LEAST_OPEN_FILES}`; in Slurm --propagate=NOFILE passes it on."
    verdicts = [Verdict("open files", level, f"{least.open_files:,} may be open on {named([least])}", advice)]
    with_rdma = [facts for facts in ranks if facts.rdma_devices]
    if not with_rdma:
        return [*verdicts, Verdict("locked memory", "skipped", "no RDMA device was found")]
    limited = [facts for facts in with_rdma if facts.locked_bytes is not None]
    if limited:
        found = f"{human_bytes(limited[0].locked_bytes or 0)} may be locked on {named(limited)}"
        advice = "`ulimit -l unlimited`, or `--ulimit memlock=-1` for a container: RDMA locks NCCL's buffers."
        return [*verdicts, Verdict("locked memory", "failure", found, advice)]
    return [*verdicts, Verdict("locked memory", "ok", "unlimited")]


def shared_memory_needed(ranks_beside: int, num_gpus: int, plan: Plan | None) -> float:
    """Bytes of `/dev/shm` that the ranks of a host take, generously.

    Each process that reads sources which are fetched or decompressed has batches on their way (`data.reading`), with 4
    bytes a token. The order of an epoch (`data.rows`) is there once. Pinned copies of checkpoints are not in it.
    """
    batches, order = 0.0, 0 if plan is None else ORDER_BYTES * most_rows(plan)
    if plan is not None and plan.config.data.workers and plan.config.data.cache is not None:
        rank_tokens = plan.batch.full * plan.config.data.sequence_length / plan.world_size
        batches = 4 * rank_tokens * 3 * plan.config.data.workers * ranks_beside
    return LEAST_SHARED_MEMORY_BYTES + num_gpus * NCCL_SHARED_MEMORY_BYTES + batches + order


def check_shared_memory(ranks: Sequence[RankFacts], plan: Plan | None) -> Verdict:
    """`/dev/shm` has room for what reading processes and NCCL put there."""
    verdicts = []
    for facts in ranks:
        beside = _ranks_beside(facts, ranks)
        needed = shared_memory_needed(beside, beside if facts.gpu else 0, plan)
        found = f"/dev/shm of {facts.host}: {human_bytes(facts.shm_free_bytes)} of {human_bytes(facts.shm_bytes)} free"
        if facts.shm_free_bytes < needed:
            advice = "`docker run --shm-size=16g` or --ipc=host; on a host mount -o remount,size=50% /dev/shm."
            return Verdict("shared memory", "failure", f"{found}, about {human_bytes(needed)} are needed", advice)
        verdicts.append(Verdict("shared memory", "ok", found))
    return verdicts[0]


def check_leftovers(ranks: Sequence[RankFacts]) -> Verdict:
    """Dead jobs have not left shared memory of `streaming`, which takes space and can stop the next job."""
    leftovers = {facts.host: facts.leftovers for facts in ranks if facts.leftovers}
    if leftovers:
        found = "; ".join(f"{', '.join(names)} on {host}" for host, names in leftovers.items())
        patterns = sorted({f"/dev/shm/{name[:6]}_*" for names in leftovers.values() for name in names})
        return Verdict("dead jobs", "warning", found, f"No process has them open: rm {' '.join(patterns)}")
    return Verdict("dead jobs", "ok", "no dead job has left shared memory")


def check_host_names(ranks: Sequence[RankFacts]) -> Verdict:
    """Each host's name leads to an address that the others reach: gloo tells it to them."""
    several = num_hosts(ranks) > 1
    for facts in ranks:
        if facts.gloo_interface and facts.gloo_interface not in facts.interfaces:
            found = f"GLOO_SOCKET_IFNAME is {facts.gloo_interface}; {facts.host} has {', '.join(facts.interfaces)}"
            return Verdict("host names", "failure", found, "Name one that every host has.")
    if not several:
        return Verdict("host names", "skipped", "needs two hosts")
    lost = [facts for facts in ranks if not facts.gloo_interface and re.match("127\\.|$", facts.address)]
    if lost:
        names = ", ".join(name for name in lost[0].interfaces if name != "lo") or "none but lo"
        found = f"the host's own name is {lost[0].address or 'unknown'} on {named(lost)}"
        advice = f"Others cannot reach that: set GLOO_SOCKET_IFNAME to an interface that they share ({names})."
        return Verdict("host names", "warning", found, advice)
    return Verdict("host names", "ok", grouped(ranks, [facts.gloo_interface or facts.address for facts in ranks]))


def check_environment(ranks: Sequence[RankFacts]) -> Verdict:
    """Nothing in the environment slows training down; threads of all ranks fit onto their host's cores."""
    problems = []
    for facts in ranks:
        threads = facts.threads * _ranks_beside(facts, ranks)
        if threads > facts.cores:
            problems.append(
                f"{threads} threads on {facts.cores} cores of {facts.host}: set OMP_NUM_THREADS to "
                f"{max(1, facts.cores // _ranks_beside(facts, ranks))}"
            )
        problems += [f"{name}={value} on {facts.host}: {SLOW_SETTINGS[name]}" for name, value in facts.settings.items()]
    if problems:
        return Verdict("environment", "warning", "; ".join(dict.fromkeys(problems)), "Unset or change what slows down.")
    return Verdict("environment", "ok", f"threads per rank: {ranks[0].threads}, cores: {ranks[0].cores}")
