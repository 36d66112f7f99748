"""Jobs for Slurm: what the script says, what is refused, and that no value in it is ever run."""

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from ranks import run_ranks
from tiny import tiny_config
from typer.testing import CliRunner

import launcher.submit
from launcher import requeue
from launcher.config import Config, ConfigError, RunConfig
from launcher.config_file import load_config
from launcher.pretrain import COMPLETE, run
from launcher.run_folder import RunFolder
from launcher.runtime import ALONE, _complete_environment, first_host
from launcher.slurm_site import ContainerConfig, SiteConfig, load_site
from launcher.stopping import StopRequest, end_of_job, time_to_stop
from launcher.submit import Request, next_submission, render, snapshot, submit

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "job.sbatch"
UPDATE = "TRITRAIN_UPDATE_GOLDEN" in os.environ
REQUEST = Request(nodes=2, ranks_per_node=2, gpus_per_node=2, launcher="torchrun", time="12:00:00")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "shards", tmp_path / "run")


SHOWN = "   JobState=RUNNING Reason=None\n   StartTime=2026-01-01T00:00:00 EndTime=2026-01-02T00:00:00 Deadline=N/A"


def stand_ins(folder: Path) -> Path:
    """A folder of stand-ins for a cluster's programs that write down what they are called with."""
    folder.mkdir()
    answers = {
        "scontrol": f"case $1$2 in showhostnames) echo node1; echo node2;; showjob) echo '{SHOWN}';; esac",
        "sbatch": "echo 17",
        **dict.fromkeys(("srun", "module", "scancel", "sleep", "python3", "python"), ":"),
    }
    for name, answer in answers.items():
        note = f"{{ printf '%s\\0' {name} \"$@\"; echo; }} >> {folder}/calls"
        (folder / name).write_text(f"#!/bin/bash\n{answer}\n{note}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return stand_ins(tmp_path / "programs")


def calls(programs: Path, name: str) -> list[list[str]]:
    """Arguments of each call of a stand-in."""
    lines = (programs / "calls").read_text().split("\0\n") if (programs / "calls").exists() else []
    return [line.split("\0")[1:] for line in lines if line.split("\0")[0] == name]


def run_script(script: str, programs: Path) -> subprocess.CompletedProcess[str]:
    file = programs / "job.sbatch"
    file.write_text(script)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment |= {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "2"}
    return subprocess.run(["bash", file], env=environment, capture_output=True, text=True, timeout=60, cwd=programs)


def test_golden_script() -> None:
    parsed = load_config(ROOT / "configs/quickstart.yaml", ["run.folder=/runs/a"])
    site = load_site(ROOT / "launcher/slurm/site.example.yaml")
    request = Request(nodes=2, ranks_per_node=1, gpus_per_node=1, launcher="torchrun", time="12:00:00")
    script = render(parsed, site, request, Path("/runs/a/submitted/20260131-120000"))
    if UPDATE:
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()


@pytest.mark.parametrize("launcher", launcher.submit.LAUNCHERS)
@pytest.mark.parametrize("container", [None, "pyxis", "apptainer"])
def test_script_is_sound_and_starts_the_ranks_from_the_snapshot(
    config: Config, programs: Path, tmp_path: Path, launcher: str, container: Any
) -> None:
    image = ContainerConfig(runtime=container, image="/images/a.sqsh") if container else None
    site = SiteConfig(container=image, cpus_per_rank=4, network_interface="ib0", modules=("cuda",))
    request = Request(nodes=2, ranks_per_node=2, gpus_per_node=2, launcher=launcher, time=None)
    folder = next_submission(config)
    script = render(config, site, request, folder)
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-S", "warning", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    folder.mkdir(parents=True)
    done = run_script(script, programs)
    [started] = calls(programs, "srun")
    assert started[-3:] == [f"{folder}/code/launcher/pretrain.py", "--config", f"{folder}/config.yaml"], done.stderr
    words = " ".join(started)
    assert ("--container-image=/images/a.sqsh" in words) == (container == "pyxis")
    assert ("apptainer exec" in words) == (container == "apptainer")
    assert f"#SBATCH --ntasks-per-node={2 if launcher == 'srun' else 1}\n" in script
    assert f"#SBATCH --cpus-per-task={4 if launcher == 'srun' else 8}\n" in script
    assert ("--rdzv-endpoint=node1:20017" in started) == (launcher == "torchrun")


def test_dry_run_prints_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.cli import app

    monkeypatch.chdir(tmp_path)
    arguments = ["submit", str(ROOT / "configs/quickstart.yaml"), "--nodes", "2", "--gpus-per-node", "1", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_nobody_gives_and_a_value_that_nobody_quotes_are_errors(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "launcher" / "slurm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(launcher.submit, "ROOT", tmp_path)
    for text, error, message in (
        ("{{ nodse | sh }}", UndefinedError, "nodse"),
        ("{{ site.partitoin | sh }}", UndefinedError, "partitoin"),
        ("{% if nodse %}{% endif %}", UndefinedError, "nodse"),
        ("echo {{ run }}", TypeError, "no filter has quoted"),
        ("echo {{ run | upper }}", TypeError, "no filter has quoted"),
    ):
        (folder / "job.sbatch.j2").write_text(text)
        with pytest.raises(error, match=message):
            render(config, SiteConfig(), REQUEST, tmp_path / "run/submitted/1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "site.partitoin: unknown key; did you mean partition?"),
        ("gpus_per_node: '8'", "site.gpus_per_node: is '8'"),
        ("time: a day", "site.time: is 'a day'; must be such as 90"),
        ('account: "a\\nb"', "site.account: is 'a\\nb'; must be printable text on one line"),
        (
            "sbatch_options: ['--wrap=x', '--output=/x', '-N 3', '--mem=\"1\"']",
            "site.sbatch_options.1: is '--output=/x'",
        ),
        ("environment: {HF_TOKEN: x}", "site.environment.HF_TOKEN: looks like a secret"),
        ("environment: {'A;touch x': x}", "is no name of a variable"),
        ("container: {runtime: docker, image: x}", "site.container.runtime"),
        ("container: {runtime: pyxis, image: x, mounts: ['/a,/b']}", "site.container.mounts.0"),
        ("- a", "must be a mapping of keys"),
    ],
)
def test_site_file_is_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_site(path)
    assert message in str(error.value)


def test_names_of_variables_that_are_no_secrets() -> None:
    SiteConfig(environment={"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO", "EMPTY": ""})
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "token", "MY_PASSWORD", "GH_TOKEN_2"):
        with pytest.raises(ValueError, match="secret"):
            SiteConfig(environment={name: "x"})


def test_site_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text("partition: gpu")
    monkeypatch.setenv("TRITRAIN_SITE", str(tmp_path / "site.yaml"))
    assert load_site(None).partition == "gpu"
    monkeypatch.delenv("TRITRAIN_SITE")
    assert load_site(None) == SiteConfig()


def test_what_cannot_run_is_refused_at_once(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "submitted" / "1"
    for keys, message in (
        ({"nodes": 3}, "global_batch_sequences"),
        ({"launcher": "mpirun"}, "--with mpirun"),
        ({"time": "1 day"}, "--time"),
    ):
        with pytest.raises(ConfigError, match=message):
            render(config, SiteConfig(), Request(**(vars(REQUEST) | keys)), folder)
    RunFolder(config).prepare([4, 4])
    RunFolder(config).write_state("complete")
    with pytest.raises(ConfigError, match="is complete"):
        render(config, SiteConfig(), REQUEST, folder)


NASTY = ["$(touch CANARY)", "`touch CANARY`", "'; touch CANARY; '", '"; touch CANARY; "', "a b", "\n", "\r", "#", "\\"]
NASTY += [
    "\n#SBATCH --wrap=x",
    "%j",
    "*",
    "&",
    "|",
    "<",
    ">",
    "~",
    "é",
    "\0",
    "\u2028",
    "--",
    "=",
    "{{ 1 }}",
    "!",
    "$HOME",
]


def texts(words: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*words, "a", "0"]), min_size=1, max_size=4).map("".join)


anything = texts([*NASTY, "/"]) | st.text(max_size=4)
printable = texts([word for word in NASTY if word.isprintable()])
for_slurm = texts([word for word in NASTY if word.isprintable() and not set(word) & set("\"'\\%")])
fields = {
    "name": st.just("tiny"),
    "folder": for_slurm,
    **dict.fromkeys(("partition", "account", "qos", "constraint", "gpu_type", "option"), for_slurm),
    **dict.fromkeys(("activate", "network_interface", "module", "value", "image", "mount"), printable),
    "variable": st.just("A"),
}


@settings(max_examples=60, deadline=None)
@given(
    values=st.fixed_dictionaries({}, optional=fields),
    wild=st.none() | st.tuples(st.sampled_from(list(fields)), anything),
    runtime=st.sampled_from([None, "pyxis", "apptainer"]),
    launcher=st.sampled_from(launcher.submit.LAUNCHERS),
)
def test_no_value_is_ever_run(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, str], wild: Any, runtime: Any, launcher: str
) -> None:
    """Values are refused or harmless: with any of them the script makes the same calls, and makes no file."""
    tmp_path = tmp_path_factory.mktemp("fuzz")
    try:
        config, site = with_values(tmp_path, {**values, **dict([wild] if wild else [])}, runtime)
        request = Request(nodes=2, ranks_per_node=2, gpus_per_node=2, launcher=launcher, time=None)
        submitted = tmp_path / "submitted"
        script = render(config, site, request, submitted)
    except (ConfigError, ValueError):
        event("refused")
        assert wild or any(set(values.get("mount", "")) & set(":,")), values
        return
    event("rendered")
    submitted.mkdir()
    programs = stand_ins(tmp_path / "programs")
    head, _, body = script.partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert "\n#SBATCH" not in body
    done = run_script(script, programs)
    assert calls(programs, "module") == [["load", module] for module in site.modules]
    if site.activate:  # which is not there
        assert calls(programs, "srun") == []
    else:
        [started] = calls(programs, "srun")
        assert started[-1] == f"{submitted}/config.yaml", done.stderr
    assert not list(tmp_path.rglob("CANARY"))


def with_values(tmp_path: Path, values: dict[str, str], runtime: Any) -> tuple[Config, SiteConfig]:
    folder = f"{tmp_path}/{values.get('folder', 'run')}"
    config = dataclasses.replace(
        tiny_config(tmp_path / "shards", tmp_path), run=RunConfig(name=values.get("name", "tiny"), folder=folder)
    )
    given = {key: [values[key]] if key in values else [] for key in ("module", "value", "option", "mount")}
    image = {"image": values.get("image", "a.sif"), "mounts": tuple(given["mount"])}
    site = SiteConfig(
        **{key: value for key, value in values.items() if hasattr(SiteConfig, key)},  # type: ignore[arg-type]
        modules=tuple(given["module"]),
        environment={values.get("variable", "A"): value for value in given["value"]},
        sbatch_options=tuple(f"--comment={value}" for value in given["option"]),
        container=ContainerConfig(runtime=runtime, **image) if runtime else None,  # type: ignore[arg-type]
    )
    return config, site


def test_quotes_around_a_value_with_spaces() -> None:
    assert launcher.submit.for_shell("a $(b) 'c'") == "'a $(b) '\"'\"'c'\"'\"''"
    assert launcher.submit.for_shell("") == "''"  # variables may be empty
    assert launcher.submit.for_sbatch("/my runs/#1 $(b)") == '"/my runs/#1 $(b)"'
    assert launcher.submit.for_sbatch("a&(b|c)*2") == "a&(b|c)*2"
    for value in ('a"b', "a'b", "a\\b", "a\nb", "a\tb", ""):
        with pytest.raises(ConfigError):
            launcher.submit.for_sbatch(value)


def test_submitting_keeps_code_and_configuration_and_no_secret(
    config: Config, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "hf_SeCrEt1", "AWS_SECRET_ACCESS_KEY": "SeCrEt2", "TRITRAIN_ANY": "SeCrEt3"}
    for key, value in secrets.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    job, folder = submit(config, SiteConfig(), REQUEST)
    assert job == "17"
    assert calls(programs, "sbatch") == [["--parsable", f"{folder}/job.sbatch"]]
    assert load_config(folder / "config.yaml") == config
    kept = {path.relative_to(folder / "code").as_posix() for path in (folder / "code").rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files", *launcher.submit.PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= kept
    assert not any("__pycache__" in name for name in kept)
    written = b"".join(path.read_bytes() for path in config.run.path.rglob("*") if path.is_file())
    assert not any(value.encode() in written for value in secrets.values())


def test_a_job_that_slurm_refuses_leaves_nothing(
    config: Config, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (programs / "sbatch").write_text("#!/bin/bash\necho 'error: invalid partition' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="sbatch refuses the job: error: invalid partition"):
        submit(config, SiteConfig(), REQUEST)
    assert not list((config.run.path / "submitted").iterdir())


def test_a_snapshot_runs_by_itself(config: Config, tmp_path: Path) -> None:
    """From another folder, with the checkout's own packages in reach, the snapshot's are imported."""
    snapshot(config, tmp_path / "kept")
    code = tmp_path / "kept" / "code"
    (code / "launcher" / "pretrain.py").write_text(
        (code / "launcher" / "pretrain.py").read_text().partition("import argparse")[0]
        + "import launcher.requeue, quant; print(launcher.requeue.__file__, quant.__file__)\n"
    )
    script = str(code / "launcher" / "pretrain.py")
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert [line.startswith(str(code)) for line in done.stdout.split()] == [True, True], done.stderr


ENDING = sorted(path.name for path in (ROOT / "launcher/slurm").glob("*.sbatch") if "ask requeue" in path.read_text())


def test_templates_that_queue_themselves_again() -> None:
    assert ENDING == ["container.sbatch", "deepspeed.sbatch", "one-node.sbatch", "srun.sbatch", "torchrun.sbatch"]


def script_of(name: str, config: Config, programs: Path, run: Path) -> str:
    """A script that trains in ``run``: the rendered one, or a template of this name."""
    for python in ("python", "python3"):  # of which a template asks nothing else
        (programs / python).write_text(f'#!/bin/bash\nexec {sys.executable} {ROOT}/"$@"\n')
    if name != "rendered":
        return (ROOT / "launcher" / "slurm" / name).read_text().replace("${1:?the", "${1:-the").replace(
            "${2:?the folder of the run}", str(run)
        )  # fmt: skip
    script = render(config, SiteConfig(), REQUEST, run / "submitted/1")
    (run / "submitted" / "1").mkdir(parents=True, exist_ok=True)
    snapshot(config, run / "submitted/1")
    return script


@pytest.mark.parametrize("name", ["rendered", *ENDING])
def test_a_controller_that_is_away_for_a_while(config: Config, programs: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    script = script_of(name, config, programs, run)
    (run / "job").mkdir(parents=True)
    scontrol = (programs / "scontrol").read_text().partition("\n")[2]
    away = f"[ $1 = show ] && [ $2 = hostnames ] || [ $(wc -l < {programs}/calls) -gt 6 ]"
    (programs / "scontrol").write_text(f"#!/bin/bash\n{away} || {{ echo >> {programs}/calls; exit 1; }}\n{scontrol}")
    (programs / "calls").write_text("")
    done = run_script(script, programs)
    assert "again: the run is not begun" in done.stdout, done.stderr
    assert ["requeue", "17"] in calls(programs, "scontrol")


@pytest.mark.parametrize("name", ["rendered", *ENDING])
def test_a_start_that_is_refused_is_not_repeated(config: Config, programs: Path, tmp_path: Path, name: str) -> None:
    script = script_of(name, config, programs, tmp_path / "run")
    (programs / "srun").write_text('#!/bin/bash\necho "engine.zero_stage: no" > "$TRITRAIN_REFUSED"\n')
    done = run_script(script, programs)
    assert "failed: the configuration was refused: engine.zero_stage: no" in done.stdout, done.stderr
    assert done.returncode == 1
    assert ["requeue", "17"] not in calls(programs, "scontrol")


def run_template(name: str, programs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "SECONDS_BETWEEN_LOOKS": "0.01"}
    command = ["bash", str(ROOT / "launcher" / "slurm" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_template_that_evaluates_new_checkpoints(programs: Path, tmp_path: Path) -> None:
    """It looks again after each measurement, and ends once the run is complete."""
    run = tmp_path / "my run"
    checkpoint(run, 4)
    requeue.write_state(run, {"status": "running"})
    (programs / "tritrain").write_text(
        f"""#!/bin/bash
        printf '%s\\0' tritrain "$@" >> {programs}/calls; echo >> {programs}/calls
        [ ! -d "$2/checkpoints/step-00000008" ] || echo '{{"status": "complete"}}' > "$2/state.json"
        mkdir -p "$2/checkpoints/step-00000008"; touch "$2/checkpoints/step-00000008/manifest.json"
        """
    )
    (programs / "tritrain").chmod(0o755)
    done = run_template("eval.sbatch", programs, str(run), "paper11", "--limit", "5")
    assert done.returncode == 0, done.stderr
    expected = ["eval", str(run), "--all", "--tasks", "paper11", "--out", f"{run}/scores.json", "--limit", "5"]
    assert calls(programs, "tritrain") == [expected, expected]


def test_template_that_prepares_one_line_of_a_list(programs: Path, tmp_path: Path) -> None:
    shutil.copy(programs / "srun", programs / "tritrain")
    (tmp_path / "inputs").write_text("a.txt\nmy texts/$(b).txt\n")
    done = run_template("prepare-array.sbatch", programs, str(tmp_path / "inputs"), "out", "tokenizer.json", "2048")
    assert done.returncode == 0, done.stderr
    [words] = calls(programs, "srun")  # of which it is a copy
    assert words[:4] == ["prepare", "my texts/$(b).txt", "--out", "out/part-00002"]


# What a job finds around itself


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node[3-7,9]", "node3"),
        ("gpu-b[003-010],login", "gpu-b003"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[05,07-09]", "rack1n05"),
        ("c[12,14-16]-ib,d", "c12-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An environment of which nothing stays."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TRITRAIN_")) or name.endswith(("RANK", "WORLD_SIZE")):
            del os.environ[name]
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(before)


def test_ranks_of_a_slurm_step(environment: dict[str, str]) -> None:
    environment |= {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "9", "SLURM_NTASKS_PER_NODE": "4"}
    environment |= {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6"}
    environment |= {"SLURM_STEP_NODELIST": "node[07-10]", "SLURM_LOCALID": "0"}
    environment |= {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}  # as real as it is useless
    _complete_environment()
    expected = {"RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "MASTER_ADDR": "node07"}
    assert expected.items() <= environment.items()
    assert "LOCAL_WORLD_SIZE" not in environment  # `launcher.placement` counts
    assert environment["MASTER_PORT"] == "20273"


def test_a_batch_script_is_one_process(environment: dict[str, str]) -> None:
    environment |= {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    _complete_environment()
    assert environment["WORLD_SIZE"] == "1"


def test_end_of_a_job(environment: dict[str, str], programs: Path) -> None:
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    assert end_of_job(pytest.fail) == float("inf")
    environment |= {"SLURM_JOB_ID": "17", "TZ": "UTC"}
    import time

    time.tzset()
    assert end_of_job(pytest.fail) == 1767312000.0  # what `scontrol` shows
    environment["SLURM_JOB_END_TIME"] = "1900000000"
    assert end_of_job(pytest.fail) == 1900000000.0
    environment["TRITRAIN_END_TIME"] = f"{time.time() + 100}"
    assert time_to_stop(30, pytest.fail) == pytest.approx(time.time() + 70, abs=5)
    with pytest.raises(ConfigError, match="stop_before_end_seconds: is 180, but the job ends in"):
        time_to_stop(180, pytest.fail)
    environment["TRITRAIN_END_TIME"] = "noon"
    with pytest.raises(ConfigError, match="TRITRAIN_END_TIME: is 'noon'"):
        end_of_job(pytest.fail)


def test_a_slurm_that_does_not_say_when_the_job_ends(
    environment: dict[str, str], programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.stopping.SECONDS_BETWEEN_ASKS", 0.0)
    monkeypatch.setattr("launcher.stopping.SECONDS_TO_ANSWER", 0.2)
    environment |= {"PATH": f"{programs}:{environment['PATH']}", "SLURM_JOB_ID": "17", "SLURM_TIME_FORMAT": "relative"}
    said: list[str] = []
    (programs / "scontrol").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert end_of_job(said.append) == float("inf")
    (programs / "scontrol").write_text("#!/bin/bash\nexec /bin/sleep 60\n")
    assert end_of_job(said.append) == float("inf")
    assert [re.search(r"\((.*?)\)", line)[1] for line in said] == [  # type: ignore[index]
        "Unable to contact slurm controller",
        "no answer in 0.2 s",
    ]
    once = f"[ -e {programs}/asked ] || {{ touch {programs}/asked; exit 1; }}"
    (programs / "scontrol").write_text(f"#!/bin/bash\n{once}\n[ $SLURM_TIME_FORMAT = standard ] && echo '{SHOWN}'\n")
    monkeypatch.setattr("launcher.stopping.SECONDS_TO_ANSWER", 20.0)
    assert end_of_job(pytest.fail) < float("inf")


def test_files_and_the_clock_ask_for_a_stop_or_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.stopping.SECONDS_BETWEEN_LOOKS", 0.0)
    stop = StopRequest()
    (tmp_path / "stop").touch()
    assert stop.agree(ALONE) == (False, False)  # watches nothing yet
    (tmp_path / "stop").unlink()
    stop.watch(tmp_path, float("inf"))
    (tmp_path / "save").touch()
    assert stop.agree(ALONE) == (False, True)
    assert not (tmp_path / "save").exists()
    assert stop.agree(ALONE) == (False, False)
    stop.watch(tmp_path, 0.0)
    assert stop.agree(ALONE) == (True, False)
    assert stop.reason == "time limit"
    (tmp_path / "stop").touch()
    assert stop.agree(ALONE) == (True, False)
    assert stop.reason == "stop file"
    assert (tmp_path / "stop").exists()  # until all is saved
    stop.done()
    assert not (tmp_path / "stop").exists()


def test_a_person_who_asks_for_a_stop_while_another_stop_is_being_saved(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.watch(tmp_path, 0.0)
    assert stop.agree(ALONE) == (True, False)
    stop.look_again()
    assert stop.reason == "time limit"
    (tmp_path / "stop").touch()
    stop.done()
    assert (tmp_path / "stop").exists()  # nothing has obeyed it
    stop.look_again()
    assert stop.reason == "stop file"
    stop.done()
    assert not (tmp_path / "stop").exists()


def ask_on_one_rank(rank: int, world_size: int, folder: str) -> tuple[tuple[bool, bool], str]:
    from launcher.runtime import Ranks

    stop = StopRequest()
    if rank == 0:
        (Path(folder) / "save").touch()
        stop.watch(Path(folder), float("inf"))
    if rank == 1:
        stop._handle(15, None)
    return stop.agree(Ranks(rank, world_size, rank, ALONE.device)), stop.reason


def test_all_ranks_agree_on_what_one_was_asked(tmp_path: Path) -> None:
    assert run_ranks(2, ask_on_one_rank, str(tmp_path)) == [((True, True), "signal")] * 2


# Whether a job is queued again


def start(run: Path, step: int, job: str) -> None:
    run.mkdir(exist_ok=True)
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0.0, "step": step, "world_size": 2, "host": "a", "job": job}) + "\n")


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def ask(run: Path, job: str = "17", refused: Path | None = None) -> tuple[int, str]:
    return requeue.verdict(run, str(run / "checkpoints"), refused, job)


def test_requeue_ends_with_the_run_or_by_a_person(tmp_path: Path) -> None:
    stopped = {"status": "interrupted", "checkpoint": "x/step-00000003"}
    for number, (state, code) in enumerate(
        (
            ({"status": "complete"}, requeue.DONE),
            (stopped | {"reason": "stop file", "job": "17"}, requeue.DONE),
            (stopped | {"reason": "stop file", "job": "17_2"}, requeue.DONE),
            (stopped | {"reason": "stop file", "job": "16"}, requeue.AGAIN),  # this job has not come to claim the run
            (stopped | {"reason": "stop file", "job": None}, requeue.AGAIN),
            (stopped | {"reason": "signal", "job": "17"}, requeue.AGAIN),
            (stopped | {"reason": "time limit", "job": "17"}, requeue.AGAIN),
            ({"status": "running"}, requeue.AGAIN),
        )
    ):
        run = tmp_path / str(number)
        run.mkdir()
        requeue.write_state(run, state)
        assert ask(run)[0] == code, state
    (tmp_path / "refused").write_text("engine.zero_stage: no")
    assert ask(run, refused=tmp_path / "refused") == (
        requeue.FAILED,
        "the configuration was refused: engine.zero_stage: no",
    )


def test_requeue_ends_when_starts_get_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "17")
    checkpoint(run, 4)
    assert ask(run)[0] == requeue.AGAIN  # it came from 0 to 4
    for _ in range(2):
        start(run, 4, "17")
        requeue.write_state(run, {"status": "failed", "message": "rank 1: out of memory"})
        assert ask(run)[0] == requeue.AGAIN
    checkpoint(run, 5)
    assert ask(run)[0] == requeue.AGAIN  # progress
    assert ask(run)[0] == requeue.AGAIN  # starts that never come to training count as well
    assert ask(run)[0] == requeue.AGAIN
    code, reason = ask(run)
    assert code == requeue.FAILED
    assert reason.startswith("3 starts in a row ended with no checkpoint after step 5; not queued again")
    assert "out of memory" in reason
    assert requeue.read_state(run) == {"status": "failed", "message": reason}
    assert ask(run, job="18")[0] == requeue.AGAIN  # submitted anew, it is tried anew


def test_a_line_that_a_full_disk_cut_off_keeps_nothing_from_going_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "17")
    for name in ("starts.jsonl", "requeues.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"time": 0.0, "step": 3, "jo')
    RunFolder(tiny_config(tmp_path, run)).note_start(4, 2)
    checkpoint(run, 4)
    assert ask(run)[0] == requeue.AGAIN
    assert [line["step"] for line in requeue.read_lines(run / "starts.jsonl")] == [0, 4]
    assert [line["idle_starts"] for line in requeue.read_lines(run / "requeues.jsonl")] == [0]


def test_checkpoints_in_another_folder_count_as_progress(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(6):
        start(run, 100 * number, "17")
        assert ask(run)[0] == requeue.AGAIN
    assert [ask(run)[0] for _ in range(3)] == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]


def test_going_back_to_a_switch_is_no_start_that_gets_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (0, 150, 100, 120, 130, 140):
        start(run, step, "17")
        assert requeue.verdict(run, "s3://bucket/run", None, "17")[0] == requeue.AGAIN
    assert [line["idle_starts"] for line in requeue.read_lines(run / "requeues.jsonl")] == [1, 0, 0, 0, 0, 0]


def hold(run: Path) -> subprocess.Popen[str]:
    """Another job in a run's folder."""
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(1); input()"
    command = [sys.executable, "-c", code, str(run / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_progress_of_another_job_in_the_folder_is_none_of_ours(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "16")
    requeue.write_state(run, {"status": "running"})
    (run / "lock").write_text("process 7 on node1, since noon")
    with hold(run) as other:
        codes = []
        for step in (1, 2, 3):
            checkpoint(run, step)
            codes.append(ask(run))
        other.communicate("\n")
    assert [code for code, _ in codes] == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]
    message = f"3 starts in a row got nowhere, and another job trains in {run} (process 7 on node1, since noon)"
    assert codes[-1][1] == message
    assert requeue.read_state(run) == {"status": "running"}
    assert ask(run)[0] == requeue.AGAIN  # nobody is there any more, and there is progress


def test_three_starts_that_never_begin(tmp_path: Path) -> None:
    codes = [ask(tmp_path / "run")[0] for _ in range(3)]
    assert codes == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]


def test_requeue_needs_only_python(tmp_path: Path) -> None:
    requeue.write_state(tmp_path, {"status": "complete"})
    command = [sys.executable, "-I", "-S", str(ROOT / "launcher/requeue.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (requeue.DONE, "done: the run is complete\n"), done.stderr


# Who may read what a run writes


def train_under(rank: int, world_size: int, mask: int, shards: str, out: str) -> int:
    import launcher.ending

    os.umask(mask)
    launcher.ending.show_ending = lambda folder, console: None  # type: ignore[assignment]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    config = tiny_config(Path(shards), Path(out), logging={"tensorboard": True})
    (Path(out)).mkdir()
    snapshot(config, Path(out) / "submitted" / "1")
    return run(config)


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_files_have_the_permissions_of_the_umask(shards: Path, tmp_path: Path, mask: int) -> None:
    out = tmp_path / "run"
    assert run_ranks(1, train_under, mask, str(shards), str(out)) == [COMPLETE]
    wider = [path for path in [out, *out.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & mask]
    assert wider == []
    assert {"starts.jsonl", "state.json", "checkpoints", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    [line] = (out / "starts.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"time", "step", "world_size", "host", "job"}


def test_configuration_of_a_snapshot_is_yaml(config: Config, tmp_path: Path) -> None:
    snapshot(config, tmp_path / "kept")
    assert yaml.safe_load((tmp_path / "kept/config.yaml").read_text())["run"]["name"] == "tiny"
