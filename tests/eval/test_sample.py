"""Choosing tokens, ending a text, and text that comes in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, build, random_tokens

from data.tokenizer import load_tokenizer, train_tokenizer
from eval.sample import choose, generate, pieces_of_text, sample_tokens

CHARACTERS = "abc def\u00e9\u20ac\U0001f600\u4e2d\n\ufffd"


def chosen(logits, temperature=1.0, top_p=1.0, times=400):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits))
    for _ in range(times):
        counts[choose(torch.tensor(logits), temperature, top_p, generator)] += 1
    return counts / times


def test_tokens_are_chosen_by_their_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3]).log().tolist()
    torch.testing.assert_close(chosen(logits), torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.06)
    halved = torch.tensor([0.1, 0.6, 0.3]) ** 2 / 0.46  # temperature 1/2
    torch.testing.assert_close(chosen(logits, temperature=0.5), halved, rtol=0, atol=0.06)
    assert chosen(logits, temperature=0)[1] == 1


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {1}), (0.55, {1}), (0.65, {1, 2}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2})]
)
def test_the_nucleus_holds_the_likeliest_tokens(top_p, kept):
    counts = chosen(torch.tensor([0.1, 0.6, 0.3]).log().tolist(), top_p=top_p)
    assert set(counts.nonzero().flatten().tolist()) == kept


def test_a_seed_gives_the_same_text_and_another_one_another():
    model, prompt = build(TINY), random_tokens(3).tolist()
    first, again, other = (list(generate(model, prompt, max_tokens=20, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_it_ends_before_the_end_token_or_where_the_context_is_full():
    model, prompt = build(TINY), random_tokens(3).tolist()
    tokens = list(generate(model, prompt, max_tokens=100, seed=2))
    assert len(tokens) == TINY.max_sequence_length - 3
    end = tokens[5]
    assert list(generate(model, prompt, max_tokens=100, seed=2, end_tokens=[end])) == tokens[: tokens.index(end)]
    with pytest.raises(ValueError, match="the prompt has 32 tokens, but the model's context is 32"):
        generate(model, random_tokens(32).tolist(), max_tokens=1)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}; must be a number of 64 bits"):
        generate(build(TINY), [1], seed=seed)
    assert list(generate(build(TINY), [1], max_tokens=2, seed=2**64 - 1))


@pytest.mark.parametrize("choice", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}])
def test_a_choice_that_is_none_is_refused(choice):
    with pytest.raises(ValueError, match="they must be 1 or more, 0 or more"):
        generate(build(TINY), [1], **choice)


def test_the_live_model_writes_the_same_without_a_cache():
    """In windows of one shape, and in as many passes as there are tokens, whatever they are."""
    model, prompt = build(TINY).double(), random_tokens(3).tolist()
    shapes = []

    def logits_of(tokens_BT):
        shapes.append(tuple(tokens_BT.shape))
        return model(tokens_BT).logits

    expected = list(generate(model, prompt, max_tokens=12, seed=3))
    end = expected[7]
    written = sample_tokens(logits_of, prompt, num_tokens=12, window_tokens=20, end_tokens={end}, seed=3)
    assert written == expected[: expected.index(end)]
    assert shapes == [(1, 20)] * 12


@pytest.fixture(scope="module", params=["sentencepiece", "byte-fallback", "byte-level"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        train_tokenizer(["the cat sat on the mat " * 20], "bpe:280", path / "tokenizer.model")
        return load_tokenizer(path / "tokenizer.model")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if request.param == "byte-level":
        vocabulary = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
    else:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *"abcdefgh"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        model.decoder = decoders.Sequence(steps)
    model.add_special_tokens([AddedToken("</s>", special=True)])
    model.save(str(path / "tokenizer.json"))
    return load_tokenizer(path / "tokenizer.json")


@settings(max_examples=60)
@given(
    text=st.text(st.sampled_from(CHARACTERS), max_size=12),
    prompt=st.sampled_from(["", "a", "a b"]),
)
def test_pieces_are_the_text_and_end_with_whole_characters(tokenizer, text, prompt):
    prompt_tokens = tokenizer.encode(prompt)
    tokens = tokenizer.encode(prompt + text)
    if tokens[: len(prompt_tokens)] != prompt_tokens:
        return  # merged across the border
    pieces = list(pieces_of_text(tokenizer, tokens[len(prompt_tokens) :], prompt_tokens))
    assert "".join(pieces) == tokenizer.decode(tokens)[len(tokenizer.decode(prompt_tokens)) :]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_it_is_whole(tokenizer):
    arrived = []

    def tokens():
        for token in tokenizer.encode("a\u20acb"):
            arrived.append(token)
            yield token

    seen = [(len(arrived), piece) for piece in pieces_of_text(tokenizer, tokens())]
    euro = next(number for number, piece in seen if "\u20ac" in piece)
    assert [piece for _, piece in seen][-1] == "b"
    assert len(arrived) == euro + 1


def test_bytes_that_are_no_character_are_written_in_the_end(tokenizer):
    euro = tokenizer.encode("a\u20ac")[-3:]
    cut = [*tokenizer.encode("a"), *euro[:2]]
    assert "".join(pieces_of_text(tokenizer, cut)) == tokenizer.decode(cut)
    assert tokenizer.decode(cut).endswith("\ufffd")
