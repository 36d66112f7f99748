"""The image, built for real: what is in it, what is not, and that it trains."""

import json
import os
import stat
import subprocess
from pathlib import Path

import image
import pytest
import yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(image.why_not()), reason=f"an image cannot be built here: {image.why_not()}"),
]
QUICKSTART = "/opt/tritrain/configs/quickstart.yaml"
SHORT = ("phases.0.steps=4", "phases.1.steps=4", "phases.1.transition.ramp.steps=2", "schedule.warmup_steps=2")
QUICK = (*SHORT, "logging.interval_steps=1", "data.validation_rows=8", "logging.tensorboard=false")


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    work = tmp_path_factory.mktemp("image")
    cache = Path(os.environ.get("TRITRAIN_IMAGE_CACHE", work / "cache"))
    builder = image.Builder(cache, work)
    builder.build()
    yield builder
    if "TRITRAIN_IMAGE_CACHE" not in os.environ:
        builder("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def container(builder):
    container = image.Container(builder)
    yield container
    container.remove()


def losses(workspace, run):
    lines = (workspace / "runs" / run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def state(workspace, run):
    return json.loads((workspace / "runs" / run / "state.json").read_text())["status"]


def test_configuration(builder):
    config = builder.configuration()
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels["licenses"] == "Apache-2.0"
    assert labels["revision"] == "tested"
    assert labels["base.name"] == image.BASE
    assert config["User"] == "10001:10001"
    assert config["WorkingDir"] == "/workspace"
    assert config["Entrypoint"][0] == "tini"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert not [name for name in config["Env"] if "TOKEN" in name or "SECRET" in name or "PIP" in name]


def test_size_is_what_is_documented(builder):
    gigabytes = builder.size_gigabytes()
    page = (image.ROOT / "docs" / "images.md").read_text()
    assert f"{gigabytes:.1f} GB" in page, f"the image is of {gigabytes:.2f} GB"


def test_no_secret_and_no_writable_code_is_in_the_image(builder, container):
    assert image.SECRET not in builder("inspect", "--type=image", image.TAG)
    found = subprocess.run(["grep", "-rlsF", image.SECRET, container.root], capture_output=True, text=True).stdout
    assert found == ""
    for path in ("etc/pip.conf", "root/.config", "root/.netrc", "root/.pypirc", "opt/tritrain/.git"):
        assert not (container.root / path).exists()
    for path in container.root.joinpath("opt").rglob("*"):
        if not path.is_symlink():
            information = path.stat()
            assert information.st_uid == 0
            assert not information.st_mode & stat.S_IWOTH, path


def test_operations_of_deepspeed_are_there_and_no_compiler(container):
    code = (
        "import shutil, os; from deepspeed.ops.op_builder.all_ops import ALL_OPS\n"
        "for name in ('cpu_adam', 'deepspeed_shm_comm'): print(name, ALL_OPS[name].load().__file__)\n"
        "print([name for name in ('cc', 'gcc', 'g++', 'c++', 'clang', 'nvcc') if shutil.which(name)])\n"
        "print(os.getuid(), os.path.exists(os.path.expanduser('~/.cache/torch_extensions')))\n"
    )
    *_, adam, shared_memory, compilers, last = container.run("python", "-c", code).strip().splitlines()
    assert adam.startswith("cpu_adam /opt/venv/")
    assert shared_memory.startswith("deepspeed_shm_comm /opt/venv/")
    assert compilers == "[]"
    assert last == "10001 False"


def test_entrypoint_is_the_command_line(container):
    assert "Usage: tritrain" in container.run("--help")
    assert "parameters" in container.run("plan", QUICKSTART, "--ranks", "2")


def test_it_trains_with_both_engines_offline_and_resumes(container):
    """ZeRO compiles nothing: there is no compiler, and its losses are FSDP2's up to rounding."""
    workspace = container.root / "workspace"
    container.run("train", QUICKSTART, "--ranks", "2", "run.name=fsdp2", *QUICK)
    deepspeed = ("engine.name=deepspeed", "engine.zero_stage=3")
    container.run("train", QUICKSTART, "--ranks", "2", "run.name=zero", *deepspeed, *QUICK)
    assert state(workspace, "fsdp2") == state(workspace, "zero") == "complete"
    assert len(losses(workspace, "fsdp2")) == 8
    assert losses(workspace, "fsdp2")[:4] == pytest.approx(losses(workspace, "zero")[:4], rel=1e-5)
    assert (workspace / "runs" / "fsdp2" / "report.html").stat().st_uid == 10001
    assert "is complete" in container.run("train", QUICKSTART, "--ranks", "2", "run.name=fsdp2", *QUICK)
    container.run("python", "/opt/tritrain/docker/healthcheck.py", "runs")


def test_the_two_nodes_of_the_compose_file_train_together(builder, tmp_path):
    """Each service in a container and a network namespace of its own, on one volume, as compose would start it."""
    services = yaml.safe_load((image.ROOT / "docker" / "compose.yaml").read_text())["services"]
    volume = tmp_path / "workspace"
    volume.mkdir()
    os.chown(volume, 10001, 10001)
    nodes = [name for name in services if name != "prepare"]
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"10.78.0.{i + 1} {name}\n" for i, name in enumerate(nodes)) + "127.0.0.1 localhost\n")
    mounts = ("--no-hosts", f"--volume={volume}:/workspace", f"--volume={hosts}:/etc/hosts:ro")
    spaces = [f"tritrain-{os.getpid()}-{name}" for name in nodes]
    containers = [image.Container(builder) for _ in nodes]

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        containers[0].run(*services["prepare"]["command"], options=mounts)
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        for i, space in enumerate(spaces):
            ip("-n", space, "addr", "add", f"10.78.0.{i + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
        running = [
            container.start(
                *(*services[name]["command"], *QUICK),
                **services[name]["environment"],
                network=space,
                host=services[name]["hostname"],
                options=mounts,
            )
            for container, name, space in zip(containers, nodes, spaces, strict=True)
        ]
        outputs = [process.communicate(timeout=900)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n".join(output[-4000:] for output in outputs)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for container in containers:
            container.remove()
    assert state(volume, "two-nodes") == "complete"
    assert len(losses(volume, "two-nodes")) == 8
