"""Training over two hosts without Slurm: three ways to start it, and hosts, cables and ranks that fail in mid-step."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import Hosts, reason_to_skip
from places import ROOT
from tiny import tiny_tree

from launcher.run.metrics_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason_to_skip()), reason=str(reason_to_skip()))]

PRETRAIN = str(ROOT / "launcher" / "pretrain.py")
NUM_STEPS, SWITCH = 20, 16
MORE_STEPS = 60
"""In 16 bits only, where several things are to happen in one run."""
PORT = "29500"
ENGINES = {"fsdp2": ["engine.name=fsdp2"], "zero2": ["engine.name=deepspeed", "engine.zero_stage=2"]}
DEADLINE_SECONDS = 150
ELASTIC = ("--nnodes=1:2", "--max-restarts=3", "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1")
EVERYWHERE = ("*", "0.0.0.0", "[::]")
RANK_1_ON_HOST2 = r"rank 1 \(process \d+ on host2\)"

Reference = Callable[..., list[tuple[int, float]]]


class Job:
    """What was started on hosts, and all that it prints, in one file for each command."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *command: str, env: dict[str, str] | None = None) -> None:
        """Start a command on a host, in the job's folder, as the one that is known by the host's name."""
        with (self.folder / f"{name}.out").open("a") as log:
            self.processes[name] = self.hosts.popen(
                name, *command, cwd=self.folder, stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1"} | (env or {})
            )

    def wait(self) -> dict[str, int]:
        """Exit codes, by host."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes.values()):
            time.sleep(0.05)
        codes = {name: process.poll() for name, process in self.processes.items()}
        assert None not in codes.values(), (codes, self.output)
        return codes

    @property
    def output(self) -> str:
        """What all of it has printed."""
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("*.out")))


def start_torchrun(job: Job, names: list[str], command: list[str], *options: str) -> None:
    for name in names:
        meeting = ["--rdzv-backend=c10d", "--rdzv-id=tiny", f"--rdzv-endpoint=host1:{PORT}"]
        nodes = options or [f"--nnodes={len(names)}"]
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        job.start(name, "torchrun", *nodes, "--nproc-per-node=1", *meeting, *command, env=env)


def start_deepspeed(job: Job, names: list[str], command: list[str]) -> None:
    (job.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    (job.folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    job.start(names[0], "deepspeed", "--hostfile", "hostfile", "--force_multi", "--master_port", PORT, *command)


def start_plain(job: Job, names: list[str], command: list[str]) -> None:
    for rank, name in enumerate(names):
        env = {"MASTER_ADDR": names[0], "MASTER_PORT": PORT, "RANK": str(rank), "WORLD_SIZE": str(len(names))}
        job.start(name, "python", *command, env=env)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(autouse=True)
def no_orphans(hosts: Hosts) -> Iterator[None]:
    """Whatever a test started on the hosts has ended with it, by itself; hosts and cables are there for the next."""
    yield
    deadline = time.monotonic() + 10  # what a killed process had at its side sees that a moment later
    while any(left := {name: list(hosts.processes(name).values()) for name in hosts.names}.values()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for name in hosts.names:
        if hosts.is_up(name):
            hosts.kill(name)
        hosts.start(name)
    assert not any(left), left


def command_for(folder: Path, shards: Path, engine: str) -> list[str]:
    """Write a configuration whose steps take long enough for something to fail in them."""
    tree: dict[str, Any] = tiny_tree(shards, folder / "run")
    tree["training"]["global_batch_sequences"] = 64
    tree["phases"] = [
        {"precision": "16-bit", "steps": SWITCH},
        {"precision": "ternary", "steps": NUM_STEPS - SWITCH},
    ]
    tree["checkpoint"] = {"interval_steps": 2}
    tree["watch"] = {"beat_seconds": 1.0, "lost_seconds": 10.0}  # engine.timeout_seconds is beyond the deadline here
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return [PRETRAIN, "--config", str(folder / "config.yaml"), *ENGINES[engine]]


def losses(run: Path) -> list[tuple[int, float]]:
    rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def on_one_host(hosts: Hosts, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Losses of an uninterrupted run of two ranks on one host, by engine and overrides."""

    @cache
    def find(engine: str, *overrides: str) -> list[tuple[int, float]]:
        folder = tmp_path_factory.mktemp("one-host")
        job = Job(hosts, folder)
        command = [*command_for(folder, shards, engine), *overrides]
        job.start("host1", "torchrun", "--standalone", "--nproc-per-node=2", *command)
        assert job.wait() == {"host1": 0}, job.output
        return losses(folder / "run")

    return find


def wait_for(job: Job, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, job.output
        assert all(process.poll() is None for process in job.processes.values()), job.output
        time.sleep(0.02)


def wait_for_step(job: Job, step: int) -> None:
    """Wait until the run has logged a step."""
    wait_for(job, lambda: bool(logged := losses(job.folder / "run")) and logged[-1][0] >= step)


def wait_for_end(hosts: Hosts, name: str, but: str = "sshd") -> None:
    """Wait until no process is left on a host, but those whose command line has a word in it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left := [command for command in hosts.processes(name).values() if but not in command]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def state(job: Job) -> dict[str, Any]:
    return json.loads((job.folder / "run" / "state.json").read_text())


def pid_of_rank(job: Job, rank: int) -> str:
    """Number of a rank's process on its host."""
    return (job.folder / "run" / "ranks" / f"rank-{rank:05d}").read_text().split()[1]


def listening(hosts: Hosts, name: str) -> list[tuple[str, str]]:
    """Address and port of each socket that listens on a host, sshd's aside."""
    lines = hosts.run(name, "ss", "-Hltnp").stdout.splitlines()
    addresses = [line.split()[3].rpartition(":") for line in lines if "sshd" not in line]
    return [(address, port) for address, _, port in addresses]


def assert_only_rendezvous_listens(hosts: Hosts, everywhere: list[str]) -> None:
    """Each host listens at the address that ranks use alone; the first one also everywhere, where torchrun needs it."""
    opened = {name: listening(hosts, name) for name in hosts.names}
    assert [port for address, port in opened["host1"] if address in EVERYWHERE] == everywhere, opened
    assert PORT in [port for _, port in opened["host1"]]
    others = [(name, address) for name in hosts.names for address, _ in opened[name] if address not in EVERYWHERE]
    assert all(address == hosts.address(name) for name, address in others), opened
    assert not [address for address, _ in opened["host2"] if address in EVERYWHERE], opened


@pytest.mark.parametrize(
    ("start", "engine", "everywhere"),
    [(start_torchrun, "fsdp2", [PORT]), (start_deepspeed, "zero2", []), (start_plain, "fsdp2", [])],
)
def test_every_way_to_start_gives_the_run_of_one_host(
    hosts: Hosts, shards: Path, tmp_path: Path, on_one_host: Reference, start: Any, engine: str, everywhere: list[str]
) -> None:
    job = Job(hosts, tmp_path)
    start(job, hosts.names, command_for(tmp_path, shards, engine))
    wait_for_step(job, 3)
    assert_only_rendezvous_listens(hosts, everywhere)
    assert set(job.wait().values()) == {0}, job.output
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))
    assert losses(tmp_path / "run") == on_one_host(engine)


def test_a_killed_rank_is_named_and_a_stopped_one_saves(
    hosts: Hosts, shards: Path, tmp_path: Path, on_one_host: Reference
) -> None:
    command = command_for(tmp_path, shards, "zero2")
    job = Job(hosts, tmp_path)
    start_deepspeed(job, hosts.names, command)
    wait_for_step(job, 5)
    hosts.run("host2", "kill", "-KILL", pid_of_rank(job, 1))
    assert job.wait()["host1"] not in (0, 3), job.output
    assert re.search(RANK_1_ON_HOST2, job.output), job.output
    assert re.search(RANK_1_ON_HOST2, state(job)["message"])

    start_deepspeed(job, hosts.names, command)
    wait_for_step(job, 9)
    hosts.run("host2", "kill", "-USR2", pid_of_rank(job, 1))
    assert job.wait() == {"host1": 3}, job.output
    assert state(job)["status"] == "interrupted"

    start_deepspeed(job, hosts.names, command)
    assert job.wait() == {"host1": 0}, job.output
    assert job.output.count("Resuming tiny after step") == 2
    assert losses(tmp_path / "run") == on_one_host("zero2")


@pytest.mark.parametrize(("start", "lost"), [(start_plain, "host2"), (start_torchrun, "host1")])
def test_a_host_without_power_is_named_and_the_run_goes_on_with_the_other(
    hosts: Hosts, shards: Path, tmp_path: Path, on_one_host: Reference, start: Any, lost: str
) -> None:
    command = command_for(tmp_path, shards, "fsdp2")
    job = Job(hosts, tmp_path)
    start(job, hosts.names, command)
    wait_for_step(job, 5)
    hosts.kill(lost)
    (left,) = set(hosts.names) - {lost}
    wait_for_end(hosts, left, but="torchrun")
    if (
        start is start_torchrun
    ):  # the agent that is left looks for the rendezvous for many minutes, and heeds no SIGTERM
        hosts.run(left, "pkill", "-KILL", "-f", "torchrun")
    codes = job.wait()
    assert codes.pop(lost) == -9
    assert codes[left] not in (0, 3), job.output
    assert re.search(rf"rank \d \(process \d+ on {lost}\)", state(job)["message"]), job.output

    job = Job(hosts, tmp_path)
    start_plain(job, [left], command)
    assert set(job.wait().values()) == {0}, job.output
    assert "Resuming tiny after step" in job.output
    in_16_bits = [loss for _, loss in losses(tmp_path / "run")][:SWITCH]
    assert in_16_bits == pytest.approx([loss for _, loss in on_one_host("fsdp2")][:SWITCH], rel=1e-5)


def test_a_cut_cable_ends_both_sides_and_the_same_command_goes_on(
    hosts: Hosts, shards: Path, tmp_path: Path, on_one_host: Reference
) -> None:
    steps = (f"phases.0.steps={2 * MORE_STEPS}",)  # as many as the second start needs to get to the folder
    command = [*command_for(tmp_path, shards, "zero2"), *steps]
    job = Job(hosts, tmp_path)
    start_deepspeed(job, hosts.names, command)
    lock = tmp_path / "run" / "lock"
    wait_for(job, lambda: lock.exists() and "host1" in lock.read_text())
    second = Job(hosts, tmp_path)
    start_plain(second, ["host2"], command)
    wait_for_step(job, 3)
    assert second.wait() == {"host2": 2}, second.output
    assert f"another job trains here (process {pid_of_rank(job, 0)} on host1" in second.output
    assert state(job)["status"] == "running"
    hosts.cut("host2")
    assert job.wait()["host1"] not in (0, 3), job.output
    assert re.search(RANK_1_ON_HOST2, state(job)["message"]), job.output
    wait_for_end(hosts, "host2")  # none there waits for the other side for ever
    hosts.plug("host2")

    start_deepspeed(job, hosts.names, command)
    assert job.wait() == {"host1": 0}, job.output
    assert "Resuming tiny after step" in job.output
    assert losses(tmp_path / "run") == on_one_host("zero2", *steps)


def test_torchrun_goes_on_by_itself_with_fewer_hosts_and_with_more(
    hosts: Hosts, shards: Path, tmp_path: Path, on_one_host: Reference
) -> None:
    steps = (f"phases.0.steps={MORE_STEPS - 1}", "phases.1.steps=1")
    command = [*command_for(tmp_path, shards, "fsdp2"), *steps]
    job = Job(hosts, tmp_path)
    start_torchrun(job, hosts.names, command, *ELASTIC)
    wait_for_step(job, 5)
    hosts.run("host2", "kill", "-KILL", pid_of_rank(job, 1))
    wait_for(job, lambda: "Resuming tiny after step" in job.output)
    wait_for_step(job, 10)

    hosts.kill("host2")
    del job.processes["host2"]
    wait_for(job, lambda: job.output.count("Resuming tiny after step") == 2)
    assert state(job)["status"] == "running"

    hosts.start("host2")
    start_torchrun(job, ["host2"], command, *ELASTIC)
    assert job.wait() == {"host1": 0, "host2": 0}, job.output
    assert job.output.count("Resuming tiny after step") == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_ranks"] == 2
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, MORE_STEPS + 1))
    expected = [loss for _, loss in on_one_host("fsdp2", *steps)]
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
