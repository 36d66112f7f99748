"""Jobs for Slurm: what the script says, what is refused, and that no value in it is ever run."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from places import ROOT
from slurm_stand_ins import checkpoint, stand_ins
from tiny import tiny_config
from typer.testing import CliRunner

import launcher.slurm.submit
from launcher.config.file import load_config
from launcher.config.sections import Config, RunConfig
from launcher.errors import ConfigError
from launcher.process.torchrun import JobLauncher
from launcher.run import requeue
from launcher.run.folder import RunFolder
from launcher.slurm.cluster import ContainerConfig, SiteConfig, load_site
from launcher.slurm.submit import Request, next_submission, render, snapshot, submit

GOLDEN = ROOT / "tests" / "golden" / "job.sbatch"
UPDATE = "TRITRAIN_UPDATE_GOLDEN" in os.environ
REQUEST = Request(nodes=2, ranks_per_node=2, gpus_per_node=2, launcher="torchrun", time="12:00:00")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "shards", tmp_path / "run")


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


@pytest.mark.parametrize("launcher", get_args(JobLauncher))
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


def test_a_run_that_was_moved_is_not_submitted_as_a_new_one(config: Config, tmp_path: Path) -> None:
    from launcher.cli import app

    RunFolder(config).prepare([4, 4])
    RunFolder(config).write_state("interrupted")
    config.run.path.rename(tmp_path / "moved")
    result = CliRunner().invoke(app, ["submit", str(tmp_path / "moved" / "config.yaml"), "--dry-run"])
    assert f"add run.folder={tmp_path}/moved" in str(result.exception)


def test_a_name_that_nobody_gives_and_a_value_that_nobody_quotes_are_errors(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "launcher" / "slurm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(launcher.slurm.submit, "ROOT", tmp_path)
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


def test_what_cannot_run_is_refused_at_once(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "submitted" / "1"
    for keys, message in (
        ({"nodes": 3}, "global_batch_sequences"),
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


@settings(max_examples=60)
@given(
    values=st.fixed_dictionaries({}, optional=fields),
    wild=st.none() | st.tuples(st.sampled_from(list(fields)), anything),
    runtime=st.sampled_from([None, "pyxis", "apptainer"]),
    launcher=st.sampled_from(get_args(JobLauncher)),
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
    assert launcher.slurm.submit.for_shell("a $(b) 'c'") == "'a $(b) '\"'\"'c'\"'\"''"
    assert launcher.slurm.submit.for_shell("") == "''"  # variables may be empty
    assert launcher.slurm.submit.for_sbatch("/my runs/#1 $(b)") == '"/my runs/#1 $(b)"'
    assert launcher.slurm.submit.for_sbatch("a&(b|c)*2") == "a&(b|c)*2"
    for value in ('a"b', "a'b", "a\\b", "a\nb", "a\tb", ""):
        with pytest.raises(ConfigError):
            launcher.slurm.submit.for_sbatch(value)


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
    tracked = subprocess.run(
        ["git", "ls-files", *launcher.slurm.submit.PACKAGES], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= kept
    assert not any("__pycache__" in name for name in kept)
    written = b"".join(path.read_bytes() for path in config.run.path.rglob("*") if path.is_file())
    assert not any(value.encode() in written for value in secrets.values())


def test_two_submissions_at_once_have_folders_of_their_own(
    config: Config, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one makes its folder after this one has found the name free."""
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    taken: list[Path] = []

    def rendered(*arguments: Any) -> str:
        folder = arguments[-1]
        if not taken:
            taken.append(folder)
            folder.mkdir(parents=True)
        return render(*arguments)

    monkeypatch.setattr(launcher.slurm.submit, "render", rendered)
    _, folder = submit(config, SiteConfig(), REQUEST)
    assert folder.parent == taken[0].parent
    assert folder != taken[0]
    assert list(taken[0].iterdir()) == []
    assert str(folder) in (folder / "job.sbatch").read_text()


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
        + "import launcher.run.requeue, quant; print(launcher.run.requeue.__file__, quant.__file__)\n"
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


@pytest.mark.parametrize(("given", "threads"), [("", "1"), ("export OMP_NUM_THREADS=7", "7")])
def test_ranks_of_one_node_have_as_many_threads_as_under_torchrun(
    config: Config, programs: Path, tmp_path: Path, given: str, threads: str
) -> None:
    script = script_of("one-node.sbatch", config, programs, tmp_path / "run")
    (programs / "srun").write_text('#!/bin/bash\necho "threads: $OMP_NUM_THREADS"\n')
    assert f"threads: {threads}\n" in run_script(f"{given}\n{script}", programs).stdout


def run_template(name: str, programs: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "SECONDS_BETWEEN_LOOKS": "0.01"}
    environment |= variables
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
        [ ! -d "$2/step-00000008" ] || echo '{{"status": "complete"}}' > "{run}/state.json"
        mkdir -p "$2/step-00000008"; touch "$2/step-00000008/manifest.json"
        """
    )
    (programs / "tritrain").chmod(0o755)
    done = run_template("eval.sbatch", programs, str(run), "paper11", "--limit", "5")
    assert done.returncode == 0, done.stderr
    options = ["--all", "--tasks", "paper11", "--out", f"{run}/scores.json"]
    expected = ["eval", f"{run}/checkpoints", *options, "--limit", "5"]
    assert calls(programs, "tritrain") == [expected, expected]


def test_template_that_evaluates_checkpoints_elsewhere(programs: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "other disk"
    run.mkdir()
    requeue.write_state(run, {"status": "complete"})
    shutil.copy(programs / "srun", programs / "tritrain")
    done = run_template("eval.sbatch", programs, str(run), "paper11")
    assert (done.returncode, done.stderr) == (
        1,
        f"{run} is complete, and there is no checkpoint in {run}/checkpoints\n",
    )
    (elsewhere / "step-00000008").mkdir(parents=True)
    (elsewhere / "step-00000008" / "manifest.json").touch()
    assert run_template("eval.sbatch", programs, str(run), "paper11", CHECKPOINTS=str(elsewhere)).returncode == 0
    assert calls(programs, "srun")[0][:2] == ["eval", str(elsewhere)]


def test_template_of_tasks_that_share_a_preparation(programs: Path, tmp_path: Path) -> None:
    shutil.copy(programs / "srun", programs / "tritrain")
    options = ("my texts/$(b).txt", "--out", "out", "--tokenizer", "tokenizer.json")
    done = run_template("prepare-array.sbatch", programs, *options)
    assert done.returncode == 0, done.stderr
    [words] = calls(programs, "srun")  # of which it is a copy
    assert words[:8] == ["prepare", *options, "--on", "shared-folder"]
    assert words[8] == "--workers"


def test_template_of_tasks_that_share_a_study(programs: Path) -> None:
    shutil.copy(programs / "srun", programs / "tritrain")
    done = run_template("study-array.sbatch", programs, "my study.yaml", "--out", "out", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert calls(programs, "srun") == [["study", "my study.yaml", "--out", "out", "--ranks", "2"]]


def test_configuration_of_a_snapshot_is_yaml(config: Config, tmp_path: Path) -> None:
    snapshot(config, tmp_path / "kept")
    assert yaml.safe_load((tmp_path / "kept/config.yaml").read_text())["run"]["name"] == "tiny"


def test_what_a_site_sets_for_its_own_lines_does_not_end_the_script(
    config: Config, programs: Path, tmp_path: Path
) -> None:
    for setup in ((), ("set -euo pipefail", "trap 'exit 3' ERR EXIT")):
        script_of("rendered", config, programs, tmp_path / "run")
        script = render(config, SiteConfig(setup=setup), REQUEST, tmp_path / "run" / "submitted" / "1")
        (programs / "srun").write_text("#!/bin/bash\nexit 1\n")
        (programs / "calls").write_text("")
        done = run_script(script, programs)
        assert "again: the run is not begun" in done.stdout, done.stderr
        assert ["requeue", "17"] in calls(programs, "scontrol"), setup
    refusing = render(config, SiteConfig(setup=("set -e", "false")), REQUEST, tmp_path / "run" / "submitted" / "1")
    (programs / "calls").write_text("")
    run_script(refusing, programs)
    assert not calls(programs, "srun")  # nothing is trained where the site's own lines fail
