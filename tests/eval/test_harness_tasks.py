"""Names, data and refusals of lm-evaluation-harness's tasks."""

import json
import sys
import time

import pytest
from harness_examples import EXAMPLES, write_examples

from data.errors import DataError
from eval.task_index import definitions, known_names, split_names

pytest.importorskip("lm_eval")
from eval.harness_tasks import _index, load_tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def test_names_of_both_are_tritrain_s_unless_the_harness_is_named():
    names = ["piqa", "harness:piqa", "wikitext", "mmlu", "paper11-harness", "wikitext", "ai2_arc"]
    assert split_names(names) == (["piqa", "paper11-harness"], ["piqa", "wikitext", "mmlu", "ai2_arc"])


@pytest.mark.parametrize(
    ("name", "near"),
    [("arc_chalenge", "arc_challenge"), ("wikitxt", "wikitext"), ("hellaswga", "hellaswag"), ("mmlu_stm", "mmlu_stem")],
)
def test_an_unknown_name_is_answered_with_similar_ones(name, near):
    with pytest.raises(ValueError, match=f"task '{name}' is not known; did you mean .*{near}"):
        split_names([name])


def test_names_are_found_without_the_harness_s_own_index():
    known_names()
    began = time.process_time()
    with pytest.raises(ValueError, match="task 'zzqx' is not known; choose paper11"):
        split_names(["zzqx"])
    assert time.process_time() - began < 1


@pytest.mark.slow
def test_the_index_equals_the_harness_s_own():
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex

    theirs = TaskManager().task_index
    ours = {}
    for path, keys in definitions():
        TaskIndex.process_cfg(keys, path, ours)
    assert known_names() == theirs.keys()
    for name, entry in theirs.items():
        assert (ours[name].kind, ours[name].yaml_path, ours[name].tags) == (entry.kind, entry.yaml_path, entry.tags)


def test_data_lie_by_task_or_as_on_the_hub(tmp_path):
    flat = write_examples(tmp_path / "flat", "arc_challenge_test")
    hub = tmp_path / "hub" / "allenai" / "ai2_arc" / "ARC-Challenge"
    hub.mkdir(parents=True)
    (flat / "arc_challenge_test.jsonl").rename(hub / "test.jsonl")
    write_examples(flat, "arc_challenge_test")
    for folder in (flat, tmp_path / "hub"):
        task = load_tasks(["arc_challenge"], folder, None).tasks["arc_challenge"]
        assert [doc["question"] for doc in task.test_docs()] == [
            row["question"] for row in EXAMPLES["arc_challenge_test"]
        ]


def test_a_mirror_s_fields_are_the_columns(tmp_path):
    rows = [
        {"query": "Q", "choices": ["no", "yes"], "gold": 1, "fields": {"passage": "P", "question": "is it", "label": 1}}
    ]
    (tmp_path / "boolq_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_tasks(["boolq"], tmp_path, None).tasks["boolq"]
    [doc] = task.eval_docs
    assert task.doc_to_text(doc) == "P\nQuestion: is it?\nAnswer:"


def test_a_missing_split_is_named_where_it_belongs_and_only_if_it_is_needed(tmp_path):
    with pytest.raises(
        DataError, match=r"triviaqa: split 'train' .*triviaqa_train\.jsonl or .*rc\.nocontext/train\.jsonl"
    ):
        load_tasks(["triviaqa"], write_examples(tmp_path / "a", "triviaqa_validation"), 1)
    assert load_tasks(["triviaqa"], tmp_path / "a", None).tasks
    with pytest.raises(DataError, match=r"wikitext: split 'test' of its data is missing; put it into .*wikitext_test"):
        load_tasks(["wikitext"], tmp_path / "a", None)
    with pytest.raises(DataError, match=r"gsm8k: split 'train' .* is missing"):  # it says itself that it has examples
        load_tasks(["gsm8k"], write_examples(tmp_path / "b", "gsm8k_test"), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"wikitext_test\.jsonl: contains no example"),
        ('{"page": "a"}\n{"page"', r"wikitext_test\.jsonl:2: not an example"),
        ("[1]\n", r"wikitext_test\.jsonl:1: an example must be a JSON object"),
        ('{"page": "a"}\n{"page": {"b": 1}}\n', r"wikitext_test\.jsonl: a column has values of several types"),
        ('{"page": "a"}\n{"text": "b"}\n', r"wikitext_test\.jsonl:1: has no 'text', which other lines have"),
        ('{"text": "a"}\n', r"wikitext: cannot be made from the files in .*each example must have the columns"),
    ],
)
def test_wrong_data_are_one_clear_error(tmp_path, content, message):
    (tmp_path / "wikitext_test.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tasks(["wikitext"], tmp_path, None)


@pytest.mark.slow
def test_without_a_network_the_hub_s_data_are_asked_for_as_files():
    message = (
        r"arc_challenge: its data set allenai/ai2_arc ARC-Challenge cannot be loaded from the Hugging Face hub .*"
        r"--task-data FOLDER, and put it into FOLDER/arc_challenge_test\.jsonl or "
        r"FOLDER/allenai/ai2_arc/ARC-Challenge/test\.jsonl"
    )
    with pytest.raises(DataError, match=message):
        load_tasks(["arc_challenge"], None, None)


def test_a_data_set_that_needs_code_is_refused(monkeypatch):
    import datasets

    given = []

    def load_dataset(**about):
        given.append(about)
        raise RuntimeError("Dataset scripts are no longer supported, but found asdiv.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"asdiv: its data set .* is loaded by code of its own, which Tritrain does not"
    ):
        load_tasks(["asdiv"], None, None)
    assert all("trust_remote_code" not in about for about in given)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("humaneval", "humaneval: .*code"),
        ("mbpp", "mbpp: .*code"),
        ("mmmu_val_biology", "images or sounds"),
        ("kobest_wic", "kobest_wic: the metric 'f1' is code on the Hugging Face hub"),
        ("meqsum", "meqsum: needs a metric that is code on the Hugging Face hub"),
    ],
)
def test_what_tritrain_does_not_do_is_refused_before_data_are_looked_for(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        load_tasks([name], tmp_path, None)
    assert getattr(sys.modules.get("evaluate"), "__file__", "") is not None


@pytest.fixture
def without_ifeval(monkeypatch):
    """Nothing that an earlier test has imported."""
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, without_ifeval):
    monkeypatch.setitem(sys.modules, "immutabledict", None)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(
        DataError, match=r"ifeval: needs the Python package (langdetect|immutabledict), .*'lm-eval\[tasks\]==0.4.13'"
    ):
        load_tasks(["ifeval"], write_examples(tmp_path, "ifeval_train"), None)


def test_sentences_are_looked_for_before_answers_are_generated(tmp_path, monkeypatch, without_ifeval, capfd):
    import nltk

    for package in ("langdetect", "immutabledict"):
        pytest.importorskip(package)
    asked = []
    monkeypatch.setattr(nltk, "download", lambda name: asked.append(name))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    data = write_examples(tmp_path, "ifeval_train")
    with pytest.raises(DataError, match=r"ifeval: .*tokenizers/punkt_tab, which is not on this machine\. .*NLTK_DATA"):
        load_tasks(["ifeval"], data, None)
    assert asked == ["punkt_tab"]  # by lm-evaluation-harness
    assert capfd.readouterr() == ("", "")
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    assert list(load_tasks(["ifeval"], data, None).tasks) == ["ifeval"]


def test_tasks_that_a_group_defines_for_itself_read_files_too(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pair.yaml").write_text(
        "group: pair\ntask:\n  - task: own\n    dataset_path: json\n    output_type: loglikelihood\n"
        "    test_split: test\n    doc_to_text: '{{a}}'\n    doc_to_target: '{{b}}'\n"
        "    metric_list:\n      - metric: acc\n"
    )
    (tmp_path / "pair::own_test.jsonl").write_text('{"a": "x", "b": " y"}\n')
    ours, theirs = split_names([str(folder / "pair.yaml")])
    loaded = load_tasks(theirs, tmp_path, None)
    [request] = next(iter(loaded.tasks.values())).test_docs()
    assert request == {"a": "x", "b": " y"}
    assert (ours, list(loaded.tasks), list(loaded.groups)) == ([], ["pair::own"], ["pair"])


def test_one_task_in_two_groups_is_asked_for_in_two_commands(tmp_path):
    data = write_examples(tmp_path)
    with pytest.raises(DataError, match=r"Duplicate task 'wmdp_bio'.*two commands"):
        load_tasks(["wmdp", "wmdp_bio"], data, None)


def test_a_tag_that_a_file_names_has_its_task_only_in_that_call(tmp_path):
    members = set(_index()["ai2_arc"].tags)
    (tmp_path / "own.yaml").write_text(
        "task: own\ntag: ai2_arc\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        "doc_to_text: '{{a}}'\ndoc_to_target: '{{b}}'\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "own_test.jsonl").write_text('{"a": "x", "b": " y"}\n')
    assert list(load_tasks([str(tmp_path / "own.yaml")], tmp_path, None).tasks) == ["own"]
    assert _index()["ai2_arc"].tags == members
    assert "own" not in _index()


def test_what_a_task_of_one_s_own_is_defined_by_is_known(tmp_path):
    (tmp_path / "mine_test.jsonl").write_text('{"q": "2+2?", "a": "4"}\n')
    (tmp_path / "utils.py").write_text("def answer(doc):\n    return doc['a']\n")
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: !function utils.answer\nmetric_list: [{metric: exact_match}]\n"
    )
    loaded = load_tasks([str(tmp_path / "mine.yaml")], tmp_path, None)
    assert loaded.own == {"mine"}
    assert loaded.own_files == (tmp_path / "mine.yaml", tmp_path / "utils.py")
