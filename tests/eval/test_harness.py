"""Our side of lm-evaluation-harness: models with known answers, and its own `hf` model on the same examples."""

import json
import math
import shutil

import pytest
import torch
from hf_folders import ModelSource
from tiny_tasks import write_tasks
from tokenizer_files import write_bytes_tokenizer

from data.errors import DataError
from data.tokenizer import load_tokenizer
from data.torchvision_repair import repair_torchvision
from data.transformers_files import puts_first_token
from eval.errors import NotFiniteError
from eval.rows import Scorer
from eval.score import scores_of
from eval.tasks import DEFINITIONS, Task, harness_task, load_rows
from launcher.formats.hf_folder import write_hf
from model.transformer import ModelConfig, Transformer

pytest.importorskip("lm_eval")
from eval.harness import Encoding, answer_questions, ask, open_questions

END, BEGIN = 0, 1


class Characters:
    """A tokenizer of single characters."""

    path = "characters.model"
    end_of_document = END

    def encode(self, text):
        return [ord(character) % 2000 for character in text]

    def token_bytes(self):
        return torch.ones(3000)


def model_that_says(nll):
    """A scorer by a function of token and label; labels of -100 cost nothing."""

    def token_nll(tokens_BT, labels_BTA):
        return torch.where(labels_BTA == -100, 0.0, nll(tokens_BT[:, :, None], labels_BTA).double())

    return Scorer(token_nll, 500)


FIXED = model_that_says(lambda tokens, labels: torch.where(labels == ord("a"), 1.0, 3.0))
"""Every character costs 3 nats, an `a` 1."""


def asked(choices, gold):
    return {"query": "Q:", "choices": choices, "gold": gold}


def answers_of(rows, scorer=FIXED, **encoding):
    questions = open_questions("task", rows, Encoding(Characters(), **{"first_token": END, **encoding}), 500)
    return answer_questions("task", questions, scorer)


def test_a_model_with_known_answers_scores_what_it_must():
    # With the space in front: "aa" costs 3 + 2, "b" 3 + 3, "baab" 3 + 8.
    rows = [asked(["b", "aa"], 1), asked(["b", "aa"], 0), asked(["aaaaa", "b"], 0), asked(["baab", "b"], 1)]
    answers = answers_of(rows)
    assert [example.log_likelihoods for example in answers] == [(-6, -5), (-6, -5), (-8, -6), (-11, -6)]
    assert scores_of(answers, "acc")["acc"].value == 2 / 4  # chosen: aa, aa, b, b
    assert scores_of(answers, "acc_norm")["acc_norm"].value == 2 / 4  # chosen: aa, aa, aaaaa, baab
    bits = [5 / 2, 6 / 1, 8 / 5, 6 / 1]
    expected = sum(bits) / 4 / math.log(2)
    assert math.isclose(scores_of(answers, "acc")["bits_per_byte"].value, expected)


def test_a_model_with_known_answers_has_the_f1_it_must():
    yes_costs = model_that_says(lambda tokens, labels: torch.where(labels == ord("y"), 0.5, 1.0))
    answers = answers_of([asked(["no", "yes"], gold) for gold in (0, 1, 1)], yes_costs)
    assert {example.chosen for example in answers} == {0}  # " no" costs 3 nats, " yes" 3.5
    assert scores_of(answers, "f1")["f1"].value == 0
    no_costs = model_that_says(lambda tokens, labels: torch.where(labels == ord("n"), 9.0, 0.5))
    answers = answers_of([asked(["no", "yes"], gold) for gold in (0, 1, 1)], no_costs)
    assert scores_of(answers, "f1")["f1"].value == 2 * 2 / (2 * 2 + 1)


def test_several_contexts_with_one_continuation():
    rows = [{"contexts": ["ab", "ba"], "continuation": "x", "gold": gold} for gold in (0, 1)]
    after_a = model_that_says(lambda tokens, labels: torch.where(tokens == ord("a"), 1.0, 2.0))
    answers = answers_of(rows, after_a)
    assert [example.log_likelihoods for example in answers] == [
        (-4.0, -3.0)
    ] * 2  # " " after b or a, then "x" after " "
    assert [example.answers for example in answers] == [("x", "x")] * 2
    assert scores_of(answers, "acc")["acc"].value == 0.5


class Pairs(Characters):
    """Joins a space to the character behind it, and "e " into one token: it matters what is encoded at once."""

    def encode(self, text):
        ids = []
        while text:
            size = 2 if text[:2] == "e " or text[:1] == " " else 1
            ids.append(sum(map(ord, text[:size])))
            text = text[size:]
        return ids


@pytest.mark.parametrize("separately", [False, True])
def test_contexts_and_continuations_are_tokenized_as_the_style_says(separately):
    encoded = Encoding(Pairs(), END, separately).pair("the", " end")
    together = ([116, 104, 101], [101, 110, 100])  # the: t, h, e; "the end" has "e " in it, so "end" is what is left
    apart = ([116, 104, 101], [32 + 101, 110, 100])
    assert encoded == (apart if separately else together)


@pytest.mark.parametrize("context", ["", " ", "\n"])
@pytest.mark.parametrize("separately", [False, True])
def test_a_continuation_without_context_comes_after_the_first_token(context, separately):
    before, after = Encoding(Characters(), END, separately).pair(context, "ab")
    assert before == ([ord(context), END] if separately and context else [END])[:1]
    assert after == [ord(character) for character in ("ab" if separately else context + "ab")]
    for puts in (True, False):
        before, _ = Encoding(Characters(), BEGIN, separately, puts_first_token=puts).pair(context, "ab")
        assert (before[0] == BEGIN) is (puts or not (separately and context))


@pytest.mark.parametrize("separately", [False, True])
def test_a_token_that_only_begins_texts_is_in_front_of_every_context_if_the_tokenizer_puts_it_there(separately):
    """As Llama's does; Qwen's does not. One that ends documents too is not in front, as OLMo's."""
    for first, puts, before in ((BEGIN, True, [BEGIN, 97, 98]), (BEGIN, False, [97, 98]), (END, True, [97, 98])):
        encoding = Encoding(Characters(), first, separately, puts_first_token=puts)
        assert encoding.pair("ab", "c") == (before, [99])


class Words(Characters):
    """Joins everything up to a space, so that a continuation without one has no token of its own."""

    def encode(self, text):
        return [sum(map(ord, word)) for word in text.split()]


def test_an_answer_without_a_token_is_known_before_any_model_runs():
    rows = [asked(["b", "aa"], 1), asked(["b", "\u3000"], 1)]
    with pytest.raises(DataError, match=r"task, example 2: the answer '\\u3000' has no token .*characters\.model"):
        open_questions("task", rows, Encoding(Words(), END), 500)
    with pytest.raises(DataError, match=r"task, example 2: .*; change the example$"):
        open_questions("task", rows, Encoding(Words(), END, separately=True), 500)


@pytest.mark.parametrize("adds_space", [False, True])
def test_a_separate_answer_has_one_space_in_front_of_it(adds_space, tmp_path):
    """Also with a tokenizer that puts one there itself; SentencePiece spells its pieces."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["no yes no maybe so", "yes so"]), model_prefix=str(tmp_path / "spaces"), vocab_size=290,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=adds_space,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "spaces.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spaces.model"))
    _, after = Encoding(tokenizer, tokenizer.end_of_document, separately=True).pair("no", " yes")
    assert "".join(pieces.id_to_piece(after)) == "\u2581yes"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_likelihood_that_is_not_finite_names_task_example_and_answer(value):
    broken = model_that_says(lambda tokens, labels: torch.where(labels == ord("z"), value, 1.0))
    rows = [asked(["b", "aa"], 1), asked(["b", "yz"], 0), asked(["z", "b"], 0)]
    with pytest.raises(NotFiniteError, match=f"task, example 2: the log-likelihood of answer 2 is -?{value}"):
        answers_of(rows, broken)
    answers_of(rows[:1], broken)


def test_equal_answers_tie_and_the_first_is_chosen():
    """As numpy's argmax in lm-evaluation-harness does."""
    answers = answers_of([asked(["aa", "aa", "b"], gold) for gold in (0, 1)])
    assert [example.chosen for example in answers] == [0, 0]
    assert [example.chosen_by_length for example in answers] == [0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards):
    """A random llama, written for Transformers with a tokenizer that agrees with ours."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=96, max_sequence_length=256
    )
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data = (
            1 + 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else torch.randn_like(parameter) * 0.2
        )
    write_hf(ModelSource(model), config, folder, torch.float32)
    write_bytes_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )
    return folder, model


def test_scores_equal_those_of_the_harness_s_own_hf_model(folder, tmp_path):
    """Example by example, on all eleven tasks, in its own style; and the scores that it makes of them."""
    pytest.importorskip("accelerate")
    repair_torchvision()
    from lm_eval.models.huggingface import HFLM

    path, model = folder
    theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=4)
    tokenizer = load_tokenizer(path)
    scorer = Scorer(lambda tokens, labels: model(tokens, labels, reduction="none").token_nll, 256)
    mirror = write_tasks(tmp_path / "tasks")
    for name, definition in DEFINITIONS.items():
        rows = load_rows(Task(name, True), mirror)
        task = harness_task(name, rows)
        expected = ask(task, theirs)
        questions = open_questions(name, rows, Encoding(tokenizer, tokenizer.end_of_document), 256)
        found = answer_questions(name, questions, scorer)
        assert [(e.answers, e.gold, e.chosen) for e in found] == [(e.answers, e.gold, e.chosen) for e in expected]
        for ours, reference in zip(found, expected, strict=True):
            assert ours.log_likelihoods == pytest.approx(reference.log_likelihoods, rel=2e-6)
        docs = list(task.eval_docs)
        results = [
            task.process_results(doc, [(value, False) for value in example.log_likelihoods])
            for doc, example in zip(docs, expected, strict=True)
        ]
        if definition.metric == "f1":
            from sklearn.metrics import f1_score

            gold, predicted = zip(*[result["f1"] for result in results], strict=True)
            reference_score = f1_score(gold, predicted)  # the positive answer, yes, is the harness's index 1
        else:
            reference_score = sum(result[definition.metric] for result in results) / len(results)
        assert scores_of(found, definition.metric)[definition.metric].value == pytest.approx(reference_score)


@pytest.mark.parametrize("puts", [True, False])
def test_contexts_begin_as_the_harness_s_own_hf_model_begins_them(folder, tmp_path, puts):
    """A folder whose tokenizer has a token of its own for that, and puts it in front, as Llama's, or does not, as
    Qwen's; an empty context begins with it in any case."""
    pytest.importorskip("accelerate")
    repair_torchvision()
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, processors

    path, model = folder
    shutil.copytree(path, tmp_path / "hf")
    files = tmp_path / "hf" / "tokenizer.json", tmp_path / "hf" / "tokenizer_config.json"
    tokenizer = Tokenizer.from_file(str(files[0]))
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    single = "<s> $A" if puts else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", begin)])
    tokenizer.save(str(files[0]))
    files[1].write_text(json.dumps(json.loads(files[1].read_text()) | {"bos_token": "<s>"}))
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=2)
    scorer = Scorer(lambda tokens, labels: model(tokens, labels, reduction="none").token_nll, 256)
    rows = [asked(["ab", "abc"], 0), {"query": "", "choices": ["x", "yes no"], "gold": 1}, asked(["é"] * 2, 0)]
    task = harness_task("task", rows)
    encoding = Encoding(load_tokenizer(tmp_path / "hf"), begin, puts_first_token=puts_first_token(tmp_path / "hf"))
    questions = open_questions("task", rows, encoding, 256)
    for found, expected in zip(answer_questions("task", questions, scorer), ask(task, theirs), strict=True):
        assert found.log_likelihoods == pytest.approx(expected.log_likelihoods, rel=2e-6)
