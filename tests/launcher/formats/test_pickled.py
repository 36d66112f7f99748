"""Pickled files of others: nothing in them runs, and what is damaged gives one error."""

import argparse
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_folders import RANK_1, copied
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.checkpoint.source import KINDS
from launcher.errors import CheckpointError
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.pickled import Inert, PickledFile


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["model", "rank"])
def test_hostile_files_are_refused_and_not_run(at_2: tuple[Path, dict[str, Any]], tmp_path: Path, where: str) -> None:
    folder, marker = copied(at_2[0] / "zero2", tmp_path / "copy"), tmp_path / "marker"
    path = folder / ("mp_rank_00_model_states.pt" if where == "model" else RANK_1)
    content = torch.load(path, weights_only=False)
    torch.save(content | {"ds_config": Hostile(marker)}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read: its pickle asks for posix.system"):
        DeepSpeedSource(folder)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have worked


def test_only_listed_names_even_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": bytearray(b"1")}, path)
    with pytest.raises(CheckpointError, match=r"bytearray"):
        PickledFile(path)


def test_foreign_objects_are_inert(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"args": argparse.Namespace(seed=3), "size": torch.Size([2]), "kind": torch.bfloat16}, path)
    tree = PickledFile(path).tree
    assert isinstance(tree["args"], Inert)
    assert tree["args"].state == {"seed": 3}
    assert (tree["size"], tree["kind"]) == (torch.Size([2]), torch.bfloat16)


def replace_pickle(path: Path, pickled: bytes) -> None:
    """Put another pickle into a file, with a sound checksum, as an attacker would."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


POSIX, SYSTEM = (pickle.SHORT_BINUNICODE + bytes([len(text)]) + text for text in (b"posix", b"system"))
CALL = pickle.SHORT_BINUNICODE + b"\4true" + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
BY_HAND = {
    "instance": b"(S'true'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nX\4\0\0\0trueo.",
    "names by reference": b"\x80\4" + POSIX + b"\x94" + SYSTEM + b"\x9400h\0h\1" + pickle.STACK_GLOBAL + CALL,
    "names by numbered reference": b"\x80\4" + POSIX + b"q\5" + SYSTEM + b"r\6\0\0\x0100h\5j\6\0\0\1\x93" + CALL,
    "a name that is computed": b"\x80\4" + POSIX + SYSTEM + b"N0" + pickle.STACK_GLOBAL + CALL,
    "names as bytes": b"\x80\4U\5posixU\6system" + pickle.STACK_GLOBAL + CALL,
    "later protocol": b"\x80\5\x95\0\0\0\0\0\0\0\0" + POSIX + SYSTEM + pickle.STACK_GLOBAL + CALL,
    "extension": b"\x80\2\x82\1" + CALL,
    "extension of 4 bytes": b"\x80\2\x84\1\0\0\0" + CALL,
    "after a harmless one": b"\x80\2ctorch\nSize\n0cos\nsystem\n" + CALL,
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_refused_alike(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "marker", tmp_path / "file.pt"
    torch.save({}, path)
    pickled = pickle.dumps({"args": [1, Hostile(marker)]}, protocol)
    replace_pickle(path, pickled)
    with pytest.raises(CheckpointError) as caught:
        PickledFile(path)
    assert str(caught.value) == (
        f"{path} cannot be read: its pickle asks for posix.system, and only classes on a list are read, since others "
        "could run anything; nothing was run"
    )
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()  # it would have worked
    path.write_bytes(pickled)  # as it is, in no archive
    with pytest.raises(CheckpointError, match=r"was not written by torch\.save: File is not a zip file"):
        PickledFile(path)


@pytest.mark.parametrize("how", BY_HAND)
def test_pickles_that_are_made_by_hand_are_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file.pt"
    torch.save({}, path)
    replace_pickle(path, BY_HAND[how])
    with pytest.raises(CheckpointError, match=r"asks for (\?|os\.system|posix\.system|extension 1), and only classes"):
        PickledFile(path)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_another_protocol_is_named(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": 5}, path)
    replace_pickle(path, pickle.dumps({"a": 5}, protocol))
    named = protocol if protocol > 1 else 0  # these two do not name theirs
    with pytest.raises(CheckpointError, match=f"its pickle has protocol {named}, and only 2 is read"):
        PickledFile(path)


def test_many_names_are_not_all_listed_and_torchs_advice_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({}, path)
    replace_pickle(path, b"\x80\2" + b"".join(b"cevil\nn%d\n" % number for number in range(1000)) + b".")
    with pytest.raises(CheckpointError, match=r"evil\.n0, .* and 995 others, and only"):
        PickledFile(path)
    replace_pickle(path, b"\x80\2c__builtin__\nset\n]\x85R" + b"\x91" + b".")
    with pytest.raises(CheckpointError) as caught:
        PickledFile(path)
    assert "weights_only" not in str(caught.value)
    assert "Weights only load failed" not in str(caught.value)


def test_claims_of_huge_sizes_allocate_nothing(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("file/data.pkl")
    number = pickle.BININT1 + b"\4"
    assert number in pickled
    huge = pickle.LONG1 + b"\6" + (2**44).to_bytes(6, "little")
    replace_pickle(path, pickled.replace(number, huge))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = PickledFile(path)
    assert file.tree["a"].numel() == 2**44
    with pytest.raises(CheckpointError, match="larger than its record"):
        file.read(file.tree["a"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(30.0).reshape(5, 6)
    path = tmp_path / "file.pt"
    torch.save({"all": base, "rows": base[2:4], "columns": base[:, :2], "none": base[:0]}, path)
    file = PickledFile(path)
    assert torch.equal(file.read(file.tree["rows"]), base[2:4].flatten())
    assert torch.equal(file.read(file.tree["rows"], 3, 5), base[2:4].flatten()[3:8])
    assert file.read(file.tree["none"]).numel() == 0
    with pytest.raises(CheckpointError, match="strides"):
        file.read(file.tree["columns"])
    with pytest.raises(CheckpointError, match="holds 12 elements, not 13"):
        file.read(file.tree["rows"], 3, 10)
    with pytest.raises(CheckpointError, match="has no tensor where one should be"):
        file.read("text")


VALUES = {
    "a": torch.arange(100.0),
    "b": torch.arange(40, dtype=torch.bfloat16).reshape(5, 8),
    "number": torch.tensor(7.0),
    "nested": [{"c": torch.ones(0)}, (1, 2.5, "text")],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "file.pt"
    torch.save(VALUES, path)
    return path, path.read_bytes()


@settings(max_examples=600, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutilated_files_give_one_error_or_the_same_values(sound: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = sound[0].with_name("mutilated.pt"), bytearray(sound[1])
    match data.draw(st.sampled_from(["cut", "flip", "bytes"])):
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "bytes":
            start = data.draw(st.integers(0, len(content) - 1))
            new = data.draw(st.binary(min_size=1, max_size=16))
            content[start : start + len(new)] = new
    path.write_bytes(content)
    try:
        file = PickledFile(path)
        found = {name: file.read(file.tree[name]) for name in ("a", "b", "number")}
        tail = file.tree["nested"][1]
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert all(torch.equal(value, VALUES[name].flatten()) for name, value in found.items())
    assert tail == VALUES["nested"][1]


def places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in a tree of containers."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(*place, key) for key, _ in items] + [found for k, v in items for found in places(v, (*place, k))]


JUNK = (None, -1, 2**70, 0.5, "text", [], {}, [3], {"a": 3}, torch.ones(2), torch.ones(0), torch.Size([2, 3]))


@pytest.mark.parametrize(
    "name",
    [
        "zero0-tied",
        "zero3-frozen",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2-tied", "zero1-frozen")),
    ],
)
def test_junk_anywhere_in_the_tree_gives_one_error(
    at_2: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    rng = random.Random(0)
    folder = copied(at_2[0] / name, tmp_path / "copy")
    num_refused = 0
    for path in sorted(folder.glob("*.pt")):
        content, sound_bytes = torch.load(path, weights_only=False), path.read_bytes()
        everywhere = [place for place in places(content) if place[0] not in ("ds_config", "args")]
        for place in rng.sample(everywhere, min(25, len(everywhere))):
            mutated = pickle.loads(pickle.dumps(content))
            parent = mutated
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = rng.choice(JUNK)
            torch.save(mutated, path)
            try:
                source = DeepSpeedSource(folder)
                for parameter, shape in source.shapes.items():
                    for kind in KINDS:
                        assert source.read(kind, parameter, 0, torch.Size(shape).numel()).dtype == torch.float32
            except CheckpointError:
                num_refused += 1
        path.write_bytes(sound_bytes)
    assert num_refused > 10
