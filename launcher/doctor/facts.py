"""Measurements of `tritrain doctor`: of each rank's host, and of the network between ranks."""

import contextlib
import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from data.torchvision_repair import repair_torchvision
from launcher.config.sections import Config
from launcher.hidden import PACKAGES, ROOT
from launcher.plan.inputs import needed_paths
from launcher.process.exchange import gather_values
from launcher.process.ranks import Ranks
from launcher.run.folder import is_complete_run

MIB = 2**20


ALL_REDUCE_BYTES = (MIB, 64 * MIB)


ALL_REDUCE_ROUNDS = 5


PROBE_BYTES = 64 * MIB


CLOCK_ROUNDS = 8


SECONDS_TO_APPEAR = 10.0
"""How long a host may take to see another one's new file: NFS clients remember for seconds what is not there."""


STREAMING_SEGMENT = re.compile(r"\d{6}_[a-z_]+")
"""Names of `streaming`'s segments in /dev/shm."""


SHARED_MEMORY = Path("/dev/shm")


SLOW_SETTINGS = {
    "NCCL_P2P_DISABLE": "GPUs of a host talk through host memory",
    "NCCL_IB_DISABLE": "hosts talk over TCP",
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is checked by another one",
    "NCCL_DEBUG": "NCCL writes about every call",
}
"""Environment variables, and what they do where they are set to more than a word of `HARMLESS_VALUES`."""


HARMLESS_VALUES = {"", "0", "OFF", "INFO", "WARN", "VERSION"}


@dataclass(frozen=True)
class RankFacts:
    """Facts about a rank and its host."""

    rank: int
    host: str
    versions: dict[str, str]
    torchvision_fits: bool
    """Whether torchvision, if it is installed, can be imported without `data.torchvision_repair`."""
    gpu: str | None
    """Name of its GPU."""
    gpu_bytes: int
    gpu_free_bytes: int
    has_nvidia_device: bool
    """Whether an NVIDIA driver is installed."""
    free_memory_bytes: int
    """Of the host, or of its container."""
    open_files: int
    """How many it may have open."""
    locked_bytes: int | None
    """Memory that it may lock; None: all."""
    rdma_devices: int
    shm_bytes: int
    shm_free_bytes: int
    leftovers: list[str]
    """Segments of `streaming` that no process has open."""
    address: str
    """What the host's own name leads to; empty where to nothing."""
    interfaces: list[str]
    gloo_interface: str | None
    """GLOO_SOCKET_IFNAME."""
    threads: int
    cores: int
    settings: dict[str, str]
    """Environment variables that slow training down."""
    has_plan: bool
    paths: dict[str, str | None]
    """Paths that the run still reads, with a digest of their content; None if nothing exists there."""


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce of a number of bytes; the terms are those of NCCL's tests (PERFORMANCE.md there)."""

    backend: str
    num_bytes: int
    seconds: float
    """Median, of the slowest rank."""
    world_size: int
    is_right: bool

    @property
    def algorithm_gb_per_second(self) -> float:
        """Bytes over time."""
        return self.num_bytes / self.seconds / 1e9

    @property
    def bus_gb_per_second(self) -> float:
        """Load of each rank's link: in the best algorithm, every byte is sent 2 (n - 1) / n times."""
        return self.algorithm_gb_per_second * 2 * (self.world_size - 1) / self.world_size


@dataclass(frozen=True)
class DiskProbe:
    """A file that was written, flushed to the disk and read back, past the kernel's cache as far as it allows."""

    num_bytes: int
    write_seconds: float
    read_seconds: float
    error: str | None = None


def requirements() -> list[Requirement]:
    """The requirements of the installed package, with Python and without extras."""
    package = metadata("tritrain")
    lines = [f"python{package['Requires-Python']}", *(package.get_all("Requires-Dist") or ())]
    parsed = [Requirement(line) for line in lines]
    return [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate()]


def installed_versions(required: Sequence[Requirement]) -> dict[str, str]:
    """Versions by name, and a digest of Tritrain's code; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for requirement in required[1:]:
        with contextlib.suppress(PackageNotFoundError):
            versions[requirement.name] = version(requirement.name)
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    code = hashlib.sha256()
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).glob("**/*.py")):
            code.update(path.read_bytes())
    return versions | {"code": code.hexdigest()[:12]}


def look_around(ranks: Ranks, config: Config | None, required: Sequence[Requirement]) -> RankFacts:
    """The facts of this rank."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    on_gpu = ranks.device.type == "cuda"
    free, total = torch.cuda.mem_get_info(ranks.device) if on_gpu else (0, 0)
    shm = shutil.disk_usage(SHARED_MEMORY)
    needed = () if config is None or is_complete_run(config) else needed_paths(config)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return RankFacts(
        rank=ranks.rank,
        host=host,
        versions=installed_versions(required),
        torchvision_fits=not repair_torchvision(),
        gpu=torch.cuda.get_device_name(ranks.device) if on_gpu else None,
        gpu_bytes=total,
        gpu_free_bytes=free,
        has_nvidia_device=Path("/dev/nvidiactl").exists(),
        free_memory_bytes=free_memory_bytes(),
        open_files=open_files if open_files != resource.RLIM_INFINITY else 2**31,
        locked_bytes=locked if locked != resource.RLIM_INFINITY else None,
        rdma_devices=len(list(Path("/sys/class/infiniband").glob("*"))),
        shm_bytes=shm.total,
        shm_free_bytes=shm.free,
        leftovers=leftovers(SHARED_MEMORY),
        address=address,
        interfaces=sorted(psutil.net_if_addrs()),
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        settings=slow_settings(os.environ),
        has_plan=config is not None,
        paths={path: digest_of(Path(path)) for _, path in needed},
    )


def slow_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `SLOW_SETTINGS` that are set so that they slow down."""
    there = {name: environment[name] for name in SLOW_SETTINGS if name in environment}
    return {name: value for name, value in there.items() if value.upper() not in HARMLESS_VALUES}


def free_memory_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that is to be had: of the host, or of the control group where that leaves less.

    A group's use counts files that the kernel keeps in memory, which it gives up where there is need.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            limit_bytes, used_bytes = (int((group / name).read_text()) for name in (limit, used))
            found = re.search(rf"^{cached} (\d+)$", (group / stat).read_text(), re.MULTILINE)
            free = min(free, limit_bytes - used_bytes + (int(found[1]) if found else 0))
    return max(0, free)


def leftovers(folder: Path) -> list[str]:
    """Names of this user's shared-memory segments of `streaming` that no process has open.

    Processes of other containers are not seen.
    """
    with contextlib.suppress(OSError):
        ours = [path for path in folder.iterdir() if STREAMING_SEGMENT.fullmatch(path.name)]
        ours = [path for path in ours if path.stat().st_uid == os.getuid()]
        if not ours:
            return []
        used = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # another user's, or gone
                used |= set(re.findall(re.escape(str(folder)) + r"/(\d{6})_", (process / "maps").read_text()))
        return sorted(path.name for path in ours if path.name[:6] not in used)
    return []


def digest_of(path: Path) -> str | None:
    """A digest by which two hosts can be compared: of a folder, names and sizes; None if nothing exists there.

    A prepared folder's manifest has digests of its own.
    """
    try:
        if path.is_dir():
            manifest = path / "manifest.json"
            text = manifest.read_bytes() if manifest.is_file() else repr(sorted(os.listdir(path))).encode()
            return f"folder {hashlib.sha256(text).hexdigest()[:8]}"
        return f"file of {path.stat().st_size} bytes"
    except OSError:
        return None


def gather(fact: Any, ranks: Ranks) -> list[Any]:
    """Collect a value of JSON's types from every rank; a collective."""
    return gather_values(fact) if ranks.world_size > 1 else [fact]


def measure_all_reduce(ranks: Ranks, sizes: Sequence[int] = ALL_REDUCE_BYTES) -> list[AllReduce]:
    """Sum tensors of these sizes in bytes over all ranks, with every backend that there is; a collective."""
    if ranks.world_size == 1:
        return []
    results = []
    places = {"gloo": torch.device("cpu")} | ({"nccl": ranks.device} if ranks.device.type == "cuda" else {})
    for backend, device in places.items():
        for num_bytes in sizes:
            seconds, is_right = [], True
            for _ in range(1 + ALL_REDUCE_ROUNDS):
                tensor = torch.full((num_bytes // 4,), float(ranks.rank + 1), device=device)
                dist.barrier()
                _wait_for(device)
                began = time.perf_counter()
                dist.all_reduce(tensor)
                _wait_for(device)
                seconds.append(time.perf_counter() - began)
                is_right &= bool((tensor == ranks.world_size * (ranks.world_size + 1) / 2).all())
            outcomes = gather((statistics.median(seconds[1:]), is_right), ranks)  # the first one connects
            slowest = max(taken for taken, _ in outcomes)
            results.append(AllReduce(backend, num_bytes, slowest, ranks.world_size, all(ok for _, ok in outcomes)))
    return results


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_offsets(ranks: Ranks, clock: Callable[[], float] = time.time) -> list[float]:
    """Seconds that each rank's clock is ahead of the first one's, on all ranks; a collective.

    The first rank sends to each other one, which answers with its time. Half of the way there and back lies before that
    time (as in NTP, RFC 5905, section 8); of several rounds the quickest is the least wrong, at most by half its way.
    """
    offsets = torch.zeros(ranks.world_size, dtype=torch.float64)
    answer = torch.zeros(1, dtype=torch.float64)
    for other in range(1, ranks.world_size):
        best = float("inf")
        for _ in range(CLOCK_ROUNDS):
            if ranks.is_first:
                sent = clock()
                dist.send(answer, other)
                dist.recv(answer, other)
                took = clock() - sent
                if took < best:
                    best, offsets[other] = took, answer - (sent + took / 2)
            elif ranks.rank == other:
                dist.recv(answer, 0)
                answer.fill_(clock())
                dist.send(answer, 0)
    if ranks.world_size > 1:
        dist.broadcast(offsets, 0)
    return [float(offset) for offset in offsets]


def look_for(path: Path, seconds: float) -> str:
    """Content of a file that another host has written, waiting for it to appear; empty where it does not."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if text := path.read_text():
                return text
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.1)


def probe_disk(folder: Path, num_bytes: int, rank: int) -> DiskProbe:
    """Write a number of bytes to a folder, flush, and read them back."""
    path, block = folder / f"probe-{rank:05d}", os.urandom(MIB)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(num_bytes // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with path.open("rb") as file:
            is_right = all(file.read(MIB) == block for _ in range(num_bytes // MIB))
        ended = time.perf_counter()
    except OSError as error:
        return DiskProbe(num_bytes, 0.0, 0.0, f"{error.strerror} ({path})")
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    problem = None if is_right else f"{path}: other bytes were read than written"
    return DiskProbe(num_bytes, written - began, ended - started, problem)
