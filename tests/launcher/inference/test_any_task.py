"""`tritrain eval` with tasks of lm-evaluation-harness, on a run and on its export."""

import json
from types import SimpleNamespace

import fsspec
import pytest
import torch
import torch.distributed as dist
from chat_files import CHATML, NAMES, chat, prepare_chats
from exports import write_checkpoint
from harness_examples import write_examples
from hf_folders import edit_config, write_variant
from ranks import run_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config
from tokenizer_files import write_bytes_tokenizer
from tokenizer_zoo import sentencepiece_tokenizer

import launcher.inference.any_task
from data.errors import DataError
from data.tokenizer import load_tokenizer
from data.torchvision_repair import repair_torchvision
from eval.harness_tasks import load_tasks
from launcher.errors import ConfigError
from launcher.formats.hf_export import export_hf
from launcher.formats.opened import open_exportable
from launcher.inference.any_task import (
    Prompting,
    as_found,
    build_requests,
    curve_of,
    end_tokens_of,
    label_of,
    opened_model,
    record_of,
    tokenizer_folder,
    transformers_tokenizer,
    way_of_asking,
)
from launcher.inference.measure import Evaluation, check_tasks, evaluate
from launcher.inference.sharded import open_measurable, subject_of
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.scores import harness_table_of, read_results
from model.transformer import Transformer

pytest.importorskip("lm_eval")

TASKS = ["arc_challenge", "lambada_openai", "wikitext", "gsm8k", "wmdp"]


def this_rank() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def evaluate_here(model, tasks, data, out, asked):
    evaluation = Evaluation([model], tasks, data, None, out, None, prompting=Prompting(**asked))
    evaluate(evaluation, this_rank(), Console(silent=False))


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "DISABLE_MULTIPROC"):
            patch.setenv(name, "1")
        yield


@pytest.fixture
def alone():
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run with one checkpoint, in 16 bits, that computes in fp32."""
    config = tiny_config(
        shards,
        tmp_path_factory.mktemp("run") / "run",
        model={"max_sequence_length": 288},
        training={"compute_dtype": "fp32"},
        phases=[{"precision": "16-bit", "steps": 4}],
    )
    torch.manual_seed(0)
    model = Transformer(config.model)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
    write_checkpoint(config, model, step=4, phase=0, tokenizer=shards / "tokenizer.model")
    return config.run.path


@pytest.mark.slow
def test_scores_of_a_run_equal_those_of_the_hf_model_on_its_export(run, data, tmp_path, alone):
    """With its tokenizer as exported, which begins each text with a token, on one rank as on two."""
    pytest.importorskip("accelerate")
    repair_torchvision()
    from lm_eval.evaluator import evaluate as their_evaluate
    from lm_eval.models.huggingface import HFLM

    from eval.harness_tasks import FEWSHOT_SEED, load_tasks

    files = [tmp_path / "one.json", tmp_path / "two.json"]
    asked = str(run), TASKS, str(data)
    evaluate_here(*asked, str(files[0]), {"num_fewshot": 1})
    run_group(2, evaluate_here, *asked, str(files[1]), {"num_fewshot": 1})
    one, two = (read_results(out) for out in files)
    assert one == two
    opened = open_exportable(str(run), ternary=False)
    export_hf(opened, tmp_path / "hf", weights="latent", tokenizer=opened.tokenizer)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=1)
    assert theirs.tok_encode("a")[0] == theirs.prefix_token_id
    loaded = load_tasks(TASKS, data, 1)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    expected = their_evaluate(theirs, vars(loaded), log_samples=False, fewshot_as_multiturn=True)
    found = {record["task"]: record for record in one}
    assert found.keys() == expected["results"].keys()
    for name, results in expected["results"].items():
        assert found[name]["num_examples"] == results["sample_len"]
        scores = {key: value for key, value in results.items() if "," in key and "_stderr" not in key}
        assert len(scores) == len(found[name]["scores"])
        for key, value in scores.items():
            score = found[name]["scores"][key.removesuffix(",none")]
            assert score["value"] == pytest.approx(value, rel=1e-5)
            error = results[key.replace(",", "_stderr,")]
            assert score["standard_error"] == (None if error == "N/A" else pytest.approx(error, rel=1e-5))
    assert found["gsm8k"]["num_fewshot"] == found["arc_challenge"]["num_fewshot"] == 1
    assert found["arc_challenge"]["version"] == "1.0"
    assert found["wmdp"]["tasks"] == ["wmdp_bio", "wmdp_chem", "wmdp_cyber"]


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "{% if loop.last and continue_final_message %}{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.slow
def test_a_folder_is_asked_with_its_chat_template_as_by_the_hf_model(data, tmp_path, alone):
    pytest.importorskip("accelerate")
    repair_torchvision()
    from lm_eval.evaluator import evaluate as their_evaluate
    from lm_eval.models.huggingface import HFLM

    from eval.harness_tasks import FEWSHOT_SEED, load_tasks

    folder = tmp_path / "hf"
    write_variant(folder, vocab_size=320)
    edit_config(folder, max_position_embeddings=512, torch_dtype="float32")
    write_bytes_tokenizer(folder / "tokenizer.json", "<s>", "<|im_start|>", "<|im_end|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = {"num_fewshot": 1, "system_instruction": "Be brief."}
    tasks = ["arc_challenge", "wmdp_bio", "gsm8k"]
    evaluate_here(str(folder), tasks, str(data), str(tmp_path / "chat.json"), asked | {"chat_template": True})
    evaluate_here(str(folder), tasks, str(data), str(tmp_path / "text.json"), asked)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    loaded = load_tasks(tasks, data, 1)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    expected = their_evaluate(
        theirs,
        vars(loaded),
        log_samples=False,
        system_instruction="Be brief.",
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )["results"]
    found = {record["task"]: record for record in read_results(tmp_path / "chat.json")}
    assert found.keys() == expected.keys() == set(tasks)
    for name, record in found.items():
        assert record["chat_template"] is True
        for metric, score in record["scores"].items():
            assert score["value"] == pytest.approx(expected[name][metric if "," in metric else f"{metric},none"])
    plain = {record["task"]: record for record in read_results(tmp_path / "text.json")}
    assert all(plain[name]["examples"] != found[name]["examples"] for name in tasks)


def log_likelihoods_after(folder, questions):
    """Of an answer to each question, by a chat template whose turns end with the end of a document."""
    from lm_eval.api.instance import Instance

    subject = subject_of(*open_measurable(str(folder)), this_rank())
    with opened_model(subject, Prompting(chat_template=True)) as (model, _):
        contexts = [model.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
        requests = [Instance("loglikelihood", {}, (context, "4"), 0, ("t", 0, 1)) for context in contexts]
        return [found for found, _ in model.loglikelihood(requests)]


def test_an_answer_is_asked_after_its_question_by_a_model_that_kept_documents_apart(tmp_path, alone):
    prepared = prepare_chats(tmp_path, 32, *[chat("2?", "4"), chat("1?", "2")] * 4)
    found = {}
    for documents in ("joined", "masked"):
        config = tiny_config(
            prepared,
            tmp_path / documents,
            model={"vocab_size": 320, "max_sequence_length": 288},
            data={"documents": documents},
            phases=[{"precision": "16-bit", "steps": 4, "objective": "sft"}],
        )
        torch.manual_seed(0)
        model = Transformer(config.model)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
        write_checkpoint(config, model, step=4, phase=0, tokenizer=prepared / "tokenizer.json")
        found[documents] = log_likelihoods_after(config.run.path, ["What is 2 + 2?", "Name a colour."])
    assert found["masked"] == found["joined"]
    assert found["masked"][0] != found["masked"][1]


def subject_with(folder):
    """What is asked about a model's tokenizer, for a checkpoint that has one without settings of Transformers."""
    tokenizer = load_tokenizer(folder)
    return SimpleNamespace(
        location=str(folder),
        step=4,
        tokenizer=tokenizer,
        first_token=tokenizer.end_of_document,
        puts_first_token=True,
        scorer=SimpleNamespace(window_tokens=64),
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=1024)),
    )


def test_a_checkpoint_trained_on_chats_is_asked_with_their_template(tmp_path):
    repair_torchvision()
    write_bytes_tokenizer(tmp_path / "tokenizer.json", *NAMES)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    subject = subject_with(tmp_path)
    with tokenizer_folder(subject, Prompting(chat_template=True)) as folder:
        theirs = transformers_tokenizer(folder)
        ends = end_tokens_of(subject, folder)
    end_of_turn = subject.tokenizer.encode_special("<|im_end|>")
    assert theirs.chat_template == CHATML
    assert theirs("a<|im_end|>").input_ids == [*subject.tokenizer.encode("a"), *end_of_turn]
    assert set(ends) == {subject.tokenizer.end_of_document, *end_of_turn}


def test_the_folder_of_a_model_says_where_generation_ends(tmp_path):
    write_bytes_tokenizer(tmp_path / "tokenizer.json")
    subject = subject_with(tmp_path)
    subject.location = "memory://ends"
    fsspec.filesystem("memory").pipe("/ends/generation_config.json", b'{"eos_token_id": [3, 5]}')
    assert end_tokens_of(subject, tmp_path) == [3, 5]


def test_a_result_is_another_one_where_other_tokens_end_answers():
    subject = SimpleNamespace(identity="a", computation={"dtype": "float32"})
    keys = [way_of_asking(subject, Prompting(), "digest", ends) for ends in ({3, 1}, {1}, {1, 3})]
    assert keys[0] == keys[2] != keys[1]
    assert json.loads(json.dumps(keys[0])) == keys[0]


def test_a_template_that_cannot_be_expressed_is_only_needed_for_chats(tmp_path):
    repair_torchvision()
    sentencepiece_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    )
    subject = subject_with(tmp_path)
    with tokenizer_folder(subject, Prompting()) as folder:
        assert transformers_tokenizer(folder).chat_template is None
    asked = tokenizer_folder(subject, Prompting(chat_template=True))
    with pytest.raises(DataError, match="would make other tokens of chats"), asked:
        pass


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_and_a_finished_one_is_kept(run, data, tmp_path, alone, monkeypatch):
    answered = []

    def answer_of_two(task, *given, **named):
        answered.append(task.task_name)
        if len(answered) == 2:
            raise RuntimeError("stopped")
        return answer(task, *given, **named)

    answer = launcher.inference.any_task.answer
    monkeypatch.setattr(launcher.inference.any_task, "answer", answer_of_two)
    asked = str(run), ["arc_challenge", "wmdp_bio"], str(data), str(tmp_path / "scores.json")
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate_here(*asked, {})
    assert [record["task"] for record in read_results(tmp_path / "scores.json")] == answered[:1]
    evaluate_here(*asked, {})
    assert answered[2:] == answered[1:2]  # the one that was stopped
    evaluate_here(*asked, {})
    assert len(answered) == 3
    evaluate_here(*asked, {"num_fewshot": 1})
    assert answered[3:] == ["arc_challenge"]  # asked in another way; the other task keeps the 0 that it says
    assert len(read_results(tmp_path / "scores.json")) == 3
    points = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for events in [EventAccumulator(str(run / "tensorboard" / "evaluation")).Reload()]
        for tag in events.Tags()["scalars"]
    }
    for record in read_results(tmp_path / "scores.json"):
        for metric, score in record["scores"].items():
            found = points[f"eval/{curve_of(record)}/{metric}"]
            assert {step for step, _ in found} == {4}  # other trials evaluate the same checkpoint
            assert found[-1][1] == pytest.approx(score["value"])


@pytest.mark.parametrize(("label", "shown"), [(7, "7"), (-1, "-1"), (None, "None")])
def test_a_right_answer_that_is_no_choice_is_refused(tmp_path, label, shown):
    """lm-evaluation-harness would count it as wrong, and fail after the model has run where there is none."""
    rows = [{"passage": "P", "question": "is it", "label": each} for each in (0, 1, label)]
    (tmp_path / "boolq_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_tasks(["boolq"], tmp_path, None).tasks["boolq"]
    assert build_requests(task, None, Prompting(), 2)
    message = rf"boolq: example 3: its answer {shown} is none of its choices \['no', 'yes'\]"
    with pytest.raises(DataError, match=message):
        build_requests(task, None, Prompting(), None)


def test_records_hold_what_groups_are_made_of():
    found = {
        "alias": "a",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "em,strict": 1,
        "em_stderr,strict": 0.25,
    }
    subject = SimpleNamespace(location="run", step=4)
    record = record_of(found, 2.0, subject)
    assert record["scores"]["acc"] == {"value": 0.5, "standard_error": None}
    assert record["scores"]["em,strict"] == {"value": 1.0, "standard_error": 0.25}
    assert (record["metric"], record["version"], record["num_examples"]) == ("acc", "2.0", 3)
    assert as_found(record) == {key: value for key, value in found.items() if key != "alias"}
    rows = harness_table_of([record | {"task": "t", "num_fewshot": 5}])
    assert rows == [["t", "2.0", "5", "3", "acc", "0.5000"], ["t", "2.0", "5", "3", "em,strict", "1.0000 ± 0.2500"]]


def test_other_ways_of_asking_have_other_names():
    assert (label_of("piqa"), label_of("arc_challenge")) == ("harness:piqa", "arc_challenge")
    record = {"task": "gsm8k", "num_fewshot": 5, "chat_template": True}
    assert curve_of(record) == "gsm8k-5-shot-chat"
    assert curve_of(record | {"num_fewshot": 0, "chat_template": False}) == "gsm8k"


def test_own_tasks_are_asked_in_one_way(data):
    with pytest.raises(ConfigError, match=r"--tasks: piqa: .*harness:piqa is lm-evaluation-harness's"):
        check_tasks(["piqa", "wikitext"], None, Prompting(num_fewshot=2))
    with pytest.raises(ConfigError, match=r"--task-data: .*absent: is not a folder"):
        check_tasks(["wikitext"], str(data / "absent"))
    assert check_tasks(["wikitext", "harness:piqa"], str(data)) == ([], ["wikitext", "piqa"])
