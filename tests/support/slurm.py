"""A real Slurm on this machine: one controller and several nodes, up in a second, in folders and on ports of its own.

Each node is a `slurmd` in UTS and mount namespaces of its own, so that it has its own hostname, `/etc/hosts` with all
nodes, and `/dev/shm`: on one machine the shared memory of two nodes' ranks would otherwise have the same names. Nodes
claim CPUs, memory and GPUs that the machine need not have. Needs root, and Debian's packages `slurmctld`, `slurmd`,
`slurm-client` and `munge`.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
MARK = "TRITRAIN_TEST_SLURM"
"""Variable in the environment of all that belongs to a cluster, jobs included; its value is the cluster's folder."""


def missing_part() -> str | None:
    """Why no Slurm can be started here."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)" if absent else None


class Slurm:
    """A cluster that runs; its commands take `environment`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"node{number + 1}" for number in range(nodes)]
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), MARK: str(folder)}
        self.environment = os.environ | self.variables

    def call(self, *command: str, check: bool = True) -> str:
        """Run a command of the cluster's; returns what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def call_here(self, *command: str) -> str:
        """As `call`, in the environment and folder of the moment."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | self.variables)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str, key: str) -> str:
        """A value of `scontrol show job`, such as `JobState` or `Restarts`."""
        found = re.search(rf"\b{key}=(\S+)", self.call("scontrol", "show", "job", "--oneliner", number))
        return found[1] if found else ""

    def wait(self, number: str, seconds: float = 150) -> str:
        """Wait until a job has ended and is not queued again; returns its state."""
        return self.wait_for(number, ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL"), seconds)

    def wait_for(self, number: str, states: tuple[str, ...], seconds: float = 150) -> str:
        """Wait until a job is in one of these states."""
        deadline = time.monotonic() + seconds
        while (state := self.job(number, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {number} is {state}"
            time.sleep(0.2)
        return state

    def start_node(self, node: str) -> None:
        """Power a node on."""
        (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
        script = (
            "mount --bind $1/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm && hostname $2 "
            "&& exec slurmd -f $1/slurm.conf -N $2"
        )
        isolated = ["unshare", "--uts", "--mount", "--propagation", "private"]
        self.call(*isolated, "bash", "-c", script, "_", str(self.folder), node)

    def kill_node(self, node: str) -> None:
        """Take a node's power: all its processes, those of jobs too, are killed at once."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        namespace = os.readlink(f"/proc/{daemon}/ns/uts")
        assert namespace != os.readlink("/proc/self/ns/uts")
        os.kill(daemon, signal.SIGSTOP)  # so that it reports nothing
        for process in _processes():
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns" / "uts") == namespace:
                    os.kill(int(process.name), signal.SIGKILL)

    def node_of_rank(self, run: Path, rank: int) -> str:
        """Host of a rank of a run."""
        return (run / "ranks" / f"rank-{rank:05d}").read_text().split()[0]


@contextmanager
def slurm_cluster(folder: Path, nodes: int = 2) -> Iterator[Slurm]:
    """A cluster with the partitions `main` (of low priority) and `urgent` (which preempts it); stopped at the end."""
    cluster = Slurm(folder, nodes)
    port = _free_ports(nodes + 1)
    for part in ("munge", "state", "log", "spool"):
        (folder / part).mkdir(parents=True)
    for parent in (folder, *folder.parents):  # munge refuses a socket that not everybody can reach
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    key = folder / "munge" / "key"
    key.write_bytes(random.randbytes(128))
    key.chmod(0o600)
    (folder / "munge").chmod(0o711)
    addresses = [f"127.0.0.{11 + number}" for number in range(nodes)]
    hosts = [Path("/etc/hosts").read_text(), *(f"{a} {node}" for a, node in zip(addresses, cluster.nodes, strict=True))]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[1-8]\n")  # any device stands for a GPU
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    lines = [
        f"NodeName={node} NodeAddr={address} Port={port + 1 + number} CPUs=96 RealMemory=2000000 Gres=gpu:8"
        " Feature=h100 State=UNKNOWN"
        for number, (node, address) in enumerate(zip(cluster.nodes, addresses, strict=True))
    ]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=socket.gethostname(), port=port, munge=folder / "munge")
        + "\n".join(lines)
        + "\nPartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
        "\nPartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF\n"
    )
    try:
        munge = folder / "munge"
        options = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        cluster.call("munged", f"--socket={munge}/sock", "--num-threads=2", *options)
        cluster.call("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in cluster.nodes:
            cluster.start_node(node)
        deadline = time.monotonic() + 60
        while len(cluster.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", check=False).splitlines()) < nodes:
            assert time.monotonic() < deadline, cluster.call("sinfo", "-N", check=False)
            time.sleep(0.1)
        yield cluster
    finally:
        _stop(cluster)


def _stop(cluster: Slurm) -> None:
    """End the jobs and the daemons: all processes with the mark of this cluster, and none else."""
    cluster.call("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 10
    while cluster.call("squeue", "-h", check=False) and time.monotonic() < deadline:
        time.sleep(0.2)
    mark = f"{MARK}={cluster.folder}".encode()
    for number in (signal.SIGTERM, signal.SIGKILL):
        ours = []
        for process in _processes():
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), number)
                    ours.append(process)
        for _ in range(30):
            if not any(process.exists() for process in ours):
                return
            time.sleep(0.1)


def _processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has."""
    for _ in range(100):
        first = random.SystemRandom().randrange(12_000, 19_000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


# What differs from a usual cluster: everything is in one folder, all waits are short (cred_expire bounds how soon a
# requeued job starts again; 5 s is the least), and nodes may claim what they do not have (config_overrides).
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={munge}/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=3,sched_min_interval=0,requeue_setup_env_fail
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=15
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
BatchStartTimeout=10
MessageTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
