"""Processes that share the work of `prepare` make what one makes, whoever of them is killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_parts import LENGTH, SMALL, contents, write_inputs
from tiny import write_corpus

from data import parts, shards
from data.config import PrepareConfig
from data.errors import DataError
from data.parts import Part, cut_parts
from data.prepared import open_prepared
from data.private import locked
from data.shards import prepare
from data.survey import Survey, survey


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    return write_inputs(tmp_path, monkeypatch)


def test_parts_are_runs_of_files_and_shares_of_large_ones(inputs, tmp_path):
    cut = cut_parts(PrepareConfig(inputs=inputs, tokenizer="bpe:300"), survey(inputs))
    files = sorted(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert files[-1] > 3 * parts.PART_BYTES
    large = [part for part in cut if part.shares == -(-files[-1] // parts.PART_BYTES)]
    assert [part.share for part in large] == list(range(large[0].shares))
    assert len(cut) > 5


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=12), st.data())
def test_every_document_belongs_to_one_part(sizes, data):
    class File:
        def __init__(self, size, suffix):
            self.size, self.suffix = size, suffix
            self.suffixes = [suffix]
            self.name = f"x{suffix}"

        def stat(self):
            return os.stat_result((0, 0, 0, 0, 0, 0, self.size, 0, 0, 0))

        def __str__(self):
            return self.name

    kinds = [data.draw(st.sampled_from([".txt", ".jsonl", ".parquet"])) for _ in sizes]
    files = [File(size, kind) for size, kind in zip(sizes, kinds, strict=True)]
    before = parts.PART_BYTES
    parts.PART_BYTES = 10_000
    try:
        cut = cut_parts(PrepareConfig(inputs=("x",), tokenizer="t"), Survey({"x": files}, {}))
    finally:
        parts.PART_BYTES = before
    for file in range(len(sizes)):
        for document in (0, 1023, 1024, 5000):
            owners = [part for part in cut if part.first <= file < part.stop and part.has((file, document))]
            assert len(owners) == 1
    assert [part.first for part in cut] == sorted(part.first for part in cut)
    assert all(part.stop == part.first + 1 for part in cut if part.shares > 1)
    whole = [sum(sizes[part.first : part.stop]) for part in cut if part.shares == 1 and part.stop > part.first + 1]
    assert all(size <= 10_000 for size in whole)


OPTIONS = {
    "stream": {"tokenizer": "bpe:300", "validation_fraction": 0.2},
    "best-fit": {"tokenizer": "bpe:300", "packing": "best-fit", "workers": 2},
    "held-out": {"tokenizer": "unigram:300", "lossy_tokenizer": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_process_in_parts_makes_the_bytes_of_one_without(inputs, tmp_path, name):
    options = dict(OPTIONS[name])
    if name == "held-out":
        write_corpus(tmp_path / "held.jsonl", num_documents=40)
        options["validation_inputs"] = (str(tmp_path / "held.jsonl"),)
    config = PrepareConfig(inputs=inputs, **options)
    prepare(config, LENGTH, tmp_path / "alone")
    told = []
    manifest = prepare(config, LENGTH, tmp_path / "out", told.append, on="shared-folder")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert manifest == open_prepared(tmp_path / "alone")
    assert not (tmp_path / "out.parts").exists()
    stages = [progress.stage for progress in told]
    assert stages == sorted(stages, key=["tokenizer", "parts", "merging"].index)
    last = [progress for progress in told if progress.stage == "parts"][-1]
    assert last.parts[0] == last.parts[1] > 5
    assert prepare(config, LENGTH, tmp_path / "out", on="shared-folder") == manifest  # it is done


SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path
    from data import encoding, parts, writers
    from data.config import PrepareConfig
    from data.shards import prepare

    folder, out, killed, small = json.loads(sys.argv[1])
    for (module, name), value in [((sys.modules[m], n), v) for m, n, v in small]:
        setattr(module, name, value)
    original, count = parts.SharedParts._tokenize, 0

    def tokenize(self, number, part, run):
        global count
        count += 1
        if killed and count == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, number, part, run)

    parts.SharedParts._tokenize = tokenize
    config = PrepareConfig(inputs=(folder,), tokenizer="bpe:300", validation_fraction=0.2)
    prepare(config, %d, Path(out), on="shared-folder")
    print(count)
"""


def start(tmp_path, out, killed=0):
    small = [(module.__name__, name, value) for (module, name), value in SMALL.items()]
    script = tmp_path / "share.py"
    script.write_text(textwrap.dedent(SCRIPT % LENGTH))
    argument = json.dumps([str(tmp_path / "in"), str(out), killed, small])
    return subprocess.Popen(
        [sys.executable, str(script), argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_share_the_parts_and_one_is_killed(inputs, tmp_path):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300", validation_fraction=0.2)
    prepare(config, LENGTH, tmp_path / "alone")
    processes = [start(tmp_path, tmp_path / "out", killed) for killed in (2, 0)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0], outputs
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not (tmp_path / "out.parts").exists()
    assert int(outputs[1][0]) > 3


def stop_in_merge(config, out, monkeypatch):
    """Tokenize all parts, and stop while they are merged."""
    monkeypatch.setattr(shards, "SECONDS_BETWEEN_RECORDS", 0.0)

    def fail(progress):
        if progress.stage == "merging" and progress.documents > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, LENGTH, out, fail, on="shared-folder")


def test_a_merge_that_is_killed_goes_on(inputs, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    prepare(config, LENGTH, tmp_path / "alone")
    stop_in_merge(config, tmp_path / "out", monkeypatch)
    assert (tmp_path / "out.parts").exists()
    told = []
    prepare(config, LENGTH, tmp_path / "out", told.append, on="shared-folder")
    merging = [progress for progress in told if progress.stage == "merging"]
    assert "going on after" in merging[0].earlier
    assert merging[0].documents > 40
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_process_without_parts_does_not_go_on_with_a_merge(inputs, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    prepare(config, LENGTH, tmp_path / "alone")
    stop_in_merge(config, tmp_path / "out", monkeypatch)
    told = []
    prepare(config, LENGTH, tmp_path / "out", told.append)
    assert told[-1].earlier == "An earlier attempt was stopped, but since then, other are: in parts; starting anew"
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def begun(config, out):
    """Parts that are complete and not merged."""
    shared = shards.shared_parts(config, LENGTH, out)
    shared.tokenize_all()
    return shared


def test_processes_with_other_options_do_not_take_part(inputs, tmp_path):
    begun(PrepareConfig(inputs=inputs, tokenizer="bpe:300"), tmp_path / "out")
    other = PrepareConfig(inputs=inputs, tokenizer="bpe:300", validation_fraction=0.1)
    with pytest.raises(DataError, match=r"out\.parts: was begun with different validation_fraction; run the same"):
        prepare(other, LENGTH, tmp_path / "out", on="shared-folder")


def test_a_part_that_another_process_has_is_waited_for_by_name_and_not_for_ever(inputs, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    prepare(config, LENGTH, tmp_path / "alone")
    shared = shards.shared_parts(config, LENGTH, tmp_path / "out")
    grown, told = [0], []
    monkeypatch.setattr(parts, "SECONDS_WITHOUT_GROWTH", 0.2)
    monkeypatch.setattr(parts.time, "sleep", lambda seconds: grow(grown[0]))

    def grow(number):
        """The other process adds to its part, and then hangs."""
        if number < 20:
            (shared.folder / ".00000.tokens.its.tritrain-tmp").write_bytes(bytes(number))
        grown[0] += 1

    holder = f"part 0 of process {os.getpid()} on "
    with (
        locked(shared.folder / "00000.lock", "a trial"),
        pytest.raises(DataError, match=rf"out\.parts: has not grown for 0\.2 s, while .* for {holder}.* End what"),
    ):
        prepare(config, LENGTH, tmp_path / "out", told.append, on="shared-folder")
    assert 20 < grown[0] < 30
    assert told[-1].waited_for.startswith(holder)
    assert told[-1].parts[0] == told[-1].parts[1] - 1
    prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_many_parts_are_named_in_few_words():
    assert parts.parts_in_words({}) == ""
    assert parts.parts_in_words({7: "a", 8: "b"}) == "part 7 of a; part 8 of b"
    assert parts.parts_in_words(dict.fromkeys(range(9), "a")) == "part 0 of a; part 1 of a; part 2 of a; 6 others"


def test_a_damaged_part_is_found(inputs, tmp_path):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    shared = begun(config, tmp_path / "out")
    path = shared.folder / "00001.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00001\.tokens: is damaged; remove it and its \.json, and run"):
        prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    path.unlink()
    path.with_suffix(".json").unlink()
    prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    prepare(config, LENGTH, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_part_that_another_process_has_is_left_to_it(inputs, tmp_path):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    shared = shards.shared_parts(config, LENGTH, tmp_path / "out")
    with shared.tokenizing() as tokenize:
        with parts.locked(shared.folder / "00000.lock", "a trial"):
            shared.tokenize(0, tokenize)
            assert 0 in shared.missing
        shared.tokenize(0, tokenize)
        assert 0 not in shared.missing


@pytest.mark.parametrize("on", ["dask", "dask://host", "slurm", "dask://:1x"])
def test_where_to_share_is_checked_at_once(tmp_path, on):
    with pytest.raises(DataError, match="is neither shared-folder nor dask://HOST:PORT"):
        prepare(PrepareConfig(inputs=("none",), tokenizer="t"), LENGTH, tmp_path / "out", on=on)


def test_a_part_has_the_blocks_of_its_share():
    assert [number for number in range(24) if Part(0, 1, 1, 3, 4).has((0, number))] == [4, 5, 6, 7, 16, 17, 18, 19]


# What others leave behind, and what changes on the way


def test_a_folder_of_this_name_with_something_else_is_left_alone(inputs, tmp_path):
    """The folder of parts is removed at the end; here it would have been the inputs."""
    (tmp_path / "in").rename(tmp_path / "out.parts")
    config = PrepareConfig(inputs=(str(tmp_path / "out.parts"),), tokenizer="bpe:300")
    with pytest.raises(DataError, match=r"out\.parts: holds a\.jsonl and no plan\.json, and what is begun"):
        prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    assert len(list((tmp_path / "out.parts").iterdir())) == 11


def test_a_tokenizer_that_was_left_without_a_plan_is_made_again(inputs, tmp_path):
    (tmp_path / "out.parts").mkdir()
    for name in ("tokenizer.model", "chat_template.jinja", ".plan.json.host.1.0123456789abcdef.tritrain-tmp"):
        (tmp_path / "out.parts" / name).write_text("cut sho")
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    prepare(config, LENGTH, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_parts_without_their_plan_are_not_taken_for_those_of_another(inputs, tmp_path):
    shared = begun(PrepareConfig(inputs=inputs, tokenizer="bpe:300"), tmp_path / "out")
    (shared.folder / parts.PLAN).unlink()
    other = PrepareConfig(inputs=inputs, tokenizer="bpe:310")
    with pytest.raises(DataError, match=r"out\.parts: holds 00000\.json and no plan\.json"):
        prepare(other, LENGTH, tmp_path / "out", on="shared-folder")


def test_parts_of_another_version_are_refused(inputs, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    begun(config, tmp_path / "out")
    monkeypatch.setattr(parts, "PLAN_VERSION", 99)
    with pytest.raises(DataError, match=r"out\.parts: was begun with different version of parts; run the same"):
        prepare(config, LENGTH, tmp_path / "out", on="shared-folder")


def test_blocks_are_those_of_the_plan(inputs, tmp_path, monkeypatch):
    """A process of a version with blocks of another size would leave out documents, and repeat others."""
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    prepare(config, LENGTH, tmp_path / "alone")
    shared = shards.shared_parts(config, LENGTH, tmp_path / "out")
    with shared.tokenizing() as tokenize:
        for number in shared.missing[::2]:
            shared.tokenize(number, tokenize)
    monkeypatch.setattr(parts, "BLOCK_DOCUMENTS", 5)
    prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_file_that_grows_while_it_is_tokenized_is_found(inputs, tmp_path):
    def told(progress):
        if progress.stage == "parts" and progress.parts[0] == 2:
            with (tmp_path / "in" / "a.jsonl").open("a") as file:
                file.writelines(json.dumps({"text": f"One more line {number}."}) + "\n" for number in range(9))

    with pytest.raises(DataError, match=r"out\.parts: was begun with different files; run the same command with"):
        prepare(PrepareConfig(inputs=inputs, tokenizer="bpe:300"), LENGTH, tmp_path / "out", told, on="shared-folder")


@pytest.mark.parametrize("stage", ["parts", "merging"])
def test_another_host_is_first(inputs, tmp_path, stage):
    """Its locks do not reach this one; it makes the folder while this process tokenizes or merges."""
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    prepare(config, LENGTH, tmp_path / "elsewhere")
    done = []

    def told(progress):
        if progress.stage == stage and not done:
            done.append((tmp_path / "elsewhere").rename(tmp_path / "out"))
            parts.remove_parts(tmp_path / "out")

    manifest = prepare(config, LENGTH, tmp_path / "out", told, on="shared-folder")
    assert done
    assert manifest == open_prepared(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_parts_that_were_left_at_the_very_end_are_removed(inputs, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "remove_parts", lambda out: None)
        prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    assert (tmp_path / "out.parts").exists()
    prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    assert not (tmp_path / "out.parts").exists()


def test_parts_are_as_large_as_what_their_files_name(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    write_corpus(tmp_path / "a.jsonl", num_documents=60)
    options = PrepareConfig(inputs=(str(tmp_path / "a.jsonl"),), tokenizer="bpe:300")
    prepare(options, LENGTH, tmp_path / "made")
    (tmp_path / "b.idx").write_bytes(b"1")
    (tmp_path / "b.bin").write_bytes(bytes(9000))
    for source, num_bytes in (("made/train", None), ("b.idx", 9000)):
        inputs = (str(tmp_path / source),)
        cut = cut_parts(PrepareConfig(inputs=inputs, tokenizer="bpe:300"), survey(inputs))
        size = num_bytes or sum(path.stat().st_size for path in (tmp_path / source).iterdir())
        assert [part.share for part in cut] == list(range(-(-size // 2000)))
        assert len(cut) > 3
