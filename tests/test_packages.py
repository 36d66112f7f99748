"""The folders of this checkout are the packages that are imported, and the light ones stay light."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = ("launcher", "model", "data", "quant", "eval")
LIGHT = ("model.transformer", "model.init", "model.loss", "model.size", "quant.linear", "quant.ramp", "quant.rounding")
LIGHT_LAUNCHER = (
    "launcher.engine.contract",
    "launcher.engine.fsdp",
    "launcher.engine.adamw",
    "launcher.plan.schedule",
    "launcher.config.transition",
)
HEAVY = (
    "pydantic", "yaml", "transformers", "deepspeed", "streaming", "datasets", "rich", "typer", "matplotlib", "psutil",
    "tensorboard", "tokenizers", "sentencepiece", "safetensors", "zstandard", "huggingface_hub", "torchvision",
)  # fmt: skip


def python(code, *arguments, cwd=ROOT, **variables):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_imported_from_this_checkout(package):
    assert Path(importlib.import_module(package).__file__) == ROOT / package / "__init__.py"


def test_stray_folders_in_the_working_directory_do_not_win(tmp_path):
    """A `./data` full of somebody's text is no package of ours, whether or not Python could import it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.txt").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "script.py").write_text(
        f"import importlib\nfor name in {PACKAGES}: print(importlib.import_module(name).__file__)\n"
    )
    expected = [str(ROOT / package / "__init__.py") for package in PACKAGES]
    as_script = "import runpy, sys; runpy.run_path(sys.argv[1])"
    assert python(as_script, str(tmp_path / "script.py"), cwd=tmp_path).split() == expected
    script = [sys.executable, str(tmp_path / "script.py")]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == expected


BLOCKED_IMPORTS = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_imports_with_torch_alone():
    python(BLOCKED_IMPORTS, *LIGHT, *LIGHT_LAUNCHER)


def test_the_block_works():
    """An import that is blocked fails, so the test above can."""
    with pytest.raises(AssertionError, match="blocked: "):
        python(BLOCKED_IMPORTS, "launcher.config.file")


@pytest.mark.parametrize("folder", ["model", "quant"])
def test_light_folders_name_no_heavy_library_at_import(folder):
    """At the top of a module; inside of functions anything may be imported."""
    for path in sources(folder):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & set(HEAVY)
            assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_a_wheel_holds_the_packages_and_the_configurations_that_they_read():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    held = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*held} == {*PACKAGES, "configs", "tritrain.py"}


def test_no_file_of_the_launcher_hides_another_module():
    """`deepspeed launcher/pretrain.py` puts launcher/ first on sys.path."""
    hidden = sys.stdlib_module_names | {"deepspeed", "torch", "streaming", "transformers", "datasets", *PACKAGES}
    taken = {path.stem for path in (ROOT / "launcher").iterdir()} & hidden
    assert not taken


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_absolute(package):
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_tests_mirror_the_packages():
    """A test lies in the folder of what it tests; helpers of several files lie in tests/support."""
    tests = ROOT / "tests"
    assert not list(tests.rglob("__init__.py"))
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} - {Path()}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders), folders
    others = {path.parent.name for path in tests.rglob("*.py") if not path.name.startswith("test_")} - {"tests"}
    assert others == {"support"}


HIDING = {
    "model.py": "model", "data.py": "data", "eval.py": "eval", "quant.py": "quant", "launcher.py": "launcher",
    "model/__init__.py": "model", "data/__init__.py": "data", "launcher/__init__.py": "launcher",
}  # fmt: skip


@pytest.mark.parametrize("file", HIDING)
@pytest.mark.parametrize("start", ["import tritrain", "from launcher.config.file import load_config", "-m"])
def test_a_file_that_hides_a_package_is_named(file, start, tmp_path):
    """Beside a script, and in the working directory."""
    if file.startswith("launcher") and start != "import tritrain":
        pytest.skip("none of our code runs, and Python itself names the module that it lacks")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise SystemExit('the wrong file was run')\n")
    (tmp_path / "script.py").write_text(f"{start}\n")
    command = ["script.py"] if start != "-m" else ["-m", "launcher.doctor", "--help"]
    result = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: {tmp_path / file} hides Tritrain's package {HIDING[file]!r}, because Python finds it first; "
        "rename it, or start Python in another folder"
    )


def test_a_module_that_a_notebook_imported_before_is_named(tmp_path):
    (tmp_path / "model.py").touch()
    code = (
        "import model, sys\nsys.path.pop(0)\ntry:\n    import tritrain\nexcept ImportError as error:\n    print(error)"
    )
    assert python(code, cwd=tmp_path).startswith(f"{tmp_path / 'model.py'} hides Tritrain's package 'model'")


def test_the_command_does_not_look_into_the_working_directory(tmp_path):
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file was run')\n")
    command = [str(Path(sys.executable).with_name("tritrain")), "--version"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.startswith(
        "tritrain"
    )
