"""Tokenizers of all kinds give text back, count its bytes, and encode as their own library does."""

import json
import re
from contextlib import nullcontext

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import SPECIAL, TEXTS
from tokenizer_zoo import LOSSLESS, LOSSY, MARK, byte_level, sentencepiece_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data import tokenizer_kinds
from data.config import PrepareConfig
from data.errors import DataError
from data.shards import prepare
from data.tokenizer import load_tokenizer
from data.torchvision_repair import repair_torchvision

CORPUS = "".join(TEXTS[:8])
PIECES = st.builds(lambda at, size: CORPUS[at : at + size], st.integers(0, len(CORPUS) - 1), st.integers(1, 80))
ANY = st.text() | st.text(alphabet=" \t\n\rab1<>/s\u2581é😀e\u0301ﬁ") | PIECES
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat"]), min_size=1, max_size=9).map(" ".join)

UNKNOWN = 0


def with_examples(test):
    for text in [*SPECIAL, "a</s>", "<|endoftext|>", "<eos>", "  \u2581a", "\u2581\u2581", "Ab ﬁ e\u0301"]:
        test = example(text=text)(test)
    return test


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Each tokenizer as we load it, with its library as the oracle, when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("zoo"), {}

    def of(name):
        if name not in made:
            oracle = (LOSSLESS | LOSSY)[name](folder / name)
            made[name] = load_tokenizer(folder / name), oracle
        return made[name]

    return of


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"the": 0, "cat": 1}, unk_token="<unk>"),
        models.WordPiece({"the": 0, "cat": 1}, unk_token="<unk>"),
        models.BPE({piece: token for token, piece in enumerate("thecat")}, [], unk_token="<unk>"),
    ],
)
def test_an_unknown_token_that_the_vocabulary_lacks(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    text = loaded.encode("the cat")
    assert loaded.encode_batch(["cat", "the cat"]) == [loaded.encode("cat"), text]
    assert loaded.token_bytes()[text].all()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot encode a text .*the token that its unk_token names"):
        loaded.encode("the dog")
    (tmp_path / "text.jsonl").write_text('{"text": "the dog"}\n')
    config = PrepareConfig(
        inputs=(str(tmp_path / "text.jsonl"),), tokenizer=str(tmp_path / "tokenizer.json"), lossy_tokenizer=True
    )
    with pytest.raises(DataError, match="cannot encode a text"):
        prepare(config, 4, tmp_path / "out")


def gaps(definition):
    vocabulary = definition["model"]["vocab"]
    vocabulary |= {name: 2 * token for name, token in vocabulary.items()}
    definition["added_tokens"][-1]["id"] *= 2


def cut_off(definition):
    kept = {name: token for name, token in definition["model"]["vocab"].items() if token < 500}
    merges = [pair for pair in definition["model"]["merges"] if {*pair, "".join(pair)} <= {*kept}]
    definition["model"] |= {"vocab": kept, "merges": merges}


def two_names(definition):
    definition["added_tokens"].append(definition["added_tokens"][-1] | {"content": "<extra>", "id": 400})


def two_ids(definition):
    name = next(name for name, token in definition["model"]["vocab"].items() if token == 400)
    definition["added_tokens"].append(definition["added_tokens"][-1] | {"content": name, "id": 701})


def end_is_taken(definition):
    definition["model"]["vocab"]["the"] = definition["added_tokens"][-1]["id"]


@pytest.mark.parametrize("change", [gaps, cut_off, two_names, two_ids, end_is_taken])
def test_ids_that_the_library_does_not_give_are_refused(tmp_path, change):
    LOSSLESS["gpt2.json"](tmp_path / "tokenizer.json")
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    change(definition)
    said = {token["content"]: token["id"] for token in definition["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    (name,) = [name for name, token in said.items() if library.token_to_id(name) != token]
    message = (
        f"says that {name!r} is token {said[name]}, but to the `tokenizers` library it is {library.token_to_id(name)}"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_a_library_that_panics_is_an_error(tmp_path):
    oracle = byte_level(tmp_path / "tokenizer.json", "<|endoftext|>", normalizer=normalizers.Prepend("x"))
    assert load_tokenizer(tmp_path).encode("a cat") == oracle.encode("a cat")  # which panics only without the prefix
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["normalizer"]["prepend"] = ""
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot encode a text \(index out of bounds"):
        load_tokenizer(tmp_path).encode(" a")


def counted(tokenizer, ids):
    return int(tokenizer.token_bytes()[[*ids, tokenizer.end_of_document]].sum())


@pytest.mark.parametrize("name", LOSSLESS)
@with_examples
@given(text=ANY)
@settings(max_examples=40, deadline=None)
def test_any_text_is_given_back_whole_and_in_parts(zoo, name, text):
    tokenizer, oracle = zoo(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]
    if text:
        assert counted(tokenizer, ids) == len(text.encode())
    expected = oracle.encode(text)
    if MARK not in text and oracle.decode(expected) == text and (name, text[:1]) != ("gpt2-prefix.json", " "):
        assert ids == expected  # there the library encodes " a" and "a" alike, and gives back only one of them
    original = tokenizer_kinds.SEGMENT_CHARS
    try:
        tokenizer_kinds.SEGMENT_CHARS = 5
        in_parts = tokenizer.encode(text)
    finally:
        tokenizer_kinds.SEGMENT_CHARS = original
    assert tokenizer.decode(in_parts) == text
    if text:
        assert counted(tokenizer, in_parts) == len(text.encode())


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_tokens_of_a_padded_model_have_no_text(zoo, name):
    tokenizer = zoo(name)[0]
    ids, beyond = tokenizer.encode("the cat sat"), tokenizer.vocab_size + 3
    text = tokenizer.decode(ids)
    assert tokenizer.decode([beyond]) == ""
    assert tokenizer.decode([beyond, *ids]) == tokenizer.decode([*ids, beyond]) == text


@pytest.mark.parametrize("name", LOSSY)
@with_examples
@given(text=ANY | WORDS)
@settings(max_examples=40, deadline=None)
def test_a_lossy_tokenizer_encodes_as_its_library_and_counts_what_it_gives_back(zoo, name, text):
    tokenizer, oracle = zoo(name)
    ids, expected = tokenizer.encode(text), oracle.encode(text)
    if oracle.decode(expected) == text and MARK not in text:
        assert ids == expected
        assert tokenizer.decode(ids) == text
    if text and tokenizer.decode(ids) == text and UNKNOWN not in ids:
        assert counted(tokenizer, ids) == len(text.encode())


@pytest.mark.parametrize("name", [name for name in LOSSY if name != "suffix.model"])
def test_a_lossy_tokenizer_gives_plain_words_back(zoo, name):
    tokenizer, oracle = zoo(name)
    text = "the cat sat on the mat"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == oracle.decode(ids)
    assert counted(tokenizer, ids) == len(text)
    assert ids == oracle.encode(text)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<|im_end|>": 320}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": {"content": "<|im_end|>"}}}),
    ],
)
def test_a_sentencepiece_model_without_tokens_that_are_added_to_it_is_refused(tmp_path, name, content):
    sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content).replace("320", "100000"))
    lacks = r"lacks tokens that files beside it add, such as '<\|im_end\|>'; save the tokenizer as tokenizer\.json"
    with pytest.raises(DataError, match=lacks):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("legacy", [None, True, False])
def test_special_tokens_are_followed_by_what_transformers_puts_there(tmp_path, legacy):
    """`legacy` classes of Llama, which most published chat models name, begin each part as a text of its own."""
    repair_torchvision()
    from transformers import AutoTokenizer

    sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    theirs, ours = AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    for text in ("<s>the cat</s>sat on</s> the mat", "the</s>", "</s></s>a"):
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_special(text) == expected
        ids, spans = ours.encode_special_spans(text)
        assert ids == expected
        assert spans == sorted(spans)
        assert {place for span in spans for place in range(*span)} == set(range(len(text)))


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_a_definition_without_tokens_that_are_added_to_it_is_refused(tmp_path, file):
    byte_level(tmp_path / "tokenizer.json", "<|endoftext|>")
    size = load_tokenizer(tmp_path).vocab_size
    there = {"<|endoftext|>": load_tokenizer(tmp_path).end_of_document}
    for added, said in ((there, None), (there | {"<|tool|>": size}, r"lacks tokens that .* add, such as '<\|tool\|>'")):
        content = {str(token): {"content": name} for name, token in added.items()}
        told = added if file == "added_tokens.json" else {"added_tokens_decoder": content}
        (tmp_path / file).write_text(json.dumps(told))
        with pytest.raises(DataError, match=said) if said else nullcontext():
            load_tokenizer(tmp_path)
