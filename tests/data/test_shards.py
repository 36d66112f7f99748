"""`prepare`: every token is predicted once, the options alone decide the result, and nothing is left half done."""

import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_corpus

from data import encoding, tokenizer_kinds, tokenizer_training
from data.documents import Document
from data.errors import DataError
from data.prepared import open_prepared
from data.quickstart_corpus import read_standard_library
from data.shards import PrepareConfig, PrepareProgress, prepare
from data.survey import survey, without_held_out
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data.tokenizer_training import sample_texts
from data.torchvision_repair import repair_torchvision

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = [text for name, text in read_standard_library() if name.startswith(("json/", "email/", "asyncio/"))]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer_path(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer([json.loads(line)["text"] for line in corpus.read_text().splitlines()], "bpe:500", path)
    return path


def read_rows(folder: Path) -> np.ndarray:
    repair_torchvision()
    from streaming.base.format import reader_from_json

    index = json.loads((folder / "index.json").read_text())
    readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
    return np.stack([reader[row]["tokens"] for reader in readers for row in range(reader.size)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_token_of_every_document_is_predicted_once(corpus, tokenizer_path, tmp_path):
    config = PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path), validation_fraction=0.3)
    manifest = prepare(config, LENGTH, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text()) == open_prepared(tmp_path / "out")
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = {tuple(tokenizer.encode(text)): len(text.encode()) for text in texts}
    num_documents = 0
    for split, facts in manifest["splits"].items():
        rows = read_rows(tmp_path / "out" / split)
        assert rows.dtype == np.uint16
        assert rows.shape == (facts["rows"], LENGTH + 1)
        assert np.array_equal(rows[:-1, -1], rows[1:, 0])
        assert rows[0, 0] == tokenizer.end_of_document
        predicted = rows[:, 1:].flatten()
        assert len(predicted) + facts["dropped_tokens"] == facts["tokens"]
        assert 0 <= facts["dropped_tokens"] < LENGTH
        ends = np.flatnonzero(predicted == tokenizer.end_of_document)
        documents = [tuple(part[:-1].tolist()) for part in np.split(predicted, ends + 1)[:-1]]
        assert set(documents) <= set(expected)
        assert facts["documents"] - len(documents) in (0, 1)  # the last one may have lost its end
        assert sum(expected[document] for document in documents) <= facts["text_bytes"]
        num_documents += facts["documents"]
    assert num_documents == len(texts)
    assert sum(facts["text_bytes"] for facts in manifest["splits"].values()) == sum(expected.values())
    assert np.array_equal(np.load(tmp_path / "out" / "token_bytes.npy"), tokenizer.token_bytes())


def test_the_result_is_bitwise_the_same_for_any_number_of_workers_and_any_order(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_CHARS", 20_000)
    monkeypatch.setattr(tokenizer_training, "TRAINING_SAMPLE_BYTES", 200_000)
    options = {"tokenizer": "bpe:600", "validation_fraction": 0.2}
    for workers in (1, 3):
        prepare(PrepareConfig(inputs=(str(corpus),), workers=workers, **options), LENGTH, tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")

    lines = corpus.read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    turned = prepare(PrepareConfig(inputs=(str(tmp_path / "turned.jsonl"),), **options), LENGTH, tmp_path / "turned")
    straight = open_prepared(tmp_path / "1")
    assert turned["tokenizer"] == straight["tokenizer"]
    for split, facts in straight["splits"].items():
        assert turned["splits"][split]["text_bytes"] == facts["text_bytes"]
        assert turned["splits"][split]["tokens"] == facts["tokens"]


def test_vocabularies_beyond_16_bits_are_stored_in_32(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(" ".join(["w1 w65535 w65536 w69999"] * 10))
    config = PrepareConfig(inputs=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path))
    prepare(config, 4, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "train")
    assert rows.dtype == np.uint32
    assert rows[0].tolist() == [70_000, 1, 65_535, 65_536, 69_999]


def test_a_prepared_folder_serves_again_only_with_the_same_options(corpus, tokenizer_path, tmp_path):
    config = PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path))
    manifest = prepare(config, LENGTH, tmp_path / "out")
    before = os.stat(tmp_path / "out" / "manifest.json").st_mtime_ns
    copied = tmp_path / "copied.model"
    copied.write_bytes(tokenizer_path.read_bytes())
    same = PrepareConfig(inputs=(str(corpus),), tokenizer=str(copied), workers=4)
    assert prepare(same, LENGTH, tmp_path / "out") == manifest
    spelled = PrepareConfig(inputs=(f"{corpus.parent}/./{corpus.name}/",), tokenizer=str(tokenizer_path))
    assert prepare(spelled, LENGTH, tmp_path / "out") == manifest
    assert os.stat(tmp_path / "out" / "manifest.json").st_mtime_ns == before
    other = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:400", validation_fraction=0.5)
    with pytest.raises(DataError) as caught:
        prepare(other, 64, tmp_path / "out")
    for part in ("tokenizer (there 'sha256:", "wanted 'bpe:400')", "validation_fraction (there 0.0, wanted 0.5)",
                 "sequence_length (there 32, wanted 64)"):  # fmt: skip
        assert part in str(caught.value)
    assert "inputs" not in str(caught.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(DataError, match="mine: exists but is not a folder of prepared data"):
        prepare(config, LENGTH, tmp_path / "mine")


def test_an_empty_folder_may_be_there_already(corpus, tokenizer_path, tmp_path):
    (tmp_path / "out").mkdir()
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path)), LENGTH, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_that_prepare_at_once_take_turns(corpus, tokenizer_path, tmp_path):
    stages: list[PrepareProgress] = []
    config = PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path))
    threads = [
        threading.Thread(target=prepare, args=(config, LENGTH, tmp_path / "out", stages.append), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert stages[-1].documents == open_prepared(tmp_path / "out")["splits"]["train"]["documents"]
    assert [stage.documents for stage in stages] == sorted({stage.documents for stage in stages})  # one of them worked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_of_two_hosts_that_no_lock_reaches_both_find_the_folder(corpus, tokenizer_path, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path))
    manifests = []

    def elsewhere(progress):
        if not manifests:
            with monkeypatch.context() as other:
                other.setattr(socket, "gethostname", lambda: "another")
                manifests.append(prepare(config, LENGTH, tmp_path / "out"))

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    manifests.append(prepare(config, LENGTH, tmp_path / "out", elsewhere))
    assert manifests == [open_prepared(tmp_path / "out")] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


PREPARES_FOR_EVER = """
    import itertools, sys
    from pathlib import Path
    from data import encoding, shards, tokenizer_kinds
    from data.documents import Document

    def endless(inputs, found, start, content):
        for number in itertools.count():
            yield (0, number), Document(f"document {number} " * 100, str(number))

    if __name__ == "__main__":
        encoding.CHUNK_CHARS = 10_000
        shards.placed_documents = endless
        config = shards.PrepareConfig(inputs=("python-stdlib",), tokenizer=sys.argv[1], workers=2)
        shards.prepare(config, 32, Path(sys.argv[2]), lambda progress: print(progress.tokens, flush=True))
"""


def test_a_killed_prepare_leaves_nothing_that_loads_and_no_worker(corpus, tokenizer_path, tmp_path):
    (tmp_path / "endless.py").write_text(textwrap.dedent(PREPARES_FOR_EVER))
    command = [sys.executable, str(tmp_path / "endless.py"), str(tokenizer_path), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        assert int(process.stdout.readline()) > 0
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tritrain-tmp"))
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [child for child in children if Path(f"/proc/{child}/cmdline").exists()]
    assert not [child for child in alive if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    prepare(
        PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path)), LENGTH, tmp_path / "out"
    )  # no lock stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endless.py", "out"]  # what was killed is removed


def test_a_link_is_prepared_where_it_leads(corpus, tokenizer_path, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "shards")
    config = PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path))
    manifest = prepare(config, LENGTH, tmp_path / "link")
    assert (
        manifest == prepare(config, LENGTH, tmp_path / "disk" / "shards") == prepare(config, LENGTH, tmp_path / "link")
    )
    assert (tmp_path / "link").is_symlink()


def test_a_failed_prepare_leaves_nothing(tokenizer_path, tmp_path):
    lines = [json.dumps({"text": "some words " * 1000})] * 300 + ["{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 2):
        config = PrepareConfig(inputs=(str(tmp_path / "a.jsonl"),), tokenizer=str(tokenizer_path), workers=workers)
        with pytest.raises(DataError, match=r"a\.jsonl:301: not JSON"):
            prepare(config, LENGTH, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_place_that_cannot_be_written_is_named(corpus, tokenizer_path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file, not a folder; choose another name"):
        prepare(PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path)), 32, tmp_path / "file" / "out")


def test_too_little_text_is_an_error(tokenizer_path, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("one two three")
    (tmp_path / "long.txt").write_text("one two three " * 100)

    def attempt(*names: str, **options):
        options = {"tokenizer": str(tokenizer_path)} | options
        prepare(
            PrepareConfig(inputs=tuple(str(tmp_path / name) for name in names), **options), LENGTH, tmp_path / "out"
        )

    with pytest.raises(DataError, match=r"empty\.txt: contains no text"):
        attempt("empty.txt")
    with pytest.raises(DataError, match=r"empty\.txt: contains no text"):
        attempt("empty.txt", tokenizer="bpe:500")
    with pytest.raises(DataError, match=r"the train split has 1 documents with \d+ tokens, too few for one row of 33"):
        attempt("short.txt")
    with pytest.raises(DataError, match="the validation split has 0 documents with 0 tokens, too few"):
        attempt("long.txt", validation_fraction=1e-6)
    with pytest.raises(DataError, match=r"bpe:30000: the text gives at most \d+ tokens"):
        attempt("long.txt", tokenizer="bpe:30000")
    with pytest.raises(DataError, match="no such tokenizer file"):
        attempt("long.txt", tokenizer="nowhere.model")


def test_held_out_inputs_and_equal_texts_stay_on_one_side(corpus, tokenizer_path, tmp_path):
    (tmp_path / "held.txt").write_text("held out words " * 100)
    config = PrepareConfig(
        inputs=(str(corpus),), tokenizer=str(tokenizer_path), validation_inputs=(str(tmp_path / "held.txt"),)
    )
    splits = prepare(config, LENGTH, tmp_path / "a")["splits"]
    assert splits["validation"]["documents"] == 1
    twice = PrepareConfig(inputs=(str(corpus), str(corpus)), tokenizer=str(tokenizer_path), validation_fraction=0.3)
    once = PrepareConfig(inputs=(str(corpus),), tokenizer=str(tokenizer_path), validation_fraction=0.3)
    two, one = prepare(twice, LENGTH, tmp_path / "b")["splits"], prepare(once, LENGTH, tmp_path / "c")["splits"]
    for split in ("train", "validation"):
        assert two[split]["documents"] == 2 * one[split]["documents"]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.text(alphabet="a \n", max_size=200))
@settings(max_examples=50)
def test_long_documents_are_cut_without_loss(lengths, text):
    original = tokenizer_kinds.SEGMENT_CHARS
    try:
        tokenizer_kinds.SEGMENT_CHARS = lengths[0]
        segments = list(tokenizer_kinds.segments([text]))
        assert list(tokenizer_kinds.segments(text[at : at + 7] for at in range(0, len(text), 7))) == segments
    finally:
        tokenizer_kinds.SEGMENT_CHARS = original
    assert "".join(segments) == text
    assert all(len(segment) <= lengths[0] for segment in segments)
    assert all(segments[:-1]) or len(segments) == 1


def cut_texts(tokenizer: Tokenizer, texts: list[str]) -> list[encoding.Piece]:
    documents = [("train", (0, number), Document(text, str(number))) for number, text in enumerate(texts)]
    return [piece for _, piece in encoding.cut_documents(documents, tokenizer)]


def test_cutting_after_newlines_does_not_change_the_tokens(tokenizer_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [text for name, text in read_standard_library() if name.startswith("json/")]
    whole = encoding.encode_pieces(tokenizer, cut_texts(tokenizer, texts))
    monkeypatch.setattr(tokenizer_kinds, "SEGMENT_CHARS", 3000)
    pieces = cut_texts(tokenizer, texts)
    assert len(pieces) > len(texts)
    cut = encoding.encode_pieces(tokenizer, pieces)
    assert np.array_equal(whole.tokens, cut.tokens)
    for count in encoding.PIECE_COUNTS:
        assert whole.total(count) == cut.total(count), count


def test_the_sample_for_a_tokenizer_is_bounded_and_independent_of_the_order(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "TRAINING_SAMPLE_BYTES", 5000)
    texts = [f"text {number} " * (number % 50 + 1) for number in range(300)]
    sample = sample_texts(texts)
    assert sample == sample_texts(reversed(texts))
    assert 4000 < sum(map(len, sample)) <= 5000
    assert sample_texts(texts[:3]) == sorted(texts[:3], key=sample_texts(texts[:3]).index)
    monkeypatch.setattr(tokenizer_training, "SAMPLE_PIECE_CHARS", 100)
    pieces = sample_texts(["".join(texts)])  # of one long text, pieces from all over
    assert len(pieces) == 50
    assert 10 < sum(piece in "".join(texts[:150]) for piece in pieces) < 40
    monkeypatch.setattr(tokenizer_training, "TRAINING_SCAN_BYTES", 1000)
    assert sum(map(len, sample_texts(texts))) < 1500


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"inputs": ()}, "inputs", "is empty"),
        ({"tokenizer": "bpe:"}, "tokenizer", "lacks the size of the vocabulary; write bpe:32000"),
        ({"tokenizer": "bpe:4k"}, "tokenizer", "lacks the size of the vocabulary"),
        ({"tokenizer": ""}, "tokenizer", "is empty"),
        ({"validation_fraction": 1.0}, "validation_fraction", "is 1.0; must be 0 or more and below 1"),
        (
            {"validation_fraction": 0.1, "validation_inputs": ("b",)},
            "validation_inputs",
            "excludes validation",
        ),
        ({"workers": 0}, "workers", "is 0; must be 1 or more"),
    ],
)
def test_options_are_checked(changes, key, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PrepareConfig(**({"inputs": ("a",), "tokenizer": "bpe:400"} | changes))
    assert message in caught.value.args[0][key]


def test_held_out_files_of_a_folder_are_not_trained_on(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("a", "b"):
        write_corpus(corpus / f"{name}.jsonl", num_documents=60)
    held_out, other_name, numbers = corpus / "b.jsonl", corpus / ".." / "corpus", itertools.count()

    def prepared(*inputs, held_out=held_out):
        inputs = tuple(map(str, inputs))
        config = PrepareConfig(inputs=inputs, validation_inputs=(str(held_out),), tokenizer="bpe:300")
        return prepare(config, LENGTH, tmp_path / f"made-{next(numbers)}")

    for folder in (corpus, other_name):
        manifest = prepared(folder)
        assert [split["documents"] for split in manifest["splits"].values()] == [60, 60]
        assert manifest["files"] == {"read": 2, "left_out": 1}
    for inputs in ((held_out,), (corpus, held_out), (other_name / "b.jsonl",)):
        with pytest.raises(DataError, match=r"b\.jsonl: (is to be trained on and|all of it is) held out"):
            prepared(*inputs)
    with pytest.raises(DataError, match="corpus: is to be trained on and held out; name it as one of both"):
        prepared(corpus, held_out=corpus)


@pytest.mark.parametrize("held_out", ["hf:a/b:train[:9]", "hf:a/b:train", "hf:./ds:train"])
def test_rows_of_a_hub_s_split_are_not_on_both_sides(held_out, tmp_path, monkeypatch):
    (tmp_path / "ds").mkdir()
    monkeypatch.chdir(tmp_path)
    inputs = ("hf:a/b:train[:50]", "hf:ds:train")
    with pytest.raises(DataError, match=r"is held out, and rows of hf:.*, which is trained on, are of the same split"):
        without_held_out(survey(inputs), inputs, [held_out])
    for fine in ("hf:a/b:test", "hf:a/b:other:train", "hf:./other:train"):
        without_held_out(survey(inputs), inputs, [fine])


def test_a_folder_is_not_done_when_its_inputs_have_other_files(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    first = write_corpus(corpus / "a.jsonl", num_documents=60)
    config = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300")
    manifest = prepare(config, LENGTH, tmp_path / "out")
    added = write_corpus(corpus / "b.jsonl", num_documents=1)
    complaint = rf"{tmp_path}/out: was prepared when {corpus} had other files, or files of other sizes"
    with pytest.raises(DataError, match=complaint):
        prepare(config, LENGTH, tmp_path / "out")
    added.unlink()
    os.utime(first, (0, 0))  # as a copy may have
    assert prepare(config, LENGTH, tmp_path / "out") == manifest
    write_corpus(first, num_documents=61)
    with pytest.raises(DataError, match=complaint):
        prepare(config, LENGTH, tmp_path / "out")
    older = {key: value for key, value in manifest.items() if key != "listings"}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(older))
    assert prepare(config, LENGTH, tmp_path / "out") == older
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    corpus.rename(tmp_path / "elsewhere")
    assert prepare(config, LENGTH, tmp_path / "out") == manifest  # text may go when it is prepared


def test_a_folder_of_text_may_have_a_manifest_of_its_own(tmp_path):
    (tmp_path / "site").mkdir()
    write_corpus(tmp_path / "site" / "a.jsonl", num_documents=60)
    (tmp_path / "site" / "manifest.json").write_text('{"name": "my corpus"}')
    config = PrepareConfig(inputs=(str(tmp_path / "site"),), tokenizer="bpe:300")
    assert prepare(config, LENGTH, tmp_path / "out")["files"]["read"] == 1
    again = PrepareConfig(inputs=(str(tmp_path / "out"),), tokenizer="bpe:300")
    with pytest.raises(DataError, match="out: is prepared data; to prepare its text again, name a split"):
        prepare(again, LENGTH, tmp_path / "again")
