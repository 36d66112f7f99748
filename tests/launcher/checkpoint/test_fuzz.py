"""Checkpoints that were damaged, or that lie, end in one clear error or load as if nothing had happened."""

import json
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import limited
from ranks import run_group
from runs import run
from tiny import tiny_config

from launcher.checkpoint.load import check_fits
from launcher.checkpoint.manifest import manifest_digest
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import KINDS
from launcher.errors import CheckpointError

Files = dict[str, bytes]
RANK_FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
MANIFEST = "manifest.json"

NASTY_VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**62, 2**63, 2**200, -(2**63), 0.0, 1.5, -0.5, 1e308, "", "0", "F32", "I32",
    "BF16", "F64", "F8_E4M3", "../../etc/passwd", "/etc/passwd", "rank-00007.safetensors",
    "rank-\u0660\u0660\u0660\u0660\u0660.safetensors",
    "config.yaml", "manifest.json", "\0", "\ud800", "x" * 5000, "0" * 32, [], {}, [0], [1], [-1, -1], [2**62] * 64,
    [2**62] * 65, [1] * 200_000, [[]], {"": {}}, {"size": 1, "digest": "0" * 32}, {"shape": [1], "start": 0, "step": 0},
]  # fmt: skip
NASTY_JSON = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 100_000,
    "",
    "'",
    "\\",
    "// x",
]
"""What no serializer writes; put in place of a value."""


def two_ranks(shards: str, out: str) -> None:
    run(tiny_config(Path(shards), Path(out)), 3)


@pytest.fixture(scope="module")
def checkpoint(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    out = tmp_path_factory.mktemp("fuzz") / "run"
    run_group(2, two_ranks, str(shards), str(out))
    return {path.name: path.read_bytes() for path in (out / "checkpoints" / "step-00000003").iterdir()}


def load(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """All that a run reads when it goes on, in the order in which it does."""
    reader = CheckpointReader(folder)
    if problems := list(reader.damage()):
        raise CheckpointError("\n".join(problems))
    shapes = shapes or reader.shapes
    check_fits(reader, shapes)
    manifest = reader.manifest
    counters = {key: value for key, value in vars(manifest).items() if key not in ("files", "digest")}
    state: dict[str, Any] = {"counters": counters}
    for name, shape in shapes.items():
        for kind in KINDS if reader.has_moments else KINDS[:1]:
            state[f"{kind}/{name}"] = reader.read(kind, name, 0, torch.Size(shape).numel())
        state[f"step/{name}"] = reader.read_step(name)
    for rank in range(2):
        for name, value in reader.rng_states(rank).items():
            state[f"rng/{rank}/{name}"] = value
    return state


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    keys = sorted(ours.keys() ^ theirs.keys())
    for key in ours.keys() & theirs.keys():
        equal = torch.equal(ours[key], theirs[key]) if isinstance(ours[key], torch.Tensor) else ours[key] == theirs[key]
        keys += [] if equal else [key]
    return keys


class Trial:
    """Writes mutants and looks at what comes of them."""

    def __init__(self, files: Files) -> None:
        self.files, self.outcomes = files, Counter[str]()
        with self.placed(files) as folder:
            self.expected = load(folder)
            self.shapes = CheckpointReader(folder).shapes

    @contextmanager
    def placed(self, files: Files) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "step-00000003")
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            yield folder

    def attack(self, files: Files, may_differ: Callable[[str], bool] = lambda key: False) -> None:
        """Load a mutant.

        Args:
            files: the mutant.
            may_differ: whether what is loaded under such a name may be other than it was.
        """
        message = ""
        with self.placed(files) as folder, limited():
            try:
                state = load(folder, self.shapes)
            except CheckpointError as error:
                message = str(error)
        self.outcomes["refused" if message else "harmless"] += 1
        if message:
            assert str(folder) in message
            assert len(message) < 2000
        else:
            assert [key for key in differences(state, self.expected) if not may_differ(key)] == []


def attacked(trial: Trial, examples: int, attack: Callable[[st.DataObject], None]) -> None:
    """Draw so many mutants, the same ones each time."""
    settings(max_examples=examples, derandomize=True, database=None)(given(st.data())(attack))()
    print(f"{sum(trial.outcomes.values())} mutants: {dict(trial.outcomes)}")  # noqa: T201
    assert sum(trial.outcomes.values()) >= examples


def share(some: int, many: int) -> Any:
    return pytest.mark.parametrize("examples", [some, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture
def trial(checkpoint: Files) -> Trial:
    return Trial(checkpoint)


@share(150, 1500)
def test_bytes_of_any_file(trial: Trial, examples: int) -> None:
    def attack(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(trial.files)))
        whole = bytearray(trial.files[name])
        # Beginnings and ends are where lengths, headers and digests are.
        near = st.integers(0, min(200, len(whole) - 1))
        at = data.draw(near | near.map(lambda n: len(whole) - 1 - n) | st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "overwrite", "insert", "remove", "empty", "missing", "swap"]))
        some = data.draw(st.binary(min_size=1, max_size=40))
        if kind == "flip":
            whole[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del whole[at:]
        elif kind == "overwrite":
            whole[at : at + len(some)] = some
        elif kind == "insert":
            whole[at:at] = some
        elif kind == "remove":
            del whole[at : at + len(some)]
        elif kind == "empty":
            whole.clear()
        files = trial.files | {name: bytes(whole)}
        if kind == "missing":
            del files[name]
        elif kind == "swap":
            other = data.draw(st.sampled_from(sorted(trial.files)))
            files |= {name: trial.files[other], other: trial.files[name]}
        trial.attack(files)

    attacked(trial, examples, attack)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a tree of JSON."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def mutate_json(data: st.DataObject, tree: Any, within: tuple[Any, ...] = ()) -> bytes:
    """Change one place of a tree, and write it.

    Args:
        data: what is drawn from.
        tree: is left as it is.
        within: only places below this one are changed.
    """
    tree = json.loads(json.dumps(tree))
    path = data.draw(st.sampled_from([path for path in places(tree) if path[: len(within)] == within]))
    kind = data.draw(st.sampled_from(["replace", "raw", "delete", "rename", "add", "swap"]))
    if not path:
        value = data.draw(st.sampled_from(NASTY_VALUES))
        return json.dumps(value).encode()
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], data.draw(st.sampled_from(NASTY_VALUES))
    raw = data.draw(st.sampled_from(NASTY_JSON))
    if kind == "replace":
        parent[key] = value
    elif kind == "raw":
        parent[key] = "@raw@"
        return json.dumps(tree).replace('"@raw@"', raw).encode()
    elif kind == "delete":
        del parent[key]
    elif kind == "swap" and len(parent) > 1:
        keys = sorted(parent) if isinstance(parent, dict) else list(range(len(parent)))
        other = data.draw(st.sampled_from(keys))
        parent[key], parent[other] = parent[other], parent[key]
    elif isinstance(parent, dict):
        name = value if isinstance(value, str) else "other"
        parent[name] = parent.pop(key) if kind == "rename" else value
    else:
        parent.append(value)
    return json.dumps(tree).encode()


def with_digest(text: bytes) -> bytes:
    """A manifest with a digest that is right for whatever is in it, if that can be."""
    try:
        manifest = json.loads(text)
        manifest["digest"] = manifest_digest(manifest)
        return json.dumps(manifest).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text


def is_counter(key: str) -> bool:
    """Whether what is loaded under this name may be another number in a checkpoint that lies about it."""
    return key == "counters" or key.startswith("step/")


@share(200, 2000)
def test_manifests_that_lie(trial: Trial, examples: int) -> None:
    manifest = json.loads(trial.files[MANIFEST])

    def attack(data: st.DataObject) -> None:
        within = data.draw(st.sampled_from([(), ("files",), ("progress",), ("precision",)]))
        trial.attack(trial.files | {MANIFEST: with_digest(mutate_json(data, manifest, within))}, is_counter)

    attacked(trial, examples, attack)


def parts(file: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Header, data and digests of a file of tensors."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    start, _ = header["digests"]["data_offsets"]
    return header, file[8 + length :], file[8 + length + start :]


def with_header(files: Files, name: str, text: bytes) -> Files:
    """A checkpoint in which a file has this header, and a manifest that vouches for it."""
    _, data, digests = parts(files[name])
    text += b" " * (-len(text) % 8)
    file = struct.pack("<Q", len(text)) + text + data
    manifest = json.loads(files[MANIFEST])
    manifest["files"][name] = {"size": len(file), "digest": xxhash.xxh3_128_hexdigest(text + digests)}
    return files | {name: file, MANIFEST: with_digest(json.dumps(manifest).encode())}


@share(200, 2000)
def test_headers_that_lie(trial: Trial, examples: int) -> None:
    def attack(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(RANK_FILES))
        header, _, _ = parts(trial.files[name])
        if data.draw(st.booleans()):
            ranges = json.loads(header["__metadata__"]["ranges"])
            header["__metadata__"]["ranges"] = mutate_json(data, ranges).decode()
            text = json.dumps(header).encode()
        else:
            text = mutate_json(data, header)
        trial.attack(with_header(trial.files, name, text), is_counter)

    attacked(trial, examples, attack)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"start": 1}, "holds model.norm.weight from element 1, where 0 is the next"),
        ({"shape": [72]}, "another shape, number of updates"),
        ({"step": 2.0}, "another shape, number of updates"),
        ({"step": float("nan")}, "does not say which range of model.norm.weight it holds"),
        ({"shape": [2**62, 2**62]}, "another shape, number of updates"),
    ],
)
def test_what_a_range_that_lies_is_told(trial: Trial, change: dict[str, Any], complaint: str) -> None:
    header, _, _ = parts(trial.files[RANK_FILES[0]])
    ranges = json.loads(header["__metadata__"]["ranges"])
    ranges["model.norm.weight"] |= change
    header["__metadata__"]["ranges"] = json.dumps(ranges)
    files = with_header(trial.files, RANK_FILES[0], json.dumps(header).encode())
    with trial.placed(files) as folder, pytest.raises(CheckpointError, match=complaint):
        load(folder)


def test_a_manifest_reaches_no_file_outside_its_folder(trial: Trial) -> None:
    manifest = json.loads(trial.files[MANIFEST])
    for name in ("../../etc/passwd", "/etc/passwd", "sub/rank-00000.safetensors"):
        manifest["files"][name] = {"size": 1, "digest": "0" * 32}
        files = trial.files | {MANIFEST: with_digest(json.dumps(manifest).encode())}
        with trial.placed(files) as folder, pytest.raises(CheckpointError, match="which is not a file of a checkpoint"):
            load(folder)
        del manifest["files"][name]


def test_a_file_that_the_manifest_leaves_out_leaves_a_gap(trial: Trial) -> None:
    manifest = json.loads(trial.files[MANIFEST])
    del manifest["files"][RANK_FILES[0]]
    files = trial.files | {MANIFEST: with_digest(json.dumps(manifest).encode())}
    with trial.placed(files) as folder, pytest.raises(CheckpointError, match=r"rank-00001\.safetensors holds .* from"):
        load(folder)
