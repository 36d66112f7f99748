"""The files of docker/: they lint, follow their schemas, and do what they say."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import yaml
from places import ROOT

DOCKER = ROOT / "docker"
SCRIPTS = [*sorted(DOCKER.glob("*.sh")), *sorted((ROOT / "launcher" / "slurm").glob("*.sbatch")), ROOT / ".ci" / "run"]


def tool(name, *arguments):
    """Run a program that the test extra brings."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path, f"{name} is missing: pip install -e '.[test]'"
    result = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_dockerfile_lints():
    tool("hadolint", str(DOCKER / "Dockerfile"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_lints(script):
    tool("shellcheck", "--severity=style", str(script))


def test_compose_file_follows_its_schema():
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml"))


def test_nodes_of_the_compose_file_are_the_ranks_of_one_run():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    nodes = [service for name, service in services.items() if name != "prepare"]
    environments = [service["environment"] for service in nodes]
    assert [int(environment["RANK"]) for environment in environments] == list(range(len(nodes)))
    assert {environment["WORLD_SIZE"] for environment in environments} == {str(len(nodes))}
    assert {environment["MASTER_ADDR"] for environment in environments} == {nodes[0]["hostname"]}
    assert all(service["command"] == nodes[0]["command"] for service in nodes)


def test_compose_file_prepares_what_the_quickstart_reads():
    from launcher.config.file import load_config

    command = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["prepare"]["command"]
    data = load_config(ROOT / "configs" / "quickstart.yaml").data
    assert data.prepare is not None
    assert command == [
        "prepare",
        *data.prepare.inputs,
        f"--out={data.sources[0].path}",
        f"--tokenizer={data.prepare.tokenizer}",
        f"--sequence-length={data.sequence_length}",
        f"--validation-fraction={data.prepare.validation_fraction}",
    ]


def documents():
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / "trainjob.yaml").read_text()))


def model_of(document):
    import kubeflow_trainer_api.models as models

    return getattr(models, f"TrainerV1alpha1{document['kind']}")


def differences(given, understood, at=""):
    """Paths of what was given and is not in what a model made of it, which leaves out what it does not know."""
    if isinstance(given, dict) and isinstance(understood, dict):
        return [
            path
            for key, value in given.items()
            for path in (differences(value, understood[key], f"{at}.{key}") if key in understood else [f"{at}.{key}"])
        ]
    if isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        return [path for i, item in enumerate(given) for path in differences(item, understood[i], f"{at}[{i}]")]
    return [] if given == understood else [at]


def test_manifest_follows_the_schema():
    """Types and required fields are the model's to check; unknown fields, of pods and job sets as well, are ours."""
    assert [document["kind"] for document in documents()] == ["TrainingRuntime", "TrainJob"]
    for document in documents():
        assert differences(document, model_of(document).from_dict(document).to_dict()) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("TrainJob", "spec.trainer.numNode", 2),
        ("TrainJob", "spec.trainer.numNodes", "2"),
        ("TrainingRuntime", "spec.template.spec.replicatedJobs.0.template.spec.template.spec.runAsNonRoot", True),
        ("TrainingRuntime", "spec.mlPolicy.torch.numProcPerNode", "auto"),
    ],
)
def test_schema_notices_what_is_wrong(kind, path, value):
    document = next(document for document in documents() if document["kind"] == kind)
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    try:
        understood = model_of(document).from_dict(document).to_dict()
    except ValueError:
        return
    assert differences(document, understood) == [re.sub(r"\.(\d+)\b", r"[\1]", f".{path}")]


def test_manifest_belongs_to_the_image_and_to_a_configuration():
    runtime, job = documents()
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    uid = int(re.search(r"^ARG UID=(\d+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE).group(1))
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == uid
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    for argument in job["spec"]["trainer"]["args"]:
        if match := re.search(r"/opt/tritrain/(.*)", argument):
            assert (ROOT / match.group(1)).is_file()
    save = next(a for a in job["spec"]["trainer"]["args"] if a.startswith("--shutdown-timeout="))
    assert int(save.partition("=")[2]) < pod["terminationGracePeriodSeconds"]


def locked():
    """Version of each package in the locks; of several for several Pythons, any."""
    text = "".join(path.read_text() for path in sorted(DOCKER.glob("*.lock")))
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def test_locks_allow_what_the_project_asks_for():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    arguments = dict(re.findall(r"^ARG (TORCH|TORCHVISION)=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    versions = locked() | {name.lower(): version for name, version in arguments.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["s3"], *extras["gs"], *extras["gguf"], *extras["eval"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def test_locks_name_hashes_and_no_index():
    for path in DOCKER.glob("*.lock"):
        text = path.read_text()
        assert "://" not in text
        assert "--find-links" not in text
        for entry in re.split(r"\n(?=\S)", text.strip()):
            assert entry.startswith("#") or "--hash=sha256:" in entry, entry


def run_entrypoint(tmp_path, *arguments, **variables):
    """What the entrypoint starts, and with what; the programs are stand-ins that tell."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("python", "tritrain", "torchrun"):
        (programs / name).write_text(
            f'#!/bin/bash\nprintf "%s\\n" {name} "$@" "threads=${{OMP_NUM_THREADS:-}}" "home=$HOME" "user=$USER"\n'
            "exit 7\n"
        )
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)} | variables
    command = [str(DOCKER / "entrypoint.sh"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 7, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("given", "started"),
    [
        ([], ["tritrain"]),
        (["--help"], ["tritrain", "--help"]),
        (["train", "a file.yaml", "run.name=$(x)"], ["tritrain", "train", "a file.yaml", "run.name=$(x)"]),
        (["torchrun", "--nnodes", "2"], ["torchrun", "--nnodes", "2"]),
        (["pretrain", "--config", "c"], ["python", "/opt/tritrain/launcher/pretrain.py", "--config", "c"]),
    ],
)
def test_entrypoint_becomes_the_program(tmp_path, given, started):
    assert run_entrypoint(tmp_path, *given)[: -3 if given else 1] == started


def test_entrypoint_divides_the_cores_of_a_node_among_its_single_ranks(tmp_path):
    cores = len(os.sched_getaffinity(0))
    alone = int(run_entrypoint(tmp_path, "pretrain")[-3].partition("=")[2])
    assert 1 <= alone <= cores
    assert run_entrypoint(tmp_path, "pretrain", LOCAL_WORLD_SIZE=str(alone))[-3] == "threads=1"
    assert run_entrypoint(tmp_path, "pretrain", LOCAL_WORLD_SIZE="4096")[-3] == "threads=1"
    assert run_entrypoint(tmp_path, "pretrain", OMP_NUM_THREADS="3")[-3] == "threads=3"
    assert run_entrypoint(tmp_path, "torchrun")[-3] == "threads="


def test_entrypoint_gives_an_unknown_user_a_home_and_a_name(tmp_path):
    *_, home, user = run_entrypoint(tmp_path, "torchrun", HOME=str(tmp_path / "missing"), TMPDIR=str(tmp_path))
    assert Path(home.partition("=")[2]).parent == tmp_path
    assert os.access(home.partition("=")[2], os.W_OK)
    assert user == f"user={os.getuid()}"
    assert run_entrypoint(tmp_path, "torchrun", USER="ada")[-2:] == [f"home={tmp_path}", "user=ada"]


def test_entrypoint_passes_signals_on():
    process = subprocess.Popen(
        [str(DOCKER / "entrypoint.sh"), "bash", "-c", "trap 'exit 3' USR2; echo ready; while :; do sleep 0.05; done"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 3


def healthcheck():
    spec = importlib.util.spec_from_file_location("healthcheck", DOCKER / "healthcheck.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("status", "last", "is_silent"),
    [
        ("running", 1_000.0, True),
        ("running", 9_800.0, False),  # 200 seconds ago
        ("running", 400.0, False),  # before the container started
        ("complete", 1_000.0, False),
        ("interrupted", 1_000.0, False),
    ],
)
def test_container_is_healthy_unless_its_run_fell_silent(tmp_path, status, last, is_silent):
    run = tmp_path / "a"
    run.mkdir()
    (run / "heartbeats.json").write_text(json.dumps({"time": last, "ranks": []}))
    (run / "state.json").write_text(json.dumps({"status": status}))
    (tmp_path / "without-heartbeats").mkdir()
    silent = healthcheck().silent_runs(tmp_path, started=500.0, now=10_000.0)
    assert silent == (["a: no heartbeat for 9000 s"] if is_silent else [])


def test_container_whose_run_beats_seldom(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (run / "heartbeats.json").write_text(json.dumps({"time": 1_000.0, "beat_seconds": 300.0, "ranks": []}))
    silent_runs = healthcheck().silent_runs
    assert silent_runs(tmp_path, started=500.0, now=2_000.0) == []  # with no state: its folder is being removed
    (run / "state.json").write_text(json.dumps({"status": "running"}))
    assert silent_runs(tmp_path, started=500.0, now=1_890.0) == []
    assert silent_runs(tmp_path, started=500.0, now=1_910.0) == ["a: no heartbeat for 910 s"]


def test_start_of_the_first_process():
    """Not what the kernel's passing notes of it say: their times are those at which it was last looked for."""
    now = time.time()
    assert healthcheck().container_started(now) == pytest.approx(psutil.Process(1).create_time(), abs=2)
    assert healthcheck().container_started(now + 50) == pytest.approx(healthcheck().container_started(now) + 50, abs=1)


def test_container_that_has_no_runs_is_healthy(tmp_path):
    result = subprocess.run([sys.executable, str(DOCKER / "healthcheck.py"), str(tmp_path / "runs")])
    assert result.returncode == 0
