"""Names from files of others: bare names of entries of the folder, or refused, at every place that reads one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import BARE_NAMES, HOSTILE_NAMES, edited, reseal
from hypothesis import given
from hypothesis import strategies as st
from tiny import SEQUENCE_LENGTH
from variants import manifest as checkpoint_manifest

from data.config import DataConfig
from data.errors import DataError
from data.loader import token_bytes, validation_rows
from data.mixture import Source
from data.names import bare_name
from data.prepared import open_prepared
from data.sources import open_sources
from launcher.checkpoint.manifest import FileRecord, manifest_of
from launcher.errors import CheckpointError
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.deepspeed_universal import UniversalSource
from launcher.formats.hf_source import HuggingFaceSource
from model.hf import config_to_hf


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:20])
def test_hostile_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^names .*, which is not the bare name of a file or folder$") as caught:
        bare_name(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", BARE_NAMES, ids=lambda name: ascii(name)[:20])
def test_bare_names_are_taken(name: str, tmp_path: Path) -> None:
    assert bare_name(name) == name
    (tmp_path / name).touch()
    assert os.listdir(tmp_path) == [name]


@given(st.text(st.characters(), max_size=20))
def test_what_is_taken_stays_in_the_folder(name: str) -> None:
    try:
        bare_name(name)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/a/b", name)) == f"/a/b/{name}"
    assert os.path.dirname(f"/a/b/{name}") == "/a/b"


class Prepared:
    """A prepared folder that an attacker may edit; it is left as it was."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.folder = shutil.copytree(shards, folder)
        self._files = [self.folder / "manifest.json", self.folder / "train/index.json"]
        self._contents = [path.read_bytes() for path in self._files]

    def complaint(self, edit: Callable[[Any], Any], *, of: str = "train/index.json") -> str:
        """The error that opening the folder ends in, once one of its files is edited."""
        edited(self.folder / of, edit)
        if of != "manifest.json":
            reseal(self.folder)
        with pytest.raises(DataError) as caught:
            open_prepared(self.folder, may_lack_shards=True)
        for path, content in zip(self._files, self._contents, strict=True):
            path.write_bytes(content)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
        return str(caught.value)


@pytest.fixture
def prepared(shards: Path, tmp_path: Path) -> Prepared:
    return Prepared(shards, tmp_path / "prepared")


def test_prepared_data(prepared: Prepared) -> None:
    manifest = json.loads((prepared.folder / "manifest.json").read_bytes())
    for name in HOSTILE_NAMES:

        def in_manifest(tree: Any, name: Any = name) -> None:
            tree["tokenizer"]["file"] = name

        def as_split(tree: Any, name: Any = name) -> None:
            tree["splits"][name] = manifest["splits"]["train"]

        def as_shard(tree: Any, name: Any = name) -> None:
            tree["shards"][0]["raw_data"]["basename"] = name

        def as_compressed_shard(tree: Any, name: Any = name) -> None:
            tree["shards"][0]["zip_data"] = tree["shards"][0]["raw_data"] | {"basename": name}

        assert "which is not the bare name" in prepared.complaint(in_manifest, of="manifest.json")
        if isinstance(name, str):
            assert "which is not the bare name" in prepared.complaint(as_split, of="manifest.json")
        assert "which is not the bare name" in prepared.complaint(as_shard)
        assert "which is not the bare name" in prepared.complaint(as_compressed_shard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zip_data": {"basename": "index.json", "bytes": 1, "hashes": {}}}, "no MDS shard of version 2"),
        ({"compression": "zstd"}, "no MDS shard of version 2"),
        ({"compression": "gz", "zip_data": {"basename": "a", "bytes": 1, "hashes": {}}}, "no MDS shard of version 2"),
        ({"compression": "zstd", "zip_data": {"basename": "a", "bytes": 1, "hashes": {}}}, "a has no sha256"),
        ({"compression": "zstd", "zip_data": {"basename": "a", "bytes": -1, "hashes": {"sha256": ""}}}, "a has -1 b"),
        ({"format": "json", "raw_meta": {"basename": "../x"}}, "no MDS shard of version 2"),
        ({"version": 1}, "no MDS shard of version 2"),
        ({"column_encodings": ["pkl"]}, "not an index of MDS shards"),
        ({"column_encodings": ["pkl:uint16:33"]}, "does not hold rows of tokens alone"),
        ({"column_encodings": ["ndarray:float64:33"]}, "does not hold rows of tokens alone"),
        ({"column_encodings": ["ndarray:uint16:34"]}, "does not hold rows of tokens alone"),
        (
            {"column_encodings": ["ndarray:uint16:34"], "column_sizes": [68], "samples": 1},
            "rows of 34 tokens, but manifest.json",
        ),
        ({"column_names": ["text"]}, "does not hold rows of tokens alone"),
        ({"column_names": ["tokens", "more"]}, "not an index of MDS shards"),
        ({"samples": 10**15}, "cannot hold 1000000000000000 rows"),
        ({"samples": -1}, "cannot hold -1 rows"),
        ({"samples": "5"}, "cannot hold '5' rows"),
        ({"samples": True}, "cannot hold True rows"),
        ({"samples": 10**300}, "cannot hold 1000"),
        ({"raw_data": {"basename": "x.mds", "bytes": 10**18, "hashes": {"sha256": ""}}}, "more than the format"),
        ({"raw_data": {"basename": "x.mds", "bytes": 2**31, "hashes": {}}}, "has no sha256"),
        ({"raw_data": {"bytes": 5}}, "not an index of MDS shards"),
        ({"raw_data": 5}, "not an index of MDS shards"),
        ({"raw_data": None}, "not an index of MDS shards"),
    ],
)
def test_indexes_that_lie(prepared: Prepared, changes: dict[str, Any], message: str) -> None:
    complaint = prepared.complaint(lambda tree: tree["shards"][0].update(changes))
    assert message in complaint
    assert "allow_unsafe_types" not in complaint


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.pop("splits"), "not a manifest of prepared data"),
        (lambda tree: tree.update(splits=[]), "not a manifest of prepared data"),
        (lambda tree: tree.update(splits={}), "its splits must be train"),
        (lambda tree: tree["splits"].update(other=tree["splits"]["train"]), "its splits must be train"),
        (lambda tree: tree["splits"]["train"].update(rows=-1), "its splits.train.rows is -1"),
        (lambda tree: tree["splits"]["train"].update(rows=10**30), "which is not a count"),
        (lambda tree: tree.update(vocab_size="many"), "its vocab_size is 'many'"),
        (lambda tree: tree.update(tokenizer=5), "not a manifest of prepared data"),
        (lambda tree: tree.update(options=None), "its options not a mapping"),
        (lambda tree: tree.update(format_version="\x1b[2J" * 1000), "has format_version"),
    ],
)
def test_manifests_that_lie(prepared: Prepared, edit: Callable[[Any], Any], message: str) -> None:
    assert message in prepared.complaint(edit, of="manifest.json")


@pytest.mark.parametrize("name", ["manifest.json", "train/index.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", "{}", "\0", '{"shards": 5}', '{"shards": [5]}', ""])
def test_json_that_is_something_else(prepared: Prepared, name: str, content: str) -> None:
    (prepared.folder / name).write_text(content)
    with pytest.raises(DataError, match=r"(manifest|index)\.json: "):
        open_prepared(prepared.folder)


def test_a_damaged_row_of_held_out_text_is_named(prepared: Prepared) -> None:
    shard = prepared.folder / "validation/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[4:8] = b"\xff\xff\xff\xff"  # where the first row begins
    shard.write_bytes(content)
    config = DataConfig(sources=(Source(path=str(prepared.folder)),), sequence_length=SEQUENCE_LENGTH)
    with pytest.raises(DataError, match=r"shard\.00000\.mds: damaged: a row cannot be read"):
        validation_rows(config, vocab_size=320, micro_batch_sequences=1, rank=0, world_size=1)


def test_bytes_of_tokens_that_lie(prepared: Prepared) -> None:
    config = DataConfig(sources=(Source(path=str(prepared.folder)),), sequence_length=SEQUENCE_LENGTH)
    path = prepared.folder / "token_bytes.npy"
    sound = path.read_bytes()
    for shape in ("(319,)", "(320, 1)", "(10**15,)", "(10000000000000000,)"):
        path.write_bytes(sound.replace(b"(320,)", shape.encode()))
        with pytest.raises(DataError, match=r"token_bytes\.npy: "):
            token_bytes(config, 320)
    np.save(path, np.array([None] * 320), allow_pickle=True)
    with pytest.raises(DataError, match=r"token_bytes\.npy: ") as caught:
        token_bytes(config, 320)
    assert "allow_pickle" not in str(caught.value)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads that copy from a local folder, in place of a store."""
    from streaming.base.storage.download import CloudDownloader

    def copy(remote: str, local: str) -> None:
        shutil.copyfile(remote.removeprefix("s3:/"), local)

    monkeypatch.setattr(CloudDownloader, "direct_download", copy)


@pytest.mark.parametrize("place", ["", "train", "validation", "train/shard.00000.mds", "train/shard.00000.mds.tmp"])
def test_links_in_a_cache_are_not_followed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, copying: None
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Source(path=f"s3:/{shards}")
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to("real")  # a user's own link to another disk is fine
    open_sources([source], "cache", SEQUENCE_LENGTH, 320)
    (folder,) = (tmp_path / "real").iterdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "shard.00000.mds").write_text("thesis")
    target = folder / place
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.symlink_to(mine / target.name if ".mds" in place else mine)
    with pytest.raises(DataError, match="is a symbolic link in the cache of downloads; remove it"):
        open_sources([source], "cache", SEQUENCE_LENGTH, 320)
    assert (mine / "shard.00000.mds").read_text() == "thesis"
    assert [path.name for path in mine.iterdir()] == ["shard.00000.mds"]


def test_a_remote_folder_cannot_name_files_outside_its_cache(shards: Path, tmp_path: Path, copying: None) -> None:
    folder = shutil.copytree(shards, tmp_path / "remote")
    mine = tmp_path / "home" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("thesis")
    for number, name in enumerate(("../../../home/mine.txt", str(mine))):
        edited(folder / "train/index.json", lambda tree, name=name: tree["shards"][0]["raw_data"].update(basename=name))
        reseal(folder)
        with pytest.raises(DataError, match="which is not the bare name"):
            open_sources([Source(path=f"s3:/{folder}")], str(tmp_path / f"cache{number}"), SEQUENCE_LENGTH, 320)
        assert mine.read_text() == "thesis"


def test_checkpoint_manifests() -> None:
    record = FileRecord(size=1, digest="0" * 32)
    sound = {"config.yaml": record, "rank-00000.safetensors": record}
    for name in (*HOSTILE_NAMES, *BARE_NAMES, "rank-00000.safetensors\n"):
        if isinstance(name, str) and name not in ("tokenizer.model",):
            tree = json.loads(checkpoint_manifest(3).sealed(sound))
            tree["files"][name] = tree["files"]["config.yaml"]
            with pytest.raises(ValueError, match=r"which is not a file of a checkpoint|Invalid JSON") as caught:
                manifest_of(tree)
            assert str(caught.value).isprintable()


def test_indexes_of_hugging_face(tmp_path: Path) -> None:
    from models import VARIANTS

    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(VARIANTS["llama"])))
    for name in HOSTILE_NAMES:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match=r"which is not the bare name|must have a weight_map"):
            HuggingFaceSource(tmp_path)


def test_pointers_of_deepspeed(tmp_path: Path) -> None:
    for pointer, kind in (("latest", DeepSpeedSource), ("latest_universal", UniversalSource)):
        for name in HOSTILE_NAMES:
            if isinstance(name, str) and name.isprintable() and name == name.strip():
                (tmp_path / pointer).write_text(name)
                with pytest.raises(CheckpointError, match=f"{pointer} names .*, which is not the bare name"):
                    kind(tmp_path)


def test_parameters_that_are_folders(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    (tmp_path / "x").mkdir()
    torch.save({"param": torch.ones(2)}, tmp_path / "x" / "fp32.pt")
    for key in ("module", "param_shapes"):
        for name in HOSTILE_NAMES:
            if isinstance(name, str) and "\ud800" not in name:
                names = {name: torch.Size([2])}
                model = {"module": names} if key == "module" else {"module": {}, "param_shapes": [names]}
                torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
                with pytest.raises(CheckpointError, match="which is not the bare name"):
                    UniversalSource(tmp_path)
