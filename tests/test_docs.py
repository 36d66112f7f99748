"""What the documentation says can be done: commands parse, keys exist, links lead somewhere."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer.testing
import yaml
from places import ROOT

from launcher.config.file import apply_override, load_config, parse_config, parse_yaml
from launcher.config.schema import json_schema
from launcher.config.sections import Config
from launcher.plan.plan import make_plan
from launcher.run.changes import MAY_CHANGE
from launcher.study.arms import make_arms
from launcher.study.config import load_study

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICKSTART = "configs/quickstart.yaml"
COPIES = {"mine.yaml": "configs/tiny-150m.yaml"}  # a configuration that the pages make before
RUN_COMMAND = "pip install -e . && tritrain train configs/quickstart.yaml --ranks 2"
TEST_COMMAND = "pip install -e '.[test]' && pytest"


def fenced_blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """Text of every inline code span, on one line."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command line of the page, in blocks and in spans."""
    blocks = [text for language, text in fenced_blocks(page) if language in ("", "bash", "sh")]
    lines = [line for text in blocks for line in text.replace("\\\n", " ").splitlines()]
    for line in (*lines, *code_spans(page)):
        # What follows a prompt is shown with its output, an error message for one.
        if not line.startswith("$") and re.search(r"\btritrain \w|launcher/pretrain\.py --", line):
            for command in re.split(r" && | > .*", line):
                yield shlex.split(command, comments=True)


def commands_with(word: str) -> list[Any]:
    found = [(page, words) for page in PAGES for words in commands(page) if any(w.endswith(word) for w in words)]
    return [pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:100]) for page, words in found]


def check_overrides(config: str, overrides: list[str], ranks: int) -> None:
    """Load the named configuration, or, where its name only stands for one, the quickstart's, and plan it."""
    path = ROOT / COPIES.get(config, config)
    if config.isupper():
        path = ROOT / QUICKSTART
    make_plan(load_config(path, overrides), ranks)


@pytest.mark.parametrize("command", [RUN_COMMAND, TEST_COMMAND])
def test_readme_has_the_command_on_a_line_of_its_own(command: str) -> None:
    assert any(command in text.splitlines() for _, text in fenced_blocks(ROOT / "README.md"))


@pytest.mark.parametrize("words", commands_with("tritrain"))
def test_tritrain_command_parses(words: list[str]) -> None:
    from launcher.cli import app

    group: Any = typer.testing._get_command(app)  # made once in a process
    arguments = words[words.index("tritrain") + 1 :]
    if arguments == ["--help"]:
        return
    context = group.make_context("tritrain", list(arguments), resilient_parsing=True)
    assert arguments[0] in group.commands, f"there is no `tritrain {arguments[0]}`"
    if len(arguments) == 1 and arguments[0] != "schema":
        return  # the name of a command in a sentence
    values = group.commands[arguments[0]].make_context(arguments[0], arguments[1:], parent=context).params
    config = str(values.get("config") or "")
    if config.startswith("configs/"):  # any other is the reader's own
        check_overrides(config, list(values["overrides"] or ()), values.get("ranks") or 1)


@pytest.mark.parametrize("words", commands_with("launcher/pretrain.py"))
def test_pretrain_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launcher import pretrain

    script = words.index("launcher/pretrain.py")
    options, arguments = words[:script], words[script + 1 :]
    ranks = 1
    if options[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        ranks = int(get_args_parser().parse_args([*options[1:], "SCRIPT"]).nproc_per_node)
    elif options[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parse_args([*options[1:], "SCRIPT"])
    else:
        assert options[-1] == "python"

    started: list[Config] = []

    def run(config: Config, **options: Any) -> int:
        started.append(config)
        return 0

    monkeypatch.setattr(pretrain, "run", run)
    monkeypatch.chdir(tmp_path)  # where no run is that the configuration would have to belong to
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    arguments = [QUICKSTART if word.isupper() else word for word in arguments]
    assert pretrain.main(arguments) == 0
    make_plan(started[0], ranks)


def test_every_kind_of_command_was_found() -> None:
    """The tests above would pass on documentation in which they find nothing."""
    starts = {words[0] for parameter in commands_with("launcher/pretrain.py") for words in parameter.values}
    assert {"deepspeed", "torchrun", "python"} <= starts
    names = {words[1] for parameter in commands_with("tritrain") for words in parameter.values if len(words) > 2}
    assert {"train", "plan", "prepare", "report"} <= names


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(text, id=f"{page.name}: {text.splitlines()[0]}")
        for page in PAGES
        for language, text in fenced_blocks(page)
        if language in ("yaml", "yml")
    ]


@pytest.mark.parametrize("text", yaml_blocks())
def test_configuration_snippet_is_valid_in_the_quickstart(text: str, tmp_path: Path) -> None:
    if text.startswith("base:"):
        (tmp_path / "study.yaml").write_text(text)
        assert make_arms(*load_study(tmp_path / "study.yaml", ROOT / "configs"), tmp_path, 1)
        return
    tree = parse_yaml((ROOT / QUICKSTART).read_text(), QUICKSTART)
    del tree["data"]["prepare"]  # belongs to the quickstart's own source
    tree["model"]["max_sequence_length"] = 1 << 20
    for section, keys in (parse_yaml(text, "snippet") or {}).items():
        tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
    parse_config(tree)


def python_blocks(page: str) -> list[str]:
    return [text for language, text in fenced_blocks(ROOT / page) if language == "python"]


def test_example_without_the_launcher_runs_on_torch_alone() -> None:
    (example,) = (text for text in python_blocks("docs/installing.md") if "quantize_" in text)
    heavy = ("launcher", "data", "eval", "deepspeed", "matplotlib", "pydantic", "streaming", "transformers", "yaml")
    # An untrained model knows nothing: its loss is close to that of a guess among all 256 tokens.
    check = (
        f"import math, sys\nassert abs(loss - math.log(256)) < 0.3, loss\nassert not sys.modules.keys() & {{*{heavy}}}"
    )
    subprocess.run([sys.executable, "-c", f"{example}\n{check}"], check=True, timeout=120)


@pytest.mark.slow
def test_cells_of_the_notebook_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one process; with less data than the quickstart's, already prepared, and a smaller model."""
    from data import quickstart_corpus
    from data.shards import prepare

    tree = parse_yaml((ROOT / QUICKSTART).read_text(), QUICKSTART)
    tree["model"] |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    tree["data"] |= {"sequence_length": 64, "validation_rows": 8}
    tree["data"]["prepare"] |= {"tokenizer": "bpe:512", "validation_fraction": 0.2}
    tree["training"] |= {"global_batch_sequences": 2, "micro_batch_sequences": 1}
    (tmp_path / "configs").mkdir()
    (tmp_path / QUICKSTART).write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / QUICKSTART).data
    assert config.prepare is not None
    files = list(islice(quickstart_corpus.read_standard_library(), 20))
    monkeypatch.setattr(quickstart_corpus, "read_standard_library", lambda: iter(files))
    prepare(config.prepare, config.sequence_length, tmp_path / config.sources[0].path)
    cells = python_blocks("docs/notebook.md")
    check = """
assert history.curve("train/loss")[0].tolist() == [10, 20, 30, 40]
assert run.status.state == "complete"
"""
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", "\n".join([*cells, check])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "did you mean learning_rate?" in shown.stdout
    assert "complete 64 " in shown.stdout
    assert "PackedLinear" in shown.stdout


def schema_has(path: str) -> bool:
    """Whether the configuration has this dotted key; one that ends in a dot stands for a section."""
    definitions, nodes = json_schema()["$defs"], [json_schema()]
    for key in path.rstrip(".").split("."):
        nodes = [definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node for node in expand(nodes)]
        nodes = [
            below
            for node in nodes
            for below in (
                [node["items"]] if key.isdigit() and "items" in node else [node.get("properties", {}).get(key)]
            )
            if below is not None
        ]
    return bool(nodes)


def expand(nodes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The alternatives of each node."""
    for node in nodes:
        yield from node.get("anyOf", [node])


def test_schema_has_keys_and_lacks_others() -> None:
    assert schema_has("engine.")
    assert schema_has("phases.1.transition.ramp.steps")
    assert not schema_has("engine.stage")
    assert not schema_has("phases.1.ramp")


def mentioned_keys(page: Path) -> list[str]:
    """Inline code that looks like a key of the configuration, with or without `=value`."""
    sections = "|".join(json_schema()["properties"])
    spans = [span.partition("=")[0] for span in code_spans(page)]
    keys = [span for span in spans if re.fullmatch(rf"({sections})\.[a-z0-9_.]*", span)]
    return [key for key in keys if not key.endswith(".py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_keys_exist(page: Path) -> None:
    assert [key for key in mentioned_keys(page) if not schema_has(key)] == []


def test_keys_in_code_spans_with_a_value_are_valid() -> None:
    tree = parse_yaml((ROOT / QUICKSTART).read_text(), QUICKSTART)
    for page in PAGES:
        for span in code_spans(page):
            if re.fullmatch(r"phases\.\d+\.[a-z_.]+=\S+", span):
                apply_override(tree, span)
    parse_config(tree)


def test_what_may_change_on_resume_is_documented() -> None:
    documented = set(code_spans(ROOT / "docs/running.md"))
    assert [key for key in MAY_CHANGE if key not in documented] == []


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_files_exist(page: Path) -> None:
    folders = "launcher|model|data|quant|eval|configs|docs|tests|benchmarks|docker"
    paths = [span for span in code_spans(page) if re.fullmatch(rf"({folders})/[\w./-]*", span)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_page_is_in_an_index() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= {Path(link.partition("#")[0]).name for link in links(ROOT / "docs/README.md")}
    assert pages <= {Path(link.partition("#")[0]).name for link in links(ROOT / "README.md")}
    decisions = ROOT / "docs/decisions"
    assert {page.name for page in decisions.glob("*.md")} - {"README.md"} == set(links(decisions / "README.md"))


def test_the_picture_of_the_architecture_is_what_import_linter_checks() -> None:
    import tomllib

    (picture,) = (text for language, text in fenced_blocks(ROOT / "docs/architecture.md") if language == "text")
    lines = picture.split("eval/")[0].splitlines()
    drawn = [re.findall(r"([a-z_]+)(?:/ |/$|\.py)", line.removeprefix("launcher/")) for line in lines]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["layers"][-1].startswith("launcher."))
    checked = [re.findall(r"launcher\.([a-z_]+)", layer) for layer in layers]
    assert [line for line in drawn if line] == checked


def test_functions_on_the_architecture_page_exist() -> None:
    text = " ".join((ROOT / "docs/architecture.md").read_text().split())
    found = re.findall(r"`(?:\w+\.)?(\w+)(?:\([^`]*\))?` \(`([\w/]+\.py)`\)", text)
    assert len(found) > 15
    missing = [
        (name, file)
        for name, file in found
        if not re.search(rf"(?m)(?:def|class) {name}\b|^{name}\b", (ROOT / file).read_text())
    ]
    assert missing == []


def test_mentioned_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [text for page in PAGES for text in (*code_spans(page), *(text for _, text in fenced_blocks(page)))]
    mentioned = {name for text in texts for name in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)}
    assert mentioned
    assert mentioned <= targets


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci/run"
    lines = script.read_text().splitlines()
    install, test = TEST_COMMAND.split(" && ")
    assert test in lines
    assert any(line.startswith("pip install") and line.endswith(install.removeprefix("pip install")) for line in lines)
    assert "make check" in lines
    assert script.stat().st_mode & 0o111, "not executable"
    subprocess.run(["bash", "-n", script], check=True)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["check-and-test"]["steps"]


def test_commit_hooks_are_the_checks_of_make_and_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    checks = re.findall(r"^\t(.+)$", (ROOT / "Makefile").read_text().split("test:")[0], re.MULTILINE)
    assert {hook["name"] for hook in hooks[0]["hooks"]} == {
        " ".join(re.findall(r"^[\w-]+(?: (?:check|format)\b)?", check)) for check in checks
    }


def test_the_table_of_steps_is_made_from_the_results():
    made = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert made["BEGIN"] + made["table"]() + made["END"] in (ROOT / "README.md").read_text(), "run benchmarks/readme.py"
