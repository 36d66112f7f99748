"""Documents from every kind of input, and errors that name the place."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import zstandard
from places import SHARED

from data.documents import Document
from data.errors import DataError
from data.quickstart_corpus import read_standard_library
from data.readers import read_documents
from data.survey import check_input, survey

TEXTS = ["first", "zweiter\ntext", "третий", "x" * 300_000]
REAL_DATA = SHARED / "data" / "pretrain"


def write_jsonl(texts=TEXTS) -> bytes:
    return b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(texts))


def read(*inputs: Path | str) -> list[Document]:
    return list(read_documents([str(source) for source in inputs]))


def compress_zst(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=28, enable_ldm=True
    )  # more than the default decoder takes
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


WRITERS = {
    "jsonl": write_jsonl,
    "jsonl.gz": lambda: gzip.compress(write_jsonl()),
    "jsonl.zst": lambda: compress_zst(write_jsonl()),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_json_lines_plain_and_compressed(kind, tmp_path):
    path = tmp_path / f"a.b.{kind}"
    path.write_bytes(WRITERS[kind]())
    assert read(path) == [Document(text, f"{path}:{number}") for number, text in enumerate(TEXTS, start=1)]


def test_zstd_files_of_several_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress_zst(write_jsonl(TEXTS[:2])) + compress_zst(write_jsonl(TEXTS[2:])))
    assert [document.text for document in read(path)] == TEXTS


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_cut_compressed_file_is_an_error_even_at_the_end_of_a_line(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(WRITERS[kind]()[:-6])
    with pytest.raises(DataError, match=rf"a\.{kind}:\d+: cannot be decompressed; the file is damaged or truncated"):
        read(path)


def test_text_files_and_folders_in_order(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "b" / "1.MD").write_text("one")
    (tmp_path / "b" / "ignored.png").write_bytes(b"\xff")
    (tmp_path / "b" / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "a.py").write_text("print('ä')\r\n", newline="")
    (tmp_path / "c.jsonl").write_bytes(write_jsonl(["json", ""]) + b"\n  \n")
    assert [document.text for document in read(tmp_path)] == ["print('ä')\r\n", "one", "two", "json"]
    assert [document.text for document in read(tmp_path / "c.jsonl", tmp_path / "b" / "2.txt")] == ["json", "two"]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(4), "text": TEXTS}), path, row_group_size=2)
    assert read(path) == [Document(text, f"{path}:{number}") for number, text in enumerate(TEXTS, start=1)]
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: has no column \"text\"; its columns are \['body', 'id'\]"):
        read(path)
    path.write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file"):
        read(path)


def test_hugging_face_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_bytes(write_jsonl())
    source = f"hf:{tmp_path}/corpus:train"
    assert read(source) == [Document(text, f"{source}:{number}") for number, text in enumerate(TEXTS, start=1)]
    assert len(read(f"hf:{tmp_path}/corpus:default:train")) == len(TEXTS)
    assert [document.text for document in read(f"hf:{tmp_path}/corpus:train[:2]")] == TEXTS[:2]
    assert len(read(f"hf:{tmp_path}/corpus:default:train[:99]")) == len(TEXTS)
    for wrong in ("train[:0]", "train[:2", "train[1:2]", "train[:5%]"):
        with pytest.raises(DataError, match=r"SPLIT\[:1000\] is its first 1000 rows|`datasets` cannot open it"):
            read(f"hf:{tmp_path}/corpus:{wrong}")
    with pytest.raises(DataError, match="`datasets` cannot open it"):
        read(f"hf:{tmp_path}/corpus:test")
    with pytest.raises(DataError, match="write a data set as hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        read("hf:corpus")


def test_the_quickstart_corpus_is_the_standard_library():
    documents = read("python-stdlib")
    assert documents == read("python-stdlib")
    assert documents == [Document(text, f"python-stdlib/{path}") for path, text in read_standard_library()]
    paths = [path for path, _ in read_standard_library()]
    assert paths == sorted(paths, key=Path)
    assert {"json/decoder.py", "random.py"} <= set(paths)
    assert not [path for path in paths if path.startswith(("test/", "idlelib/", "site-packages/", "lib2to3/"))]
    assert 5e6 < sum(len(document.text) for document in documents) < 50e6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:3: not JSON: .*char"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: not JSON: .*utf-8"),
        (b'{"messages": []}', r"its keys are \['messages'\]; --content chats of `tritrain prepare` reads such records"),
        (b'{"chosen": "a"}', "--content pairs of `tritrain prepare`"),
        (b'{"body": "a", "id": 1}', r"a\.jsonl:3: has no key \"text\"; its keys are \['body', 'id'\]"),
        (b'{"text": null}', r"a\.jsonl:3: \"text\" is NoneType; must be text"),
        (b'["a"]', r"a\.jsonl:3: a line must be an object with the key \"text\", not list"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:3: contains half of a surrogate pair \('\\ud800'\), which is not text"),
    ],
)
def test_broken_lines_are_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(write_jsonl(["one", "two"]) + line + b"\n" + write_jsonl())
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_inputs_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: no such file or folder"):
        read(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"this folder has no file of a known kind; known are \.txt"):
        read(tmp_path)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match=r"a\.pdf: this kind of file is not known; choose one of .txt"):
        read(tmp_path / "a.pdf")
    (tmp_path / "a.txt").write_bytes(b"abc\xe4")
    with pytest.raises(DataError, match=r"a\.txt: byte 3 is not UTF-8"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match=r"b\.txt: contains no text"):
        read(tmp_path / "b.txt")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real text is not on this machine")
def test_real_compressed_text():
    documents = read(REAL_DATA / "val.jsonl.zst")
    assert len(documents) == 247
    assert sum(len(document.text.encode()) for document in documents) == pytest.approx(2.5e6, rel=0.1)


@pytest.mark.parametrize("source", ["", " "])
def test_a_blank_input_is_not_the_current_folder(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert [document.text for document in read_documents(["."])] == ["a"]
    for use in (check_input, lambda source: survey([source]), lambda source: list(read_documents([source]))):
        with pytest.raises(DataError, match=r"an input is blank; name a file or a folder, \. for the current one"):
            use(source)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: is neither a file nor a folder; save the text"):
        check_input(str(tmp_path / "pipe.jsonl"))


def test_what_is_left_out_of_folders_is_listed_with_the_reason(tmp_path):
    for name in (
        "in/a/x.jsonl", "in/a/more.json", "in/a/dolma-0001.json.gz", "in/b.txt", "in/.git/x.txt", "in/.hidden.txt",
        "in/_temporary/0/part-0.jsonl", "in/_SUCCESS", "in/_posts/x.md", "in/pkg/__init__.py", "ext/y.jsonl",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(write_jsonl(["some text"]) if name.endswith(".jsonl") else b"x = 1")
    folder = tmp_path / "in"
    (folder / "linked").symlink_to(tmp_path / "ext")
    (folder / "loop").symlink_to(folder)
    (folder / "a" / "y.jsonl").symlink_to(tmp_path / "ext" / "y.jsonl")
    os.mkfifo(folder / "pipe.txt")
    os.mkdir(folder / "empty.txt")
    found = survey([str(folder), "python-stdlib", str(tmp_path / "ext")])
    assert [str(path.relative_to(tmp_path)) for path in found.read] == [
        "in/_posts/x.md", "in/a/x.jsonl", "in/a/y.jsonl", "in/b.txt", "in/pkg/__init__.py", "ext/y.jsonl",
    ]  # fmt: skip
    assert {str(path.relative_to(folder)): reason for path, reason in found.left_out.items()} == {
        ".git": "hidden",
        ".hidden.txt": "hidden",
        "_SUCCESS": "without an ending",
        "_temporary": "unfinished output or log of Spark",
        "a/dolma-0001.json.gz": "of unknown kind .json.gz",
        "a/more.json": "of unknown kind .json",
        "linked": "linked folder (name it as an input)",
        "loop": "linked folder (name it as an input)",
        "pipe.txt": "neither a file nor a folder",
    }
    assert found.reasons()[0] == "2 hidden"
    assert {document.origin.partition(":")[0] for document in read(folder)} == {
        str(path) for path in found.read if path.is_relative_to(folder)
    }


def test_folders_with_nothing_to_read_say_what_is_in_them(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(DataError, match=r"no file of a known kind; .*; left out: 1 of unknown kind \.json"):
        read(tmp_path)


def test_text_that_should_be_there_is_missed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b\.txt: is a link to nothing; fetch or restore"):
        read(tmp_path)
    (tmp_path / "b.txt").unlink()
    assert len(read(tmp_path)) == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match="closed: cannot be read: Permission denied"):
        read(tmp_path)


def write_table(path: Path, texts) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts}), path)


def test_a_damaged_parquet_file_is_named_with_its_row(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.random(40))) for _ in range(300)]
    for number in range(3):
        write_table(tmp_path / f"part-{number}.parquet", texts)
    path = tmp_path / "part-1.parquet"
    sound = path.read_bytes()
    path.write_bytes(sound[:3000] + bytes(byte ^ 0x5A for byte in sound[3000:3400]) + sound[3400:])
    with pytest.raises(DataError, match=r"part-1\.parquet:1: the file is damaged in this row or after it \("):
        read(tmp_path)
    for cut in (
        sound[:-20],
        sound[: len(sound) // 2],
        sound[:-8] + b"\xff" * 8,
        sound[:-100] + b"\0" * 92 + sound[-8:],
    ):
        path.write_bytes(cut)
        with pytest.raises(DataError, match=r"part-1\.parquet(:1)?: (is not a Parquet file|the file is damaged)"):
            read(tmp_path)


def test_a_row_of_parquet_that_is_not_utf8_is_named(tmp_path):
    import pyarrow

    raw = pyarrow.array([b"some good text"] * 300 + [b"bad \xff\xfe text", b"more"], pyarrow.binary())
    write_table(tmp_path / "t.parquet", pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers()))
    with pytest.raises(DataError, match=r"t\.parquet:301: byte 4 of the text is not UTF-8"):
        read(tmp_path / "t.parquet")


def test_tables_of_other_types(tmp_path):
    import pyarrow

    strings = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    for kind in strings:
        write_table(tmp_path / "t.parquet", pyarrow.array(TEXTS, pyarrow.string()).cast(kind))
        assert [document.text for document in read(tmp_path / "t.parquet")] == TEXTS
    write_table(tmp_path / "t.parquet", pyarrow.array(TEXTS).dictionary_encode())
    assert [document.text for document in read(tmp_path / "t.parquet")] == TEXTS
    for values in ([b"x"], [["x"]], [None], [{"a": "x"}]):
        write_table(tmp_path / "t.parquet", values)
        with pytest.raises(DataError, match=r't\.parquet:1: "text" is \w+; must be text'):
            read(tmp_path / "t.parquet")


def test_lines_that_are_nested_by_the_thousand_are_named(tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_bytes(write_jsonl(["one"]) + b'{"text": "ok", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    with pytest.raises(DataError, match=r"n\.jsonl:2: not JSON: "):
        read(path)
    path.write_text(json.dumps({f"key{number}": 1 for number in range(10_000)}))
    with pytest.raises(DataError, match=r"n\.jsonl:1: has no key .* and 9980 others"):
        read(path)


def test_a_data_set_of_a_hub_that_breaks_is_named_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hfd").mkdir()
    (tmp_path / "hfd" / "a.jsonl").write_bytes(write_jsonl(["one", "two"]))
    (tmp_path / "hfd" / "b.jsonl").write_bytes(b'{"text": "one", "id": 1}\n{"text": broken\n')
    with pytest.raises(DataError, match=r"hfd:train:\d: `datasets` cannot read this row"):
        read(f"hf:{tmp_path}/hfd:train")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_compressed_file_of_no_bytes_is_a_failed_download(kind, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / f"b.{kind}").touch()
    with pytest.raises(DataError, match=re.escape(f"b.{kind}: ")):
        list(read_documents([str(tmp_path)]))
