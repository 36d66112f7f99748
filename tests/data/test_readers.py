"""Documents from every kind of input, and errors that name the place."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from places import SHARED

from data.errors import DataError
from data.quickstart_corpus import read_standard_library
from data.readers import Document, read_documents

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
