"""Builds the image of docker/Dockerfile without an engine, and runs containers of it; needs root, buildah, debootstrap.

The base is a minimal Debian from the machine's own mirror. What this machine's pip needs to reach an index is mounted
while packages are installed, as the secret that the Dockerfile takes. Set TRITRAIN_IMAGE_CACHE to a folder to keep base
and layers for the next time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from places import ROOT

SUITE = "bookworm"
BASE = f"localhost/debian:{SUITE}-slim"
TAG = "localhost/tritrain:cpu"
SECRET = "secret-of-the-build"
"""Stands in pip.conf as a comment, to be looked for in the image."""


def why_not():
    """Why an image cannot be built here, or an empty string."""
    if os.getuid() != 0:
        return "needs root"
    missing = [name for name in ("buildah", "debootstrap", "ip", "unshare") if shutil.which(name) is None]
    return f"needs {', '.join(missing)}" if missing else ""


class Builder:
    """buildah with a storage of its own."""

    def __init__(self, cache: Path, work: Path) -> None:
        self.work = work
        cache.mkdir(parents=True, exist_ok=True)
        settings = work / "storage.conf"
        paths = f'graphroot = "{cache / "storage"}"\nrunroot = "{work / "run"}"\n'
        settings.write_text(f'[storage]\ndriver = "overlay"\n{paths}')
        self.environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(settings)}

    def __call__(self, *arguments: str) -> str:
        command = ["buildah", *arguments]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        return result.stdout.strip()

    def make_base(self) -> None:
        """A minimal Debian, unless the storage has it."""
        if BASE in self("images", "--format", "{{.Name}}:{{.Tag}}").split():
            return
        targets = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)"], capture_output=True, text=True)
        mirror = next((line for line in targets.stdout.split() if line.endswith("/debian")), "")
        root = self.work / "base"
        command = ["debootstrap", "--variant=minbase", SUITE, str(root), *([mirror] if mirror else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        container = self("from", "scratch")
        self("add", "--quiet", container, str(root), "/")
        self("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(root)

    def build(self) -> None:
        """The CPU image, by the Dockerfile as it is."""
        self.make_base()
        secret, mounts = self._pip_settings()
        self(
            *("bud", "--isolation=chroot", "--layers", "--format=docker", "--pull-never", f"--tag={TAG}"),
            *(f"--volume={mount}" for mount in mounts),
            *("--secret", f"id=pip,src={secret}", f"--build-arg=BASE={BASE}"),
            "--build-arg=TORCH_INDEX=",  # the index that pip is configured with
            "--build-arg=REVISION=tested",
            *("--file=docker/Dockerfile", "."),
        )

    def _pip_settings(self) -> tuple[Path, list[str]]:
        """A pip.conf with this machine's settings, and what is to be mounted for the paths in it."""
        listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
        # The environment (`:env:`) comes last: it wins over files.
        settings = sorted(re.findall(r"^(global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE), reverse=True)
        found = {key: value for _, key, value in settings}
        lines, mounts = ["[global]", f"# {SECRET}"], []
        for key in ("index-url", "trusted-host", "proxy", "cert", "find-links"):
            if key in found:
                value = found[key]
                if value.startswith("/"):
                    inside = f"/mnt/{key}"
                    mounts.append(f"{value}:{inside}:ro")
                    value = inside
                lines.append(f"{key} = {value}")
        path = self.work / "pip.conf"
        path.write_text("\n".join(lines) + "\n")
        return path, mounts

    def configuration(self) -> dict:
        """The image's configuration, as an engine reads it."""
        return json.loads(self("inspect", "--type=image", TAG))["Docker"]["config"]

    def size_gigabytes(self) -> float:
        """Of all files of the image."""
        size, unit = self("images", "--format", "{{.Size}}", TAG).split()
        return float(size) / {"MB": 1000, "GB": 1}[unit]


class Container:
    """A container of the image, with its user, its folder and, if ``through_entrypoint``, its entrypoint."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.name = builder("from", "--pull-never", TAG)
        self.root = Path(builder("mount", self.name))
        self.entrypoint = builder.configuration()["Entrypoint"]

    def start(self, *command: str, network: str = "", host: str = "", options: tuple = (), **variables: str):
        """Run a command through the entrypoint, in a network namespace, by default one with nothing but a loopback.

        As under an engine it has a /dev/shm of its own, which buildah's chroot would share with this machine.
        """
        into = ["ip", "netns", "exec", network] if network else ["unshare", "--net", "--mount"]
        own = 'ip link set lo up; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; exec "$@"'
        environment = [f"--env={name}={value}" for name, value in variables.items()]
        name = [f"--hostname={host}"] if host else []
        buildah = ["buildah", "run", "--isolation=chroot", *environment, *name, *options, self.name, "--"]
        return subprocess.Popen(
            [*into, "bash", "-c", own, "bash", *buildah, *self.entrypoint, *command],
            env=self.builder.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **how) -> str:
        """Run a command to its end, which must be a good one; returns what it says."""
        process = self.start(*command, **how)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{command}\n{output[-6000:]}"
        return output

    def remove(self) -> None:
        """Give back what it holds."""
        self.builder("rm", self.name)
