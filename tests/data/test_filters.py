"""Documents that have come before, and those that share words with evaluation sets, are left out."""

import json
import string
import tracemalloc
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from chat_files import chat, pair, prepare_chats, prepare_pairs
from filtered_texts import WORDS, options_of, write_corpora
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import LENGTH, run_killed
from many_parts import SMALL, contents

from data import decontamination, readers, seen, shards
from data.config import PrepareConfig
from data.decontamination import Example, NGrams, ngrams_of, read_ngrams
from data.errors import DataError
from data.prepared import open_prepared
from data.seen import Seen
from data.shards import prepare


def plain_words(text: str) -> list[str]:
    """The definition, for texts in ASCII: lower case, no punctuation, divided at spaces."""
    return "".join(char for char in text.lower() if char not in string.punctuation).split()


def plain_ngrams(text: str) -> set[tuple[str, ...]]:
    words = plain_words(text)
    return {tuple(words[place : place + 13]) for place in range(len(words) - 12)}


# Words in a row


TEXTS = st.lists(
    st.sampled_from(["a", "B", "don't", "c-d", "cd", "--", "e,", '"F"', " ", "\n", "\t "]), min_size=0, max_size=40
).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=4), TEXTS, st.data())
def test_a_text_is_contaminated_if_it_shares_13_words_in_a_row(examples, text, data):
    sets = {f"set {number}": [Example(texts)] for number, texts in enumerate(examples)}
    known = {
        name: set().union(
            *(plain_ngrams(" ".join(some)) for num in (1, 2) for some in permutations(example.texts, num))
        )
        | plain_ngrams(" ".join(example.texts))
        for name, [example] in sets.items()
    }
    with_ngrams = {name: sets[name] for name in sets if known[name]}
    if not with_ngrams:
        with pytest.raises(DataError, match="none of its 1 examples has 13 words in a row of its own"):
            ngrams_of(sets)
        return
    if data.draw(st.booleans()):  # else almost none is
        source = " ".join(data.draw(st.sampled_from([example.texts for [example] in with_ngrams.values()])))
        text = f"{text} {source[: data.draw(st.integers(0, len(source)))]}"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    blocks = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shared = {name for name, ngrams in known.items() if ngrams & plain_ngrams(text)}
    ngrams = ngrams_of(with_ngrams)
    number = ngrams.set_of(blocks)
    assert (number > 0) == bool(shared)
    assert number == ngrams.set_of([text])
    assert not number or ngrams.names[number - 1] in shared


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("ANT, bee; cat. dog! elk? fox: gnu (hen) [ibis] \u201cjay\u201d \u2014 kiwi \u2019lynx\u2019 mole", True),
        ("\u3000".join(WORDS[:13]), True),
        (" ".join(WORDS[:12]), False),
        (" ".join([*WORDS[:12], "x", WORDS[12]]), False),
        ("x " * 100_000 + " ".join(WORDS[:13]), True),
        ("", False),
    ],
)
def test_punctuation_case_and_kinds_of_spaces_do_not_matter(text, is_found):
    assert ngrams_of({"zoo": [Example([" ".join(WORDS[:13])])]}).set_of([text]) == is_found


def test_texts_of_an_example_are_found_beside_each_other_and_as_they_are_asked():
    question, prompt = " ".join(WORDS[:11]), f"Question: {' '.join(WORDS[:11])}? Answer: one answer"
    ngrams = ngrams_of({"quiz": [Example(["one answer", "other answer", question], [prompt])]})
    for text in (f"{question} one answer", f"{question} other answer", f"one answer: {question}", prompt):
        assert ngrams.set_of([text])
    assert not ngrams.set_of([f"{question} or other answer"])
    assert ngrams.short_examples == (0,)
    many = ngrams_of({"quiz": [Example([question, *(f"answer {number}" for number in range(20))])]})
    assert many.set_of([f"{question} answer 0"])
    assert not many.set_of([f"{question} answer 19"])


def test_the_wording_of_a_task_is_ignored_and_a_passage_of_several_questions_is_not():
    wording = "Answer the following question about animals with exactly one of the four letters A B C D"
    passage = " ".join(WORDS)
    texts = [f"{wording} {number}" for number in range(300)] + [f"{passage} {number}" for number in range(14)]
    examples = [Example([text]) for text in texts]
    ngrams = ngrams_of({"letters": examples})
    assert not ngrams.set_of([wording])
    assert ngrams.set_of([passage])  # of 14 of 314 examples
    assert ngrams_of({"few": [Example([f"{wording} {number}"]) for number in range(10)]}).set_of([wording])
    assert ngrams.examples == (314,)
    zoo = [Example([passage]), Example(["too short"]), Example(["short", passage]), Example(["short"], [passage])]
    assert ngrams_of({"zoo": zoo}).short_examples == (2,)  # the prompt is one of a task
    own = [Example([f"animal {number}"], [f"{wording} animal {number}"]) for number in range(300)]
    assert ngrams_of({"zoo": [Example([passage]), *own]}).short_examples == (300,)


def test_a_file_of_ngrams_is_read_again(tmp_path):
    ngrams = ngrams_of(
        {"a": [Example([" ".join(WORDS[:15])])], "b": [Example([" ".join(WORDS[3:20])]), Example(["x"])]}
    )
    ngrams.save(tmp_path / "evaluation.npz")
    again = NGrams.load(tmp_path / "evaluation.npz")
    assert (again.names, again.examples, again.short_examples) == (("a", "b"), (1, 2), (0, 1))
    assert again.fingerprint == ngrams.fingerprint
    assert again.set_of([" ".join(WORDS[:14])]) == 1
    assert again.set_of([" ".join(WORDS[5:20])]) == 2


def test_a_word_of_any_length_in_a_file_needs_a_bounded_memory(monkeypatch):
    longest = 0

    def words(text, original=decontamination._words):
        nonlocal longest
        longest = max(longest, len(text))
        return original(text)

    ngrams = ngrams_of({"zoo": [Example([" ".join(WORDS[:13])])]})
    monkeypatch.setattr(decontamination, "_words", words)
    assert ngrams.set_of([*["x" * 5000] * 100, " ", *map("{} ".format, WORDS)])
    assert longest < 10_000


# Digests


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=20), st.integers(1, 9))
def test_digests_are_new_once(tmp_path_factory, batches, latest):
    path = tmp_path_factory.mktemp("seen") / "seen"
    before, known = seen.LATEST, set()
    seen.LATEST = latest
    try:
        found = Seen(path)
        for number, batch in enumerate(batches):
            if number % 5 == 4:
                state = found.state()
                assert state["bytes"] == path.stat().st_size == 16 * len(known)
                found = Seen(path)
            digests = np.array([bytes([value, 0, value] + [0] * 13) for value in batch], seen.DIGEST)
            new = [value not in known and value not in batch[:place] for place, value in enumerate(batch)]
            assert found.add(digests).tolist() == new
            known.update(batch)
            sizes = [len(each) for each in found._sorted]
            assert all(first >= 2 * second for first, second in pairwise(sizes))
    finally:
        seen.LATEST = before


def test_digests_need_few_bytes_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(seen, "LATEST", 1 << 10)
    count, digests = 100_000, np.random.default_rng(0)
    found = Seen(tmp_path / "seen")
    tracemalloc.start()
    try:
        for _ in range(count // 5_000):
            assert found.add(np.frombuffer(digests.bytes(16 * 5_000), seen.DIGEST)).all()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    latest = 150 * seen.LATEST
    assert held < 16 * count + latest
    assert peak < 64 * count + latest


# Prepared folders


def brute_force(tmp_path: Path, files: dict[str, list[str]], names: list[str], *, duplicates: bool, evaluation: bool):
    """The texts that stay of some files, and documents and bytes that are left out, by file and reason."""
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    examples = [f"{line['question']} {' '.join(line['choices'])}" for line in map(json.loads, lines)]
    known = set().union(*map(plain_ngrams, examples)) if evaluation else set()
    before: set[str] = set()
    stay, left_out = {}, {"duplicates": {}, "evaluation": {}}
    for name in names:
        for text in files[name]:
            is_known = known & plain_ngrams(text)
            reason = "duplicates" if duplicates and text in before else "evaluation" if is_known else None
            before.add(text)
            if reason is None:
                stay.setdefault(name, []).append(text)
                continue
            counts = left_out[reason].setdefault(name, {"documents": 0, "bytes": 0})
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
    return stay, left_out


def texts_of(split: Path) -> list[str]:
    return [document.text for document in readers.read_documents([str(split)])]


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(readers, "WHOLE_BYTES", 1000)
    return write_corpora(tmp_path)


NAMES = ["in/a.jsonl", "in/b.jsonl", "in/c.txt", "in/d.txt", "in/e.txt", "more.jsonl", "held.jsonl"]


def summed(by_file: dict[str, dict[str, int]], tmp_path: Path) -> dict[str, dict[str, int]]:
    """The counts of inputs, from those of files."""
    found: dict[str, dict[str, int]] = {}
    for name, counts in by_file.items():
        sums = found.setdefault(str(tmp_path / (name if "/" not in name else "in")), {"documents": 0, "bytes": 0})
        for key in sums:
            sums[key] += counts[key]
    return found


@pytest.mark.parametrize(("duplicates", "evaluation"), [(True, True), (True, False), (False, True)])
def test_what_is_left_out_is_what_a_plain_search_finds(corpora, tmp_path, duplicates, evaluation):
    sets = (str(tmp_path / "test.jsonl"),) if evaluation else ()
    config = PrepareConfig(**options_of(tmp_path, deduplicate=duplicates, decontaminate=sets))
    manifest = prepare(config, LENGTH, tmp_path / "out")
    stay, left_out = brute_force(tmp_path, corpora, NAMES, duplicates=duplicates, evaluation=evaluation)
    assert sum(map(len, left_out.values())) > 4
    for split, names in (("train", NAMES[:-1]), ("validation", NAMES[-1:])):
        texts = [text for name in names for text in stay.get(name, [])]
        assert manifest["splits"][split]["documents"] == len(texts)
        assert texts_of(tmp_path / "out" / split)[:-1] == texts[: len(texts_of(tmp_path / "out" / split)) - 1]
    files = json.loads((tmp_path / "out" / "files.json").read_text())["filters"]
    for reason, is_on in (("duplicates", duplicates), ("evaluation", evaluation)):
        assert (reason in manifest["filters"]) == is_on
        if is_on:
            found = manifest["filters"][reason]
            assert found["inputs"] == summed(left_out[reason], tmp_path)
            assert files[reason] == {str(tmp_path / name): counts for name, counts in left_out[reason].items()}
            for key in ("documents", "bytes"):
                assert found[key] == sum(counts[key] for counts in left_out[reason].values())
    if evaluation:
        (of_set,) = manifest["filters"]["evaluation"]["sets"].values()
        assert of_set["examples"] == 40
        assert of_set["documents"] == manifest["filters"]["evaluation"]["documents"]


@pytest.mark.parametrize("held_out", ["input", "share"])
def test_any_number_of_workers_and_parts_make_the_same_bytes(corpora, tmp_path, held_out):
    options = options_of(tmp_path, deduplicate=True, decontaminate=(str(tmp_path / "test.jsonl"),))
    if held_out == "share":
        options |= {"validation_inputs": (), "validation_fraction": 0.3, "packing": "best-fit"}
    told = []
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "one", told.append)
    manifest = open_prepared(tmp_path / "one")
    left_out = sum(counts["documents"] for counts in manifest["filters"].values())
    assert told[-1].removed_documents == left_out > 20
    workers = 2 if held_out == "input" else 1
    prepare(PrepareConfig(**options, workers=workers), LENGTH, tmp_path / "parts", on="shared-folder")
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    if workers == 2:
        prepare(PrepareConfig(**options, workers=workers), LENGTH, tmp_path / "two")
        assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_preparation_goes_on_with_what_it_has_seen(tmp_path):
    write_corpora(tmp_path)
    options = options_of(tmp_path, deduplicate=True, decontaminate=(str(tmp_path / "test.jsonl"),))
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    assert run_killed(tmp_path, dict(options), tmp_path / "alone", [None]) == [0]
    points = [["record", 3, True, 1], ["record", 5, False, 1]]
    assert run_killed(tmp_path, dict(options), tmp_path / "out", [*points, None]) == [9, 9, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("on", [None, "shared-folder"])
def test_a_preparation_that_is_stopped_goes_on_with_what_it_has_seen(corpora, tmp_path, monkeypatch, on):
    sets = (str(tmp_path / "test.jsonl"),)
    config = PrepareConfig(**options_of(tmp_path, deduplicate=True, decontaminate=sets))
    prepare(config, LENGTH, tmp_path / "alone")
    monkeypatch.setattr(shards, "SECONDS_BETWEEN_RECORDS", 0.0)

    def fail(progress):
        if progress.stage in ("tokens", "merging") and progress.documents > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, LENGTH, tmp_path / "out", fail, on=on)
    told = []
    prepare(config, LENGTH, tmp_path / "out", told.append, on=on)
    assert "going on after" in told[-1].earlier
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_digest_that_was_changed_on_the_disk_is_found(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SECONDS_BETWEEN_RECORDS", 0.0)
    config = PrepareConfig(**options_of(tmp_path, deduplicate=True))

    def fail(progress):
        if progress.documents > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, LENGTH, tmp_path / "out", fail)
    (path,) = tmp_path.glob(".out*/seen")
    path.write_bytes(bytes(16) + path.read_bytes()[16:])
    told = []
    prepare(config, LENGTH, tmp_path / "out", told.append)
    assert told[-1].earlier == "An earlier attempt was stopped, but seen is damaged; starting anew"


def test_a_folder_that_was_filtered_otherwise_is_another(corpora, tmp_path):
    sets = (str(tmp_path / "test.jsonl"),)
    prepare(PrepareConfig(**options_of(tmp_path, deduplicate=True, decontaminate=sets)), LENGTH, tmp_path / "out")
    with pytest.raises(DataError, match=r"was prepared with a different deduplicate \(there True, wanted False\)"):
        prepare(PrepareConfig(**options_of(tmp_path, decontaminate=sets)), LENGTH, tmp_path / "out")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": " ".join(WORDS)}) + "\n")
    with pytest.raises(DataError, match="was prepared with a different decontaminate"):
        prepare(PrepareConfig(**options_of(tmp_path, deduplicate=True, decontaminate=sets)), LENGTH, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file or folder"),
        ("a.txt", "ant " * 20, r"a\.txt: examples are read from \.jsonl .*, not from a\.txt"),
        ("a.jsonl", '{"question": "Which?"}\n', "none of its 1 examples has 13 words in a row of its own"),
        ("a.jsonl", "no JSON\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"number": 3}\n', "contains no examples"),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_is_named(corpora, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    config = PrepareConfig(**options_of(tmp_path, decontaminate=(str(tmp_path / name),)))
    with pytest.raises(DataError, match=message):
        prepare(config, LENGTH, tmp_path / "out")


def test_token_files_cannot_be_filtered(tmp_path):
    (tmp_path / "m.idx").write_bytes(b"")
    config = PrepareConfig(inputs=(str(tmp_path / "m.idx"),), tokenizer="bpe:340", deduplicate=True)
    with pytest.raises(DataError, match=r"m\.idx: is tokens, and filters read text; prepare token files without"):
        prepare(config, LENGTH, tmp_path / "out")


def test_if_nothing_stays_the_filters_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": " ".join(WORDS)}) + "\n") * 3)
    config = PrepareConfig(
        inputs=(str(tmp_path / "a.jsonl"),), tokenizer="bpe:290", decontaminate=(str(tmp_path / "a.jsonl"),)
    )
    with pytest.raises(DataError, match=r"the train split has 0 documents .* 3 documents were left out by filters"):
        prepare(config, LENGTH, tmp_path / "out")


def test_columns_of_parquet_files_of_any_name_are_examples(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"id": [1], "question": [" ".join(WORDS[:8])], "options": [[" ".join(WORDS[8:]), "none"]]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    of_map = pyarrow.array([[("question", " ".join(WORDS))]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(pyarrow.table({"note": ["short"], "parts": of_map}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        assert read_ngrams([str(tmp_path / name)]).set_of([" ".join(WORDS[2:16])]) == 1


def test_a_worker_elsewhere_needs_no_evaluation_set(corpora, tmp_path):
    """Examples of tasks are rendered where the command runs; workers of a cluster get their n-grams."""
    options = options_of(tmp_path, deduplicate=True)
    known = PrepareConfig(**options, decontaminate=(str(tmp_path / "test.jsonl"),))
    prepare(known, LENGTH, tmp_path / "alone")
    ngrams = read_ngrams(known.decontaminate)
    named = PrepareConfig(**options, decontaminate=("a task",))
    parts = shards.shared_parts(named, LENGTH, tmp_path / "out", ngrams)
    for number in parts.missing:
        shards.tokenize_part(named, LENGTH, tmp_path / "out", parts.plan_id, number)
    prepare(named, LENGTH, tmp_path / "out", on="shared-folder", ngrams=ngrams)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("content", ["chats", "pairs"])
def test_chats_and_pairs_are_filtered_by_what_they_say(tmp_path, content):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}) + "\n")
    record, write = (chat, prepare_chats) if content == "chats" else (pair, prepare_pairs)
    questions = [f"number {number}" for number in range(20)]
    questions += ["number 3", f"It says:\n\u00e9 {' '.join(WORDS[:13]).upper()}", "number 3", " ".join(WORDS[:12])]
    records = [record(question, "Yes.", "No.") for question in questions]
    sets = (str(tmp_path / "test.jsonl"),)
    out = write(tmp_path, 300, *records, deduplicate=True, decontaminate=sets)
    manifest = open_prepared(out)
    assert manifest["splits"]["train"]["documents"] == 21
    assert [manifest["filters"][name]["documents"] for name in ("duplicates", "evaluation")] == [2, 1]
    plain = write(tmp_path, 300, *records[:20], records[-1], out="plain")
    assert contents(out / "train") == contents(plain / "train")
