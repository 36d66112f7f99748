"""Any task of lm-evaluation-harness on our model, against its own `hf` model, example by example."""

import contextlib
import json
import shutil
from functools import partial

import pytest
import torch
from harness_examples import write_examples
from hf_folders import ModelSource
from tokenizer_files import write_bytes_tokenizer

from data.errors import DataError
from data.torchvision_repair import repair_torchvision
from eval.errors import NotFiniteError
from eval.rows import Scorer
from eval.sample import generate
from launcher.formats.hf_folder import write_hf
from model.transformer import ModelConfig, Transformer

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
from eval.harness_model import HarnessModel, Writer
from eval.harness_tasks import FEWSHOT_SEED, load_tasks

WINDOW = 384
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if loop.last and continue_final_message %}{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")


def make_model(window=WINDOW):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=96, max_sequence_length=window
    )
    model = Transformer(config)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.1 * noise if parameter.ndim == 1 else noise * 0.2
    return config, model


@pytest.fixture(scope="module", params=["plain", "bos"])
def folder(tmp_path_factory, request):
    """A random Llama in a folder; its tokenizer puts nothing in front of a text, or `<s>`."""
    return write_folder(tmp_path_factory.mktemp("hf") / "model", request.param)


def write_folder(folder, kind, window=WINDOW):
    from tokenizers import Tokenizer, processors

    config, model = make_model(window)
    write_hf(ModelSource(model), config, folder, torch.float32)
    names = ["<s>", "<|im_start|>", "<|im_end|>"]
    write_bytes_tokenizer(folder / "tokenizer.json", *names)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    if kind == "bos":
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, model


def models_of(folder, add_bos_token=None):
    """Ours and theirs, on the same weights."""
    repair_torchvision()
    from lm_eval.models.huggingface import HFLM

    path, model = folder
    theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=1, add_bos_token=add_bos_token)
    return ours_of(model, theirs.tokenizer, add_bos_token), theirs


def ours_of(model, tokenizer, add_bos_token=None, nll=None):
    def both(tokens, labels):
        found = model(tokens, labels, reduction="greedy")
        return found.token_nll, found.token_misses

    scorer = Scorer(
        lambda tokens, labels: model(tokens, labels, reduction="none").token_nll,
        model.config.max_sequence_length,
        batch_tokens=512,
        token_nll_and_misses=nll or both,
    )
    writer = Writer(partial(generate, model), contextlib.nullcontext)
    return HarnessModel(scorer, writer, tokenizer, [tokenizer.eos_token_id], add_bos_token)


def answers(model, names, data, num_fewshot=None, system_instruction=None, chat=False):
    """What lm-evaluation-harness makes of a model's answers; `simple_evaluate` does the same, and looks for git."""
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(names, data, num_fewshot)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    return evaluate(
        model,
        vars(loaded),
        bootstrap_iters=10,
        system_instruction=system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )


def assert_equal(ours, theirs):
    """All answers of all examples, and all scores."""
    assert ours["samples"].keys() == theirs["samples"].keys()
    for name in ours["samples"]:
        for found, expected in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert found["arguments"] == expected["arguments"]
            for [mine], [other] in zip(found["resps"], expected["resps"], strict=True):
                if isinstance(mine, tuple):
                    assert mine == (pytest.approx(other[0], rel=2e-6), other[1])
                elif isinstance(mine, float):
                    assert mine == pytest.approx(other, rel=2e-6)
                else:
                    assert mine == other
    for name, expected in theirs["results"].items():
        for key, value in expected.items():
            found = ours["results"][name][key]
            assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (name, key)


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        pytest.param(["arc_challenge"], {}, marks=pytest.mark.slow),
        (["arc_challenge"], {"num_fewshot": 2}),
        (["lambada_openai"], {}),
        (["wikitext"], {}),
        (["gsm8k"], {"num_fewshot": 2}),
        pytest.param(["triviaqa"], {}, marks=pytest.mark.slow),
        pytest.param(["wmdp"], {}, marks=pytest.mark.slow),
        (["arc_challenge", "triviaqa"], {"chat": True, "num_fewshot": 1, "system_instruction": "Be brief."}),
    ],
    ids=["choices", "few-shot", "log-likelihood", "rolling", "generate", "several answers", "group", "chat"],
)  # fmt: skip
def test_answers_equal_those_of_the_harness_s_own_hf_model(folder, tmp_path, names, asked):
    data = write_examples(tmp_path / "data")
    if "triviaqa" in names and "num_fewshot" in asked:
        shutil.copy(data / "triviaqa_validation.jsonl", data / "triviaqa_train.jsonl")
    ours, theirs = models_of(folder)
    assert_equal(answers(ours, names, data, **asked), answers(theirs, names, data, **asked))


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_a_first_token_may_be_chosen(folder, tmp_path, add_bos_token):
    """Also of a chat that begins with it already, and of a text that spells it."""
    names = ["arc_challenge", "wikitext", "lambada_openai"]
    data = write_examples(tmp_path / "data")
    ours, theirs = models_of(folder, add_bos_token)
    assert_equal(answers(ours, names, data), answers(theirs, names, data))
    for text in ("a", "<s>a", "", "<|endoftext|> b <s>"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


@pytest.fixture
def sentence_splitter(tmp_path, monkeypatch):
    """Empty tables for the sentence splitter of NLTK, whose own are on the network."""
    import nltk

    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


@pytest.mark.slow
def test_instructions_are_followed_as_far_as_by_the_hf_model(sentence_splitter, tmp_path):
    """`ifeval` with a chat template, from local files."""
    for package in ("langdetect", "immutabledict"):
        pytest.importorskip(package)
    folder = write_folder(tmp_path / "model", "bos", window=1536)
    data = write_examples(tmp_path / "data", "ifeval_train")
    ours, theirs = (answers(model, ["ifeval"], data, chat=True) for model in models_of(folder))
    assert_equal(ours, theirs)
    found = [sample["inst_level_strict_acc"] for sample in ours["samples"]["ifeval"]]
    assert found == [[True, True], [False, False], [True, False]]
    assert ours["results"]["ifeval"]["inst_level_strict_acc,none"] == 3 / 6
    assert ours["results"]["ifeval"]["prompt_level_strict_acc,none"] == 1 / 3


def test_pairs_and_windows_equal_those_of_the_hf_model(folder):
    """Empty contexts, spaces at the end of one, windows of every length around the context's."""
    from lm_eval.api.instance import Instance

    ours, theirs = models_of(folder)
    pairs = [("", "abc"), ("", " abc"), ("a ", "b"), ("a\n\n", " b"), ("x" * 2 * WINDOW, " end")]
    pairs += [("x" * (WINDOW + n), "yz") for n in (-3, -2, -1, 0, 1)] + [("x", "y" * (WINDOW - 1))]
    requests = [Instance("loglikelihood", {}, pair, n, ("task", n, 1)) for n, pair in enumerate(pairs)]
    for found, expected in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert found == (pytest.approx(expected[0], rel=2e-6), expected[1])
    texts = ["", "a", *("xy" * (WINDOW // 2 * n) + "z" * m for n in (1, 2, 3) for m in (0, 1, 2))]
    requests = [Instance("loglikelihood_rolling", {}, (text,), n, ("task", n, 1)) for n, text in enumerate(texts)]
    found = ours.loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests), rel=2e-6)


def test_greedy_answers_are_recognized():
    """A continuation that the model itself would write is greedy, with any other token it is not."""
    from lm_eval.api.instance import Instance

    config, model = make_model()
    ours = ours_of(model, Letters())
    prompt = [5, 9, 7]
    written = list(generate(model, prompt, max_tokens=4, temperature=0.0))
    other = [*written[:-1], (written[-1] + 1) % config.vocab_size]
    requests = [
        Instance("loglikelihood", {}, (Letters.text(prompt), Letters.text(tokens)), n, ("task", n, 1))
        for n, tokens in enumerate((written, other))
    ]
    assert [is_greedy for _, is_greedy in ours.loglikelihood(requests)] == [True, False]


class Letters:
    """A tokenizer of one character for each token."""

    eos_token_id, bos_token_id, bos_token = 319, None, None

    @staticmethod
    def text(tokens):
        return "".join(chr(0x4E00 + token) for token in tokens)

    def encode(self, text, add_special_tokens=True):
        return [ord(character) - 0x4E00 for character in text]

    def decode(self, tokens, skip_special_tokens=False):
        return self.text([tokens] if isinstance(tokens, int) else tokens)

    def batch_decode(self, rows):
        return [self.text(row) for row in rows.tolist()]


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("task", 6, 1))


def test_what_cannot_be_asked_is_one_clear_error():
    model = make_model()[1]
    ours = ours_of(model, Letters())
    with pytest.raises(DataError, match="task, example 7: the continuation '' has no token"):
        ours.loglikelihood([instance("loglikelihood", Letters.text([1]), "")])
    with pytest.raises(DataError, match=rf"task, example 7: may generate {WINDOW} tokens, .*context of {WINDOW}"):
        ours.generate_until([instance("generate_until", Letters.text([1]), {"until": [], "max_gen_toks": WINDOW})])
    with pytest.raises(DataError, match="generates with num_beams, which is not supported"):
        ours.generate_until([instance("generate_until", Letters.text([1]), {"until": [], "num_beams": 2})])
    broken = ours_of(model, Letters(), nll=lambda tokens, labels: (labels * torch.nan, labels * 0.0))
    with pytest.raises(NotFiniteError, match="task, example 7: the log-likelihood is nan"):
        broken.loglikelihood([instance("loglikelihood", Letters.text([1]), Letters.text([2]))])


def test_a_single_beam_is_greedy():
    ours = ours_of(make_model()[1], Letters())
    asked = {"until": ["\n"], "max_gen_toks": 2}
    request = instance("generate_until", Letters.text([1]), asked)
    with_a_beam = instance("generate_until", Letters.text([1]), asked | {"num_beams": 1, "do_sample": False})
    assert ours._prompt_of(with_a_beam) == ours._prompt_of(request)


def test_samples_are_drawn_from_a_seed_of_their_own_and_within_top_p():
    ours = ours_of(make_model()[1], Letters())
    given = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = [instance("generate_until", Letters.text([1, 2]), given) for _ in range(4)]
    found = ours.generate_until(requests)
    assert len(set(found)) == 4
    assert ours.generate_until(requests) == found
    greedy = ours.generate_until([instance("generate_until", Letters.text([1, 2]), {"until": [], "max_gen_toks": 8})])
    sure = ours.generate_until([instance("generate_until", Letters.text([1, 2]), given | {"top_p": 1e-6})])
    assert sure == greedy
