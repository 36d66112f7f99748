"""The exported tokenizer against SentencePiece, text by text."""

import json
import random
import unicodedata

import pytest
from tiny import write_corpus
from tokenizer_zoo import LOSSLESS

from data.errors import DataError
from data.gguf_vocabulary import gguf_vocabulary
from data.sentencepiece_model import CONTROL, read_model
from data.tokenizer import SPACE_MARK, load_tokenizer, train_tokenizer
from data.tokenizer_json import tokenizer_files

NUM_TEXTS = 2000
STRANGE = [
    "", " ", "  ", "\n", "\t\n  x", " leading", "trailing ", "a  b   c    d", "\r\n", "digits 0123456789", "Ünïcödé",
    "日本語のテキスト", "🙂🙃 emoji 👩\u200d👩\u200d👧", "\u00a0nbsp", "x" * 300, " " * 50, "aaaaaaaaaaaaaaaaaaaaaaa",
    "<0x41>", "<unk", "s>", "<s>", "</s>", "<unk>", "a</s>b <s>x</s><unk>",
    f"a{SPACE_MARK}b", SPACE_MARK, f" {SPACE_MARK} ", "\u0000", "\ufeffbom", "e\u0301 combining",
    "def f(x):\n    return x",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents, their parts, and characters at random; some with spaces at their ends, or many of them."""
    corpus = write_corpus(tmp_path_factory.mktemp("texts") / "corpus.jsonl")
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    rng = random.Random(0)
    result = list(STRANGE)
    while len(result) < NUM_TEXTS:
        document = rng.choice(documents)
        start = rng.randrange(len(document))
        text = document[start : start + rng.randint(1, 200)]
        if rng.random() < 0.3:
            text = text.replace(" ", rng.choice(["  ", "\n", " \t ", SPACE_MARK, ", "]))
        if rng.random() < 0.2:
            characters = [chr(rng.randrange(0x20, 0x2FFF)) for _ in range(20)]
            text += "".join(each for each in characters if unicodedata.category(each) != "Cs")
        result.append(text)
    return result, documents


def train_bpe(documents, out, **changes):
    """As `train_tokenizer`, with other settings."""
    import sentencepiece

    settings = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity",
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1, "eos_id": 2,
        "pad_id": -1, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(out.with_suffix("")), **(settings | changes)
    )


def space_of(pieces):
    return next(piece for piece in pieces if piece.piece == SPACE_MARK)


def exported(path, folder):
    folder.mkdir()
    for name, content in tokenizer_files(path, vocab_size=1024, max_sequence_length=64).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", ["ours", "dummy-prefix"])
def test_it_agrees_with_sentencepiece_on_2000_texts(transformers, tmp_path, texts, kind):
    texts, documents = texts
    path = tmp_path / "tokenizer.model"
    if kind == "ours":
        train_tokenizer(documents, "bpe:600", path)
    else:  # the settings of Llama 2's
        train_bpe(documents, path, add_dummy_prefix=True, split_digits=True)
        texts = [text for text in texts if SPACE_MARK not in text]
    theirs = transformers.AutoTokenizer.from_pretrained(exported(path, tmp_path / "hf"))
    ours = load_tokenizer(path)
    assert type(theirs).__name__ == "PreTrainedTokenizerFast"
    encoded = theirs(texts, add_special_tokens=False)["input_ids"]
    differing = [
        text for text, ids, expected in zip(texts, encoded, ours.encode_batch(texts), strict=True) if ids != expected
    ]
    assert not differing
    for text, ids in zip(texts, encoded, strict=True):
        assert theirs.decode(ids) == ours.decode(ids), text
    again = load_tokenizer(tmp_path / "hf" / "tokenizer.json").token_bytes()
    assert again[2:].tolist() == ours.token_bytes()[2:].tolist()  # 0 and 1 are <unk> and <s>, which no text becomes


def test_special_tokens_are_those_of_training(transformers, tmp_path, texts):
    train_tokenizer(texts[1], "bpe:600", tmp_path / "tokenizer.model")
    folder = exported(tmp_path / "tokenizer.model", tmp_path / "hf")
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer("hello")["input_ids"] == [2, *ours.encode("hello")]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {2}
    assert (tokenizer.unk_token_id, tokenizer.model_max_length) == (0, 64)
    assert tokenizer.decode([2, *ours.encode(" hello")], skip_special_tokens=True) == " hello"
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 2
    # A Hugging Face tokenizer passes through with its ids, and with the same beginning.
    again = exported(folder / "tokenizer.json", tmp_path / "again")
    assert not (again / "tokenizer.model").exists()
    assert transformers.AutoTokenizer.from_pretrained(again)(texts[0])["input_ids"] == tokenizer(texts[0])["input_ids"]


def test_names_of_special_tokens_are_text_to_the_library_too(tmp_path, texts):
    import tokenizers

    train_tokenizer(texts[1], "bpe:600", tmp_path / "tokenizer.model")
    folder, ours = exported(tmp_path / "tokenizer.model", tmp_path / "hf"), load_tokenizer(tmp_path / "tokenizer.model")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("<s>", "<unk>", "a <s>b<unk>"):
        assert library.encode(text).ids == [2, *ours.encode(text)]
    assert library.encode("</s>").ids == [2, 2]  # as documented: it alone is special where no program asks otherwise
    library.encode_special_tokens = True
    assert library.encode("</s>").ids == [2, *ours.encode("</s>")]


@pytest.mark.parametrize("name", ["gpt2.json", "llama3.json", "gemma.json", "mistral.json"])
def test_a_tokenizer_of_the_library_passes_through_exactly(transformers, tmp_path, texts, name):
    LOSSLESS[name](tmp_path / name)
    definition = json.loads((tmp_path / name).read_text())
    definition["model"]["dropout"] = 0.5
    (tmp_path / name).write_text(json.dumps(definition))
    ours = load_tokenizer(tmp_path / name)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path / name, tmp_path / "hf"))
    spelled = ["a <unk> b", f"x{ours.name_of(ours.end_of_document)}y", "<s>"]
    prefixed = name == "mistral.json"  # leaves its space out in front of a space, which then is lost
    chosen = [text for text in texts[0][:300] if SPACE_MARK not in text and text and not (prefixed and text[0] == " ")]
    for text in [*chosen, *spelled]:
        assert theirs(text)["input_ids"] == [ours.end_of_document, *ours.encode(text)], text


def test_the_end_of_documents_that_was_chosen_is_exported(transformers, tmp_path, texts):
    train_bpe(texts[1], tmp_path / "tokenizer.model", control_symbols=["<doc>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<doc>"}))
    folder = exported(tmp_path / "tokenizer.model", tmp_path / "hf")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        assert load_tokenizer(tmp_path / name).end_of_document == 3
    assert transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 3


def test_what_is_not_exact_is_refused(tmp_path, texts):
    documents, path = texts[1], tmp_path / "tokenizer.model"
    train_tokenizer(documents, "unigram:380", path)
    with pytest.raises(DataError, match=r"is a unigram model.*--no-tokenizer"):
        tokenizer_files(path, vocab_size=1024, max_sequence_length=64)
    for changes, message in (
        ({"byte_fallback": False, "vocab_size": 200}, "no pieces for the 256 bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes texts .normalization nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "changes texts"),
        ({"user_defined_symbols": ["<sep>"]}, r"pieces of kinds \[4\]"),
        ({"treat_whitespace_as_suffix": True}, "treats spaces in its own way"),
    ):
        train_bpe(documents, path, **changes)
        with pytest.raises(DataError, match=message):
            tokenizer_files(path, vocab_size=1024, max_sequence_length=64)
    for change, message in (
        (lambda pieces: setattr(pieces[400], "score", float("nan")), "the order of merges is not known"),
        (lambda pieces: setattr(pieces[400], "score", pieces[401].score), "the order of merges is not known"),
        (lambda pieces: setattr(pieces[400], "piece", "a b"), f"a space that is not written {SPACE_MARK}"),
        (lambda pieces: setattr(space_of(pieces), "type", CONTROL), "no piece for a space, so that it loses spaces"),
        (lambda pieces: setattr(space_of(pieces), "piece", "\u0b95"), "no piece for a space, so that it loses spaces"),
    ):
        train_bpe(documents, path)
        model = read_model(path)
        change(model.pieces)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(DataError, match=message):
            tokenizer_files(path, vocab_size=1024, max_sequence_length=64)
        with pytest.raises(DataError, match=message):
            gguf_vocabulary(path, 1024)
    train_tokenizer(documents, "bpe:600", path)
    with pytest.raises(DataError, match="has 600 tokens, but the model has only 500"):
        tokenizer_files(path, vocab_size=500, max_sequence_length=64)
