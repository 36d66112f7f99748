"""Files and folders that a run reads, and what `plan` and `train` say of those that are missing."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from chat_files import pair, prepare_chats, prepare_pairs, prepare_text, some_chats
from command import tritrain
from exports import model_tree
from hf_folders import pack_folder, write_variant
from jobs import Job
from models import VARIANTS
from places import ROOT
from tiny import SEQUENCE_LENGTH, tiny_config, tiny_tree
from tiny_tasks import EXAMPLES

from data.errors import DataError
from data.loader import validation_rows
from data.prepared import no_held_out_text
from data.shards import PrepareConfig, prepare
from data.sources import Source, open_sources
from data.tokenizer import train_tokenizer
from launcher.checkpoint.folders import MANIFEST, complete_checkpoints, folder_of
from launcher.errors import ConfigError
from launcher.inference.inputs import check_inputs, input_problems
from launcher.plan.course import make_course
from launcher.plan.disk import disk_of
from launcher.plan.inputs import missing_inputs, needed_paths
from launcher.plan.memory import checkpoint_bytes
from launcher.run.folder import RunFolder


def text_of(inputs=("python-stdlib",), tokenizer="bpe:320", **keys):
    held_out = {} if "validation_inputs" in keys else {"validation_fraction": 0.1}
    return {"prepare": {"inputs": list(inputs), "tokenizer": tokenizer, **held_out, **keys}}


def test_nothing_is_missing_where_all_is_there(shards, tmp_path):
    assert missing_inputs(tiny_config(shards, tmp_path / "run")) == []
    check_inputs(tiny_config(tmp_path / "none", tmp_path / "run", data=text_of()))


def test_a_missing_source_says_how_to_make_one(tmp_path):
    found = dict(missing_inputs(tiny_config(tmp_path / "none", tmp_path / "run")))
    assert found.keys() == {"data.sources.0.path"}
    assert found["data.sources.0.path"].startswith(
        f"{tmp_path}/none: no such folder of prepared data; `tritrain prepare"
    )


def test_what_is_missing_under_a_relative_path_is_said_to_be_missing_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = {
        "data.sources.0.path": "my-data: no such folder of prepared data in ",
        "checkpoint.start_from": "trunk: no such folder in ",
        "phases.1.distillation.teacher": "big: no such folder in ",
        "data.prepare.inputs.0": "none.txt: no such file or folder in ",
        "data.prepare.tokenizer": "none.model: no such tokenizer file in ",
    }
    named = {"checkpoint": {"start_from": "trunk"}, "phases": phases("big")}
    found = dict(missing_inputs(tiny_config(Path("my-data"), tmp_path / "run", **named)))
    found |= missing_inputs(tiny_config(Path("out"), tmp_path / "run", data=text_of(["none.txt"], "none.model")))
    assert found.keys() == here.keys()
    for key, problem in found.items():
        assert problem.startswith(f"{here[key]}{tmp_path};"), key


def test_a_source_must_fit_the_model_and_the_other_sources(shards, tmp_path):
    def found(**sections):
        return dict(missing_inputs(tiny_config(shards, tmp_path / "run", **sections)))

    assert "was prepared with sequence_length 32" in found(data={"sequence_length": 16})["data.sources.0.path"]
    assert "set model.vocab_size to 320 or more" in found(model={"vocab_size": 64})["data.sources.0.path"]
    other = tmp_path / "other"
    corpus = shards.parent / "corpus.jsonl"
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300"), SEQUENCE_LENGTH, other)
    both = found(data={"sources": [{"path": str(shards)}, {"path": str(other)}]})
    assert both.keys() == {"data.sources.1.path"}
    assert f"was prepared with a different tokenizer than {shards}" in both["data.sources.1.path"]
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / "tokenizer.model").unlink()
    cut = found(data={"sources": [{"path": str(copy)}]})
    assert cut == {"data.sources.0.path": f"{copy}/tokenizer.model: missing; copy the folder again"}


def test_everything_that_is_wrong_with_a_source_is_reported(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / "tokenizer.model").unlink()
    sections = {"data": {"sequence_length": 16}, "model": {"vocab_size": 64}}
    config = tiny_config(copy, tmp_path / "run", **sections)
    keys, problems = zip(*missing_inputs(config), strict=True)
    assert keys == ("data.sources.0.path",) * 3
    assert "prepared with sequence_length 32" in problems[0]
    assert "its tokenizer has 320 tokens" in problems[1]
    assert "tokenizer.model: missing" in problems[2]
    with pytest.raises(DataError) as caught:
        check_inputs(config)
    assert str(caught.value).splitlines() == [f"data.sources.0.path: {problem}" for problem in problems]
    with pytest.raises(DataError, match=r"(?s)sequence_length 32.*\n.*320 tokens"):
        open_sources((Source(path=str(shards)),), None, 16, 64)


def test_held_out_text_must_be_there_or_be_made(shards, tmp_path):
    options = PrepareConfig(inputs=(str(shards.parent / "corpus.jsonl"),), tokenizer=str(shards / "tokenizer.model"))
    prepare(options, SEQUENCE_LENGTH, tmp_path / "without")
    both = {"sources": [{"path": str(tmp_path / "without")}, {"path": str(shards)}]}
    assert missing_inputs(tiny_config(shards, tmp_path / "run", data=both)) == []
    without = tiny_config(tmp_path / "without", tmp_path / "run")
    with pytest.raises(DataError) as caught:
        validation_rows(without.data, vocab_size=320, micro_batch_sequences=1, rank=0, world_size=1)
    assert missing_inputs(without) == [("data.validation_rows", str(caught.value))]
    nothing = text_of(validation_fraction=0.0)
    unmade = tiny_config(tmp_path / "none", tmp_path / "run", data=nothing)
    assert dict(missing_inputs(unmade))["data.prepare"].startswith("holds no text out, but data.validation_rows is 8;")
    for data in (nothing | {"validation_rows": 0}, text_of(validation_inputs=["python-stdlib"])):
        assert missing_inputs(tiny_config(tmp_path / "none", tmp_path / "run", data=data)) == []


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_phase_that_is_measured_on_its_own_sources_needs_held_out_rows_of_them(objective, shards, tmp_path):
    pairs = [pair(f"question {n}", "yes", "no") for n in range(24)]
    make, records = (prepare_chats, some_chats(36)) if objective == "sft" else (prepare_pairs, pairs)
    text = prepare_text(tmp_path, 96)
    own = {
        held_out: make(tmp_path, 96, *records, out=f"own-{held_out}", validation_fraction=held_out)
        for held_out in (0.0, 0.25)
    }

    def found(of_run, of_phase, **data):
        keys = {"precision": "16-bit", "steps": 2}
        return missing_inputs(
            tiny_config(
                of_run,
                tmp_path / "run",
                model={"vocab_size": 320, "max_sequence_length": 96},
                data={"sequence_length": 96, **data},
                phases=[keys, keys | {"objective": objective, "sources": [{"path": str(of_phase)}]}],
            )
        )

    assert found(text, own[0.25]) == found(text, own[0.0], validation_rows=0) == []
    assert found(text, own[0.0]) == [("phases.1.sources", no_held_out_text([str(own[0.0])]))]


def test_a_folder_of_tokens_may_be_made_beforehand_and_empty(tmp_path):
    (tmp_path / "out").mkdir()
    config = tiny_config(tmp_path / "out", tmp_path / "run", data=text_of(["gone.txt"]))
    assert [key for key, _ in missing_inputs(config)] == ["data.prepare.inputs.0"]
    assert [*needed_paths(config)] == [("data.prepare.inputs.0", "gone.txt")]
    assert missing_inputs(tiny_config(tmp_path / "out", tmp_path / "run", data=text_of())) == []
    (tmp_path / "out" / "notes.txt").write_text("of another purpose")
    assert [key for key, _ in missing_inputs(config)] == ["data.sources.0.path"]


def test_text_that_is_to_be_prepared_is_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    texts = [str(tmp_path / name) for name in ("none.txt", "empty", "picture.png")]
    keys = text_of([*texts, "hf:only-a-name", "hf:name:config:split[:9]"], validation_inputs=[texts[0]])
    found = missing_inputs(tiny_config(tmp_path / "out", tmp_path / "run", data=keys))
    assert {key: text.partition("; ")[0] for key, text in found} == {
        "data.prepare.inputs.0": f"{texts[0]}: no such file or folder",
        "data.prepare.inputs.1": f"{texts[1]}: this folder has no file of a known kind",
        "data.prepare.inputs.2": f"{texts[2]}: this kind of file is not known",
        "data.prepare.inputs.3": "hf:only-a-name: write a data set as hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT",
        "data.prepare.validation_inputs.0": f"{texts[0]}: no such file or folder",
    }


def test_text_is_not_needed_where_it_was_prepared(shards, tmp_path):
    assert missing_inputs(tiny_config(shards, tmp_path / "run", data=text_of(["gone.txt"]))) == []


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("none.model", "none.model: no such tokenizer file"),
        ("bpe:321", "bpe:321 has 321 tokens, the model's vocabulary 320; set model.vocab_size to 321 or more"),
        ("SHARDS/tokenizer.model", "has 320 tokens, the model's vocabulary 319"),
    ],
)
def test_a_tokenizer_is_checked_before_hours_of_tokenizing(shards, tmp_path, tokenizer, said):
    vocab_size = 319 if "SHARDS" in tokenizer else 320
    keys = text_of(tokenizer=tokenizer.replace("SHARDS", str(shards)))
    found = dict(missing_inputs(tiny_config(tmp_path / "out", tmp_path, data=keys, model={"vocab_size": vocab_size})))
    assert found.keys() == {"data.prepare.tokenizer"}
    assert said in found["data.prepare.tokenizer"]


def phases(*teachers):
    ternary = [{"precision": "ternary", "steps": 4, "distillation": {"teacher": teacher}} for teacher in teachers]
    return [{"precision": "16-bit", "steps": 4}, *ternary]


def reach(run, step):
    folder = folder_of(run / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")


def test_checkpoints_are_needed_until_the_run_is_past_them(shards, tmp_path):
    run = tmp_path / "run"
    file = tmp_path / "file"
    file.write_text("")
    config = tiny_config(
        shards,
        run,
        checkpoint={"start_from": str(file)},
        phases=phases(str(tmp_path / "teacher"), "s3://bucket/teacher", str(tmp_path)),
    )
    found = dict(missing_inputs(config))
    assert found["checkpoint.start_from"].startswith(f"{file}: is a file, and a checkpoint is a folder; name a ")
    assert found["phases.1.distillation.teacher"].startswith(f"{tmp_path}/teacher: no such folder; name a checkpoint")
    assert len(found) == 2
    for name in ("step-9", "step-00000009.tmp"):  # as a person may name a copy, and as one begins
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / MANIFEST).write_text("{}")
    assert not complete_checkpoints(run / "checkpoints")
    assert dict(missing_inputs(config)) == found
    reach(run, 4)
    assert dict(missing_inputs(config)).keys() == {"phases.1.distillation.teacher"}
    reach(run, 8)
    assert missing_inputs(config) == []


def test_a_checkpoint_that_is_the_teacher_too_is_needed_to_the_end_of_its_phase(shards, tmp_path):
    def needed(run, start_phase=1):
        ternary = {"precision": "ternary", "steps": 4}
        config = tiny_config(
            shards,
            tmp_path / run,
            checkpoint={"start_from": "trunk", "start_phase": start_phase},
            phases=[{"precision": "16-bit", "steps": 4}, ternary | {"distillation": {}}, ternary],
        )
        assert [path for _, path in needed_paths(config)][1:] == [path for path in ("trunk",) if missing_inputs(config)]
        return [key for key, _ in missing_inputs(config)]

    for step, keys in ((6, ["checkpoint.start_from"]), (8, [])):
        reach(tmp_path / "distills", step)
        assert needed("distills") == keys
    reach(tmp_path / "converted", 4)
    reach(tmp_path / "converted", 6)
    assert needed("converted") == []
    reach(tmp_path / "from-the-beginning", 2)
    assert needed("from-the-beginning", start_phase=0) == []


def test_what_is_needed_is_each_path_after_its_key(shards, tmp_path):
    keys = {"tasks": ["piqa"], "tasks_interval_steps": 4, "task_data": "mirror"}
    config = tiny_config(
        tmp_path / "out",
        tmp_path / "run",
        data=text_of(["a.txt", "hf:x:train", "python-stdlib"], "some.model", validation_inputs=["b.txt"]),
        checkpoint={"start_from": "trunk"},
        phases=phases("teacher", "s3://bucket/teacher"),
        evaluation=keys,
    )
    text = [("data.prepare.inputs.0", "a.txt"), ("data.prepare.validation_inputs.0", "b.txt")]
    checkpoints = [("checkpoint.start_from", "trunk"), ("phases.1.distillation.teacher", "teacher")]
    tasks = [("evaluation.task_data", "mirror")]
    assert [*needed_paths(config)] == [*text, ("data.prepare.tokenizer", "some.model"), *checkpoints, *tasks]
    reach(tmp_path / "run", 8)
    shutil.copytree(shards, tmp_path / "out")
    assert [*needed_paths(config)] == [("data.sources.0.path", str(tmp_path / "out")), *tasks]


def test_tasks_need_their_examples(shards, tmp_path):
    def found():
        keys = {"tasks": ["piqa", "sciq"], "tasks_interval_steps": 4, "task_data": str(tmp_path)}
        return missing_inputs(tiny_config(shards, tmp_path / "run", evaluation=keys))

    (tmp_path / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES["piqa"]))
    assert dict(found())["evaluation.task_data"].startswith(
        f"{tmp_path}: lacks sciq_validation.jsonl; a mirror has one file"
    )
    (tmp_path / "sciq_validation.jsonl").write_text("{}")
    assert found() == []


def test_a_complete_run_needs_nothing(tmp_path):
    config = tiny_config(tmp_path / "none", tmp_path / "run")
    (tmp_path / "run").mkdir()
    for state in ('{"status": "interrupted"}', "", '{"status": "compl', "[]"):
        (tmp_path / "run" / "state.json").write_text(state)
        assert input_problems(config)
    (tmp_path / "run" / "state.json").write_text('{"status": "complete"}')
    assert input_problems(config) == []


def test_a_complete_run_of_the_same_name_spares_another_configuration_nothing(shards, tmp_path):
    run, tree = tmp_path / "run", tiny_tree(shards, tmp_path / "run")
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"tritrain_version": "0.1.0", **tree}))
    (run / "state.json").write_text('{"status": "complete"}')
    (run / "starts.jsonl").write_text('{"step": 0}\n')

    def plan(path):
        copied = tree | {"data": tree["data"] | {"sources": [{"path": path}]}}
        (tmp_path / "copied.yaml").write_text(yaml.safe_dump(copied))
        found = json.loads(tritrain("plan", tmp_path / "copied.yaml", "--json"))["plan"]
        return [each["key"] for each in found["missing"]], found["refused"], found["disk"]["checkpoints_bytes"]

    missing, refused, still_to_write = plan(str(shards))
    assert (missing, refused) == ([], None)
    folder_of(run / "checkpoints", 4).mkdir(parents=True)
    (folder_of(run / "checkpoints", 4) / MANIFEST).write_text("{}")
    missing, refused, then_to_write = plan("my-dta")
    assert then_to_write == still_to_write - checkpoint_bytes(make_course(tiny_config(shards, run)))
    assert missing == ["data.sources.0.path"]
    with pytest.raises(ConfigError) as caught:
        RunFolder(tiny_config(Path("my-dta"), run)).check_configuration()
    assert refused == str(caught.value)
    assert "holds a run with another configuration" in refused
    assert "data.sources.0.path" in refused
    assert "a start is refused" in tritrain("plan", tmp_path / "copied.yaml")


def test_train_refuses_at_once(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path / "none", tmp_path / "run")))
    code = "import sys; from launcher.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", tmp_path / "config.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (2, "False\n"), "torch takes more than a second to import"
    assert result.stderr.startswith(f"data.sources.0.path: {tmp_path}/none: no such folder of prepared data")


def test_train_refuses_before_it_starts_a_rank(tmp_path, monkeypatch):
    tree = tiny_tree(tmp_path / "out", tmp_path / "run")
    tree["data"] |= text_of([str(tmp_path / "none.txt")])
    tree["checkpoint"] = {"start_from": str(tmp_path / "none")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr("launcher.cli.training.become_run", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(DataError) as caught:
        tritrain("train", tmp_path / "config.yaml")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "data.prepare.inputs.0",
        "checkpoint.start_from",
    ]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of Hugging Face: one that fits `tiny`'s vocabulary, its ternary export, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocab_size in (("sound", 320), ("ternary", 320), ("words", 64)):
        write_variant(folder / name, vocab_size=vocab_size)
    pack_folder(folder / "ternary", "bitlinear")
    return folder


def told_of(tree, tmp_path, monkeypatch):
    """What `plan` says is missing; a start refuses with the same sentences, or starts ranks if there are none."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    missing = json.loads(tritrain("plan", tmp_path / "config.yaml", "--json"))["plan"]["missing"]
    started = []
    monkeypatch.setattr("launcher.cli.training.become_run", lambda *_: started.append(True))
    with pytest.raises(DataError) if missing else nullcontext() as caught:
        tritrain("train", tmp_path / "config.yaml")
    if missing:
        assert str(caught.value) == "\n".join(f"{each['key']}: {each['problem']}" for each in missing)
    assert bool(started) == (not missing)
    return {each["key"]: each["problem"] for each in missing}


def test_a_teacher_that_cannot_teach_is_found_before_the_first_step(shards, models, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no model")
    teachers = [models / "ternary", models / "sound", models / "words", shards, tmp_path / "other"]
    tree = tiny_tree(shards, tmp_path / "run")
    tree["phases"] = phases(*map(str, teachers))
    told = told_of(tree, tmp_path, monkeypatch)
    ternary, words, data, no_model = (told.pop(f"phases.{phase}.distillation.teacher") for phase in (1, 3, 4, 5))
    assert told == {}
    assert ternary == f"{models}/ternary cannot teach this model:\nit is ternary; a teacher must be in 16 bits"
    assert words == f"{models}/words cannot teach this model:\nits vocab_size is 64, the model's 320"
    assert data.startswith(f"{shards} is prepared data (of `tritrain prepare`), not a model")
    assert no_model.startswith(f"{tmp_path}/other: not a checkpoint of a known kind.")


def test_what_a_run_cannot_begin_with_is_found_at_once(shards, models, tmp_path, monkeypatch):
    def told(name, **keys):
        tree = tiny_tree(shards, tmp_path / "run")
        tree["model"] = model_tree(VARIANTS["llama"]) | {"vocab_size": 320} | keys.pop("model", {})
        tree["checkpoint"] = {"start_from": str(models / name), **keys}
        tree["phases"][0]["transition"] = {"optimizer": "reset"}
        return told_of(tree, tmp_path, monkeypatch).get("checkpoint.start_from")

    assert told("sound") is None
    assert told(shards).startswith(f"{shards} is prepared data")
    assert "has no SubLN" in told("sound", model={"sub_norm": True})
    assert told("sound", model={"sub_norm": True}, sub_norm_sequences=4) is None
    assert "is ternary; SubLN" in told("ternary", model={"sub_norm": True}, sub_norm_sequences=4)
    assert "set checkpoint.grow_vocabulary to true" in told("words")
    assert told("words", grow_vocabulary=True) is None
    assert "leave out checkpoint.grow_vocabulary" in told("sound", grow_vocabulary=True)


def test_a_start_that_teaches_is_looked_at_as_a_teacher(shards, models, tmp_path, monkeypatch):
    tree = tiny_tree(shards, tmp_path / "run")
    tree["model"] = model_tree(VARIANTS["llama"]) | {"vocab_size": 320}
    tree["phases"] = [{"precision": "ternary", "steps": 4, "distillation": {}, "transition": {"optimizer": "reset"}}]
    for name, told in (
        ("sound", {}),
        ("ternary", {"checkpoint.start_from": f"{models}/ternary cannot teach this model:\nit is ternary; a teacher "
                                              "must be in 16 bits"}),
    ):  # fmt: skip
        tree["checkpoint"] = {"start_from": str(models / name)}
        assert told_of(tree, tmp_path, monkeypatch) == told


@pytest.mark.slow
def test_ranks_refuse_before_they_prepare_data(tmp_path):
    tree = tiny_tree(tmp_path / "out", tmp_path / "run")
    tree["data"] |= text_of()
    tree["phases"] = phases(str(tmp_path / "teacher"))
    job = Job(tree)
    assert 0 not in job.wait()
    assert job.output.count(f"phases.1.distillation.teacher: {tmp_path}/teacher: no such folder") == 1, job.output
    assert "Traceback" not in job.output
    assert not (tmp_path / "out").exists()


def test_disk_space_is_for_checkpoints_and_possible_exports(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run" / "deep")
    exports = [SimpleNamespace(problems=[], num_bytes=7), SimpleNamespace(problems=["no"], num_bytes=100)]
    found = disk_of(make_course(config), 3, 0, exports)
    parameters = 320 * 36 + 2 * (2 * 36 * 36 + 2 * 12 * 36 + 3 * 36 * 51 + 2 * 36) + 36
    assert found["checkpoints_bytes"] == 4 * 12 * parameters
    assert found["needed_bytes"] == found["checkpoints_bytes"] + 7
    assert abs(found["free_bytes"] - shutil.disk_usage(tmp_path).free) < 2**30
    assert disk_of(make_course(config), 3, 3, exports)["checkpoints_bytes"] == 12 * parameters
    assert disk_of(make_course(config), 3, 9, exports)["checkpoints_bytes"] == 0
    remote = tiny_config(shards, tmp_path / "run", checkpoint={"folder": "s3://bucket/run"})
    assert disk_of(make_course(remote), 3, 0, exports)["free_bytes"] is None


def test_a_model_of_another_vocabulary_of_the_same_size_is_found_at_once(shards, models, tmp_path, monkeypatch):
    train_tokenizer(
        ["other words make other pieces, as zebras and quizzes do. " * 40], "bpe:320", tmp_path / "other.model"
    )
    same = shards / "tokenizer.model"
    for name, tokenizer in (("own", same), ("other", tmp_path / "other.model")):
        shutil.copytree(models / "sound", tmp_path / name)
        shutil.copy(tokenizer, tmp_path / name / "tokenizer.model")
    tree = tiny_tree(shards, tmp_path / "run")
    tree["model"] = model_tree(VARIANTS["llama"]) | {"vocab_size": 320}
    tree["checkpoint"] = {"start_from": str(tmp_path / "own")}
    tree["phases"] = [{"precision": "ternary", "steps": 4, "transition": {"optimizer": "reset"}}]
    tree["phases"][0]["distillation"] = {"teacher": str(tmp_path / "own")}
    assert told_of(tree, tmp_path, monkeypatch) == {}
    tree["checkpoint"]["start_from"] = tree["phases"][0]["distillation"]["teacher"] = str(tmp_path / "other")
    told = told_of(tree, tmp_path, monkeypatch)
    said = (
        rf"its tokenizer, {tmp_path}/other/tokenizer\.model, is another than that of the data, {same}: \d+ of 320 ids "
        r"stand for other tokens, such as \d+ for '.*' and '.*'\. Prepare the data with the model's\."
    )
    assert re.match(rf"{tmp_path}/other: {said}", told["checkpoint.start_from"])
    teacher = told["phases.0.distillation.teacher"]
    assert re.match(rf"{tmp_path}/other cannot teach this model:\n{said}", teacher)
