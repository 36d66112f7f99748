"""What answers at once must not import what takes seconds; which modules a command imports shows on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT

HEAVY = ("torch", "numpy", "deepspeed", "streaming", "datasets", "transformers", "tokenizers", "sentencepiece",
         "matplotlib", "tensorboard", "pyarrow", "psutil", "upath", "zstandard")  # fmt: skip

COMMAND = """
import json, os, sys

def end(*arguments):  # in place of the launcher of ranks
    raise SystemExit(0)

os.execve = end
from launcher.cli import main
try:
    main()
    code = 0
except SystemExit as ended:
    code = ended.code
with open(sys.argv[0], "w") as file:
    json.dump([code, sorted(sys.modules)], file)
"""


def outcome(tmp_path: Path, *arguments: str) -> tuple[int, set[str]]:
    """A command's exit code, and the names of the libraries that its process has imported."""
    told = tmp_path / "told.json"
    code = f"import sys; sys.argv = [{str(told)!r}, *sys.argv[1:]]\n{COMMAND}"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.exists(), process.stderr
    code, modules = json.loads(told.read_text())
    return code, {name.partition(".")[0] for name in modules}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"status": "complete"}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"phase_steps": [2], "phases": [{"precision": "16-bit"}]}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["train", "-h"], 0),
        (["--version"], 0),
        (["trian", "configs/quickstart.yaml"], 2),
        (["train", "configs/quickstart.yaml", "--rank", "2"], 2),
        (["status", "RUN"], 0),
        (["schema"], 0),
        (["explain", "optimizer.learning_rate"], 0),
        (["init", "--help"], 0),
        (["plan", "configs/quickstart.yaml", "data.sources.0.path=RUN/data"], 0),
        (["plan", "absent.yaml"], 2),
        (["study", "configs/studies/switch-point.yaml", "--out", "RUN/new", "--dry-run", "--gpu", "H100"], 0),
        (["study", "absent.yaml", "--out", "RUN/new"], 2),
        (["plan", "configs/quickstart.yaml", "optimizer.lerning_rate=1"], 2),
        (["train", "configs/quickstart.yaml", "run.folder=RUN/new"], 0),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else None,
)
def test_a_command_imports_nothing_heavy(arguments: list[str], code: int, tmp_path: Path, run: Path) -> None:
    found, modules = outcome(tmp_path, *(argument.replace("RUN", str(run)) for argument in arguments))
    assert found == code
    assert not modules & {*HEAVY}


@pytest.mark.slow
def test_what_is_imported_shows(tmp_path: Path) -> None:
    """A command that does load torch is seen to, so the test above can fail."""
    code, modules = outcome(tmp_path, "verify", "absent")
    assert code == 2
    assert "torch" in modules
