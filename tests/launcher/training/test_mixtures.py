"""Runs whose phases have mixtures of their own: what they read, say and refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from ranks import run_group
from runs import ENGINES, run
from tiny import SEQUENCE_LENGTH, tiny_config, tiny_tree, write_corpus

from data.config import PrepareConfig
from data.errors import DataError
from data.loader import fingerprints
from data.prepared import TRAIN, read_manifest
from data.shards import prepare
from launcher.config.file import parse_config
from launcher.config.sections import Config
from launcher.errors import UserError
from launcher.plan.inputs import missing_inputs
from launcher.plan.plan import make_plan
from launcher.plan.table import describe_surroundings, surrounding_rows
from launcher.process.console import Console
from launcher.report.page import page_of
from launcher.report.status import show, status_of
from launcher.report.summary import summarize
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics

GLOBAL = 8


@pytest.fixture(scope="module")
def other(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second folder of the tokenizer of the first, about half as large."""
    folder = tmp_path_factory.mktemp("other")
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=140)
    tokenizer = str(shards / "tokenizer.model")
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer=tokenizer), SEQUENCE_LENGTH, folder / "shards")
    return folder / "shards"


def mixed(shards: Path, other: Path) -> list[dict[str, Any]]:
    return [{"path": str(shards), "weight": 3.0}, {"path": str(other), "weight": 1.0}]


def phases_of(shards: Path, other: Path) -> list[dict[str, Any]]:
    """4 steps of the run's own mixture, 4 of two sources in shorter sequences, and 4 of the first one again."""
    return [
        {"precision": "16-bit", "steps": 4},
        {"precision": "16-bit", "steps": 4, "sources": mixed(shards, other), "sequence_length": 16},
        {"precision": "ternary", "steps": 4, "sources": [{"path": str(shards)}], "sequence_length": SEQUENCE_LENGTH},
    ]


def config_of(shards: Path, other: Path, out: Path, **sections: Any) -> Config:
    sections = {"phases": phases_of(shards, other), "checkpoint": {"interval_steps": 1}} | sections
    return tiny_config(shards, out, **sections)


class Lines(Console):
    """A console that keeps its lines."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__(silent=silent)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def whole_and_in_pieces(shards: str, other: str, out: str, engines: list[str], pieces: list[int]) -> list[str]:
    console = Lines(silent=True)
    runs.Console = lambda silent: console  # type: ignore[assignment, misc]
    for name in engines:
        for kind in ("whole", "pieces"):
            config = config_of(Path(shards), Path(other), Path(out) / name / kind, engine=ENGINES[name])
            for steps in pieces if kind == "pieces" else []:
                assert run(config, steps) == "interrupted"
            assert run(config) == "complete"
    return console.lines


def trained(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def check_run(out: Path, shards: Path, other: Path) -> None:
    """Check what a whole run and one in pieces have logged: the same, and the tokens of each source."""
    first, second = f"data/tokens/{shards}", f"data/tokens/{other}"
    keys = ("step", "train/loss", "train/grad_norm", "train/sequence_length", first, second)
    whole, pieces = ([[row.get(key) for key in keys] for row in trained(out / each)] for each in ("whole", "pieces"))
    assert whole == pieces
    assert [row[3] for row in whole] == [SEQUENCE_LENGTH] * 4 + [16] * 4 + [SEQUENCE_LENGTH] * 4
    step_tokens = GLOBAL * SEQUENCE_LENGTH
    assert [row[4] for row in whole[:4]] == [step_tokens * step for step in (1, 2, 3, 4)]
    assert all((row[4] or 0) + (row[5] or 0) == step_tokens * row[0] for row in whole)
    assert whole[3][5] is None
    of_second = whole[7][5]
    assert 0 < of_second < 4 * step_tokens
    assert whole[-1][5] == of_second
    summary = summarize(out / "pieces")
    assert [phase.tokens_by_source for phase in summary.phases] == [
        {str(shards): 4 * step_tokens},
        {str(shards): 4 * step_tokens - of_second, str(other): of_second},
        {str(shards): 4 * step_tokens},
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engines", "num_ranks"),
    [
        (["zero-2"], 2),
        (["fsdp2"], 1),
        (["fsdp2", "zero-3"], 2),
    ],
)
def test_a_run_reads_its_mixtures_however_often_it_is_stopped(
    shards: Path, other: Path, tmp_path: Path, engines: list[str], num_ranks: int
) -> None:
    # Stops at each boundary, and inside a phase.
    told = run_group(num_ranks, whole_and_in_pieces, str(shards), str(other), str(tmp_path), engines, [4, 3, 1, 2])[0]
    for name in engines:
        check_run(tmp_path / name, shards, other)
    ends = [line for line in told if "has drawn" in line]
    assert len(ends) == 6 * len(engines)
    assert ends[:3] == ends[3:6]
    assert ends[0] == f"Step 4: phase 0 has drawn 1.02 k tokens (100.0%) from {shards}"
    assert f"from {shards}, " in ends[1]
    assert ends[1].endswith(f"from {other}")
    done = tmp_path / engines[0] / "pieces"
    page = page_of([summarize(done)])
    assert "<h2>Data</h2>" in page
    assert page.count(str(other)) > page.count("<summary>")
    status = status_of(done, 0.0)
    assert sum(status.tokens_by_source.values()) == 12 * GLOBAL * SEQUENCE_LENGTH
    assert list(status.tokens_by_source) == [str(shards), str(other)]
    assert show([status]) is not None


def outcome_of(config: Config, steps: int = 10**6) -> str:
    """The outcome of going on with a run, or the sentence that refuses it."""
    try:
        RunFolder(config).check_configuration()
        return run(config, steps)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def changed(shards: str, other: str, out: str) -> dict[str, str]:
    """What a run of three phases says, that has trained 6 steps, to other data of each of them."""
    first, second = Path(shards), Path(other)

    def resume(name: str, steps: int = 1, allow: tuple[str, ...] = (), **sections: Any) -> str:
        tree = tiny_tree(first, Path(out))
        tree["run"] |= {"allow_changes": list(allow)}
        tree |= {"phases": phases_of(first, second), "checkpoint": {"interval_steps": 1}} | sections
        return outcome_of(parse_config(tree), steps)

    assert run(config_of(first, second, Path(out)), 6) == "interrupted"

    def phases(change: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
        change(found := phases_of(first, second))
        return found

    present = phases(lambda found: found[1]["sources"][0].update(weight=1.0))
    past = phases(lambda found: found[0].update(sources=[{"path": other}]))
    moved = phases(lambda found: (found[0].update(steps=3), found[1].update(steps=5)))
    split = phases(
        lambda found: (
            found[1].update(steps=2),
            found.insert(2, {"precision": "16-bit", "steps": 2, "sources": [{"path": other}]}),
        )
    )
    return {
        "present": resume("present", phases=present),
        "present, allowed": resume("present", allow=("phases",), phases=present),
        "past": resume("past", phases=past),
        "past, allowed": resume("past", allow=("phases",), phases=past),
        "moved": resume("moved", allow=("phases",), phases=moved),
        "split": resume("split", phases=split),
        "future": resume("future", phases=phases(lambda found: found[2].update(sources=mixed(first, second)))),
        "back": resume("back", 0),
    }


def test_data_that_a_run_was_trained_on_do_not_change_but_those_to_come_do(
    shards: Path, other: Path, tmp_path: Path
) -> None:
    [told] = run_group(1, changed, str(shards), str(other), str(tmp_path / "run"))
    way = (
        "What a run was trained on does not change. To train on other data from here on, leave the sources as they "
        "were and begin a new phase with `sources` of its own there: it has trained 2 steps of phase 1, and 2 steps "
        "of it are left. That needs 'run.allow_changes=[phases]'."
    )
    assert told["present"].startswith("ConfigError")
    assert "phases.1.sources.0.weight: 3.0 in" in told["present"]
    assert way in told["present"]
    place = (
        "To go on in this run with the same data in another place, add 'run.allow_changes=[phases.1.sources.0.weight]'"
    )
    assert place in told["present"]
    assert "phases.0.sources.0.path: not set in" in told["past"]
    assert way in told["past"]
    for kind in ("present, allowed", "past, allowed"):
        assert told[kind].startswith(("CheckpointError", "ConfigError"))
        assert "begin a new phase with `sources` of its own" in told[kind]
    assert "phase 1" in told["moved"]
    assert told["moved"].startswith("ConfigError")
    assert "phases.1.steps: 4 in" in told["split"]
    assert told["future"] == "interrupted"
    assert told["back"] == "interrupted"


def split_run(shards: str, other: str, out: str) -> list[str]:
    """Go on with other data in the way that the refusal names."""
    first, second = Path(shards), Path(other)
    assert run(config_of(first, second, Path(out)), 6) == "interrupted"
    tree = tiny_tree(first, Path(out))
    tree["run"] |= {"allow_changes": ["phases"]}
    phases = phases_of(first, second)
    phases[1]["steps"] = 2
    phases.insert(2, {"precision": "16-bit", "steps": 2, "sources": [{"path": other}]})
    tree |= {"phases": phases, "checkpoint": {"interval_steps": 1}}
    return [outcome_of(parse_config(tree))]


def test_a_new_phase_is_the_way_to_other_data(shards: Path, other: Path, tmp_path: Path) -> None:
    assert run_group(1, split_run, str(shards), str(other), str(tmp_path / "run")) == [["complete"]]
    summary = summarize(tmp_path / "run")
    assert [list(phase.tokens_by_source) for phase in summary.phases][2:] == [[str(other)], [str(shards)]]
    assert summary.phases[2].tokens_by_source == {str(other): 2 * GLOBAL * SEQUENCE_LENGTH}


def test_what_later_phases_lack_is_found_at_the_start(shards: Path, other: Path, tmp_path: Path) -> None:
    def found(*phases: dict[str, Any]) -> dict[str, str]:
        listed = [{"precision": "16-bit", "steps": 2}, *({"precision": "16-bit", "steps": 2} | each for each in phases)]
        return dict(missing_inputs(tiny_config(shards, tmp_path / "run", phases=listed)))

    assert found({"sources": mixed(shards, other)}) == {}
    nowhere = found({}, {"sources": [{"path": str(other)}, {"path": str(tmp_path / "none")}]})
    assert nowhere.keys() == {"phases.2.sources.1.path"}
    assert "none: no such folder of prepared data" in nowhere["phases.2.sources.1.path"]
    foreign = tmp_path / "foreign"
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300"), SEQUENCE_LENGTH, foreign)
    assert (
        f"different tokenizer than {shards}" in found({"sources": [{"path": str(foreign)}]})["phases.1.sources.0.path"]
    )
    ends = Path(shutil.copytree(other, tmp_path / "ends"))
    manifest = json.loads((ends / "manifest.json").read_text())
    (ends / "manifest.json").write_text(json.dumps(manifest | {"end_of_document": 1}))
    told = found({"sources": [{"path": str(ends)}]})["phases.1.sources.0.path"]
    assert f"{ends}: ends documents with token 1, but {shards} with token 2" in told
    few = tmp_path / "few"
    short = tmp_path / "few.txt"
    short.write_text("abcdefgh " * 20)
    prepare(PrepareConfig(inputs=(str(short),), tokenizer=str(shards / "tokenizer.model")), SEQUENCE_LENGTH, few)
    assert "fewer than the 8 of one global batch" in found({"sources": [{"path": str(few)}]})["phases.1.sources"]
    config = tiny_config(shards, tmp_path / "run").data
    for path, problem in ((foreign, "different tokenizer"), (ends, "ends documents with token 1"), (few, "fewer than")):
        mixture = tiny_config(path, tmp_path / "run").data
        with pytest.raises(DataError, match=problem):
            fingerprints(config, [mixture], vocab_size=320, global_batch_sequences=8, rank=0)


def test_compressed_shards_need_the_cache_that_remote_ones_do(shards: Path, tmp_path: Path) -> None:
    corpus, small = shards.parent / "corpus.jsonl", tmp_path / "small"
    tokenizer = str(shards / "tokenizer.model")
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer=tokenizer, compression="zstd"), SEQUENCE_LENGTH, small)
    phases = [
        {"precision": "16-bit", "steps": 2},
        {"precision": "16-bit", "steps": 2, "sources": [{"path": str(small)}]},
    ]
    told = dict(missing_inputs(tiny_config(shards, tmp_path / "run", phases=phases)))
    assert told == {"data.cache": f"is needed for {small}, whose shards are compressed; name a folder on each node"}
    data = {"cache": str(tmp_path / "cache")}
    assert missing_inputs(tiny_config(shards, tmp_path / "run", phases=phases, data=data)) == []


def test_the_plan_says_what_each_phase_reads(shards: Path, other: Path, tmp_path: Path) -> None:
    plan = make_plan(config_of(shards, other, tmp_path / "run"), 1)
    found = describe_surroundings(plan, None, 0.4, ())
    rows = [read_manifest(folder)["splits"][TRAIN]["rows"] for folder in (shards, other)]
    assert [(each["phase"], each["path"], each["share"]) for each in found["sources"]] == [
        (0, str(shards), 1.0),
        (1, str(shards), 0.75),
        (1, str(other), 0.25),
        (2, str(shards), 1.0),
    ]
    expected = [GLOBAL * steps / rows[of] for steps, of in ((4, 0), (7, 0), (1, 1), (11, 0))]
    assert [each["epochs_by_end"] for each in found["sources"]] == pytest.approx(expected)
    assert [each["tokens"] for each in found["sources"]] == [1024, 768, 256, 1024]
    words = dict(surrounding_rows(found))
    assert words[f"phase 1 reads {other}"].startswith("25.0%, 256 tokens; by its end ")
    json.dumps(found["sources"])


def test_a_run_of_one_source_has_no_counts(shards: Path, tmp_path: Path) -> None:
    run_group(1, complete, str(shards), str(tmp_path / "run"))
    assert not any(key.startswith("data/tokens") for row in trained(tmp_path / "run") for key in row)
    assert "<h2>Data</h2>" not in page_of([summarize(tmp_path / "run")])


def complete(shards: str, out: str) -> list[torch.Tensor]:
    phases = [{"precision": "16-bit", "steps": 2}, {"precision": "16-bit", "steps": 2, "sources": [{"path": shards}]}]
    assert run(tiny_config(Path(shards), Path(out), phases=phases)) == "complete"
    return []
