"""Hosts on one machine: namespaces joined by a bridge, each with an sshd, for tests of training over many hosts.

A host has a network, process numbers, a name, /etc/hosts, a /dev/shm and a /run of its own. The rest of the file system
is that of the machine, as on a cluster whose hosts share a disk. Namespaces have no names, only processes that hold
them: any number of instances can live at once, and all of it ends with the process that made it. Needs root.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

TOOLS = ("ip", "nsenter", "unshare", "setpriv", "ssh", "ssh-keygen", "sshd", "ss", "pdsh")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
TIMEOUT_SECONDS = 20
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

BOOT = """
set -e
hostname "$NAME"
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd /run/tmp
echo "$FIRST_PID" > /proc/sys/kernel/ns_last_pid
until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f "$FOLDER/sshd_config"
"""
"""What process 1 of a host does. Numbers of processes begin anywhere: torchrun knows its agents by host and number."""

SSH_CONFIG = """Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
  ServerAliveInterval 2
  ServerAliveCountMax 3
"""

SSHD_CONFIG = """HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
SetEnv TMPDIR=/run/tmp
"""


def reason_to_skip() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which takes root"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        return f"not installed: {', '.join(missing)}"
    namespaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(namespaces, capture_output=True).returncode:
        return "this machine does not let root make namespaces"
    return None


class Hosts:
    """host1, host2, ... with the addresses 10.77.0.11, 10.77.0.12, ..., for the time of a `with` block.

    Args:
        folder: an empty one, for keys, settings and logs.
    """

    def __init__(self, folder: Path, num_hosts: int = 2) -> None:
        self.folder = folder
        self.names = [f"host{number}" for number in range(1, num_hosts + 1)]
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        """Of each host that runs, and of the switch, the process that the namespaces end with."""

    def __enter__(self) -> Self:
        try:
            self._write_settings()
            self._hold("switch", ["--net", "sleep", "infinity"])
            self._at_switch("ip", "link", "add", "bridge", "type", "bridge")
            self._at_switch("ip", "link", "set", "bridge", "up")
            for name in self.names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in sorted(self._holders, key=lambda name: name == "switch"):
            self._end(name)

    def address(self, name: str) -> str:
        """The address of a host, up or not."""
        return f"10.77.0.{10 + int(name.removeprefix('host'))}"

    def is_up(self, name: str) -> bool:
        """Whether a host has power."""
        return name in self._holders

    def start(self, name: str) -> None:
        """Start a host, at first or after it was killed, and wait until one can log in."""
        number = name.removeprefix("host")
        environment = {"NAME": name, "FOLDER": str(self.folder), "ADDRESS": self.address(name), "PATH": PATH}
        environment["FIRST_PID"] = str(random.SystemRandom().randrange(300, 30_000))
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._hold(name, [*namespaces, "bash", "-c", BOOT], environment)
        with contextlib.suppress(subprocess.CalledProcessError):
            self._at_switch("ip", "link", "del", f"port{number}")  # of before; the kernel is slow to take it away
        card = ["eth0", "address", f"02:00:00:00:00:{int(number):02x}"]  # the same as before: others remember it
        cable = ["type", "veth", "peer", "name", *card, "netns", str(self._first_process(name))]
        self._at_switch("ip", "link", "add", f"port{number}", *cable)
        self._at_switch("ip", "link", "set", f"port{number}", "master", "bridge", "up")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.run(name, "ssh", name, "true").returncode:
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def popen(
        self, name: str, *command: str, env: dict[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a command on a host, as from its console. A signal to it does not reach the command: see `kill`."""
        environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        environment |= {"PATH": PATH, "TMPDIR": "/run/tmp"} | (env or {})
        target = str(self._first_process(name))
        enter = [
            "nsenter",
            "--target",
            target,
            "--net",
            "--uts",
            "--mount",
            "--pid",
            f"--wdns={options.pop('cwd', '/')}",
        ]
        return subprocess.Popen([*enter, *command], env=environment, text=True, **options)

    def run(self, name: str, *command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host to its end, and keep what it prints."""
        process = self.popen(name, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def processes(self, name: str) -> dict[int, str]:
        """Command lines of the processes on a host but for its sshd, by the number that they have there."""
        found: dict[int, str] = {}
        if not self.is_up(name):
            return found
        namespace = os.readlink(f"/proc/{self._first_process(name)}/ns/pid")
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is not ours to see
                if os.readlink(entry / "ns/pid") != namespace:
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                status = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines())
                if command and not command.startswith("sshd:"):  # a zombie has no command line
                    found[int(status["NSpid"].split()[-1])] = command
        return found

    def cut(self, name: str) -> None:
        """Pull the cable of a host: what it sends is lost, and so is what is sent to it."""
        self._at_switch("ip", "link", "set", f"port{name.removeprefix('host')}", "down")

    def plug(self, name: str) -> None:
        """Put the cable back."""
        self._at_switch("ip", "link", "set", f"port{name.removeprefix('host')}", "up")

    def kill(self, name: str) -> None:
        """Take the power off a host. Its cable goes first, so that its kernel closes no connection to the others."""
        self.cut(name)
        self._end(name)

    def _write_settings(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(command, check=True, env={"PATH": PATH})
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def _hold(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        """Start the process that new namespaces end with, and that ends with this one, however that ends."""
        tied = ["setpriv", "--pdeathsig", "KILL", "unshare", *command]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._holders[name] = subprocess.Popen(
                tied, env=env or {"PATH": PATH}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while os.readlink(f"/proc/{self._holders[name].pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            assert self._holders[name].poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline, name
            time.sleep(0.01)

    def _first_process(self, name: str) -> int:
        """Process 1 of a host, by the number that it has here."""
        holder = self._holders[name]
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (children := Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()):
            assert holder.poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline, name
            time.sleep(0.01)
        return int(children[0])

    def _end(self, name: str) -> None:
        """Kill process 1 of a host, and with it all that runs there; or the holder of the switch."""
        first = self._holders[name].pid if name == "switch" else self._first_process(name)
        os.kill(first, signal.SIGKILL)
        self._holders.pop(name).wait()

    def _at_switch(self, *command: str) -> None:
        enter = ["nsenter", f"--net=/proc/{self._holders['switch'].pid}/ns/net"]
        subprocess.run([*enter, *command], check=True, capture_output=True, env={"PATH": PATH})
