"""Read Hugging Face folders as a source: `config.json` and safetensors, in one file or several.

Nothing but ranges of tensors is ever in memory, and Transformers is not needed.

A packed BitNet folder (`quantization_config` of method `bitnet`) holds codes and one scale a matrix in place of the
projections' weights; `quant.codes` has the layout. Its scale has two conventions, by the class of linear layer that
Transformers computes with: `autobitlinear` multiplies by it, `bitlinear` divides. What is read are latent weights,
``code * scale``.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.names import bare_name
from data.pointers import pointer_problem
from launcher.checkpoint.location import reaching
from launcher.checkpoint.source import PIECE_ELEMENTS, Source
from launcher.checkpoint.tensor_file import Entry, TensorFile, TensorFileError
from launcher.errors import CheckpointError
from model.config import ModelConfig
from model.hf import config_from_hf
from model.size import is_projection, parameter_shapes
from quant.codes import CODES_PER_BYTE, unpack_block

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


PICKLE = "pytorch_model.bin"


ADAPTER = "adapter_config.json"
"""PEFT's; where it is installed, Transformers adds the adapter to the model that is loaded."""


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


DERIVED = "rotary_emb.inv_freq"
"""End of the names of a buffer that old Llama folders hold and every program computes."""


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


HF_FOLDER = "Hugging Face folder"


def weights_alone(form: str) -> tuple[str, ...]:
    """What a folder or file of weights alone does not hold, a sentence each."""
    return (
        f"The {form} holds no optimizer moments: the optimizer starts over.",
        f"The {form} holds no data position: the data start at their beginning.",
        f"The {form} holds no state of random generators and no counters of steps and tokens: they start over.",
    )


NOT_IN_16_BITS = "The folder holds weights in {}: what fp32 weights had below that was rounded away."


ROUNDED_WHILE_COMPUTING = (
    "The folder holds latent weights, which Transformers rounds to ternary codes while it computes; a 16-bit phase "
    "computes with them as they are."
)


NOT_IN_CODES = (
    "The {} holds packed ternary codes: what the latent weights were between the codes is not in it. Code times "
    "scale is read instead. For these an absmean quantizer finds the same codes, but a scale that is smaller by the "
    "share of zeros; absmedian finds the stored scale where fewer than half of the codes are zeros."
)


def is_hf(folder: Path) -> bool:
    """Return whether a folder is meant to be one of Hugging Face's; it may still be damaged."""
    with reaching(folder):
        return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, INDEX))


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds a model of Hugging Face with its weights, as far as its names say."""
    with reaching(folder):
        return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))


@dataclass(frozen=True)
class Packing:
    """The packing of a folder's projections."""

    divides: bool
    """Whether a weight is its code divided by the scale, or multiplied by it."""
    left_out: tuple[str, ...]
    """Modules of these names are not packed, nor those inside of them, nor those whose names end like this.

    This is the rule of Transformers 5.24. Versions before 5 leave out every module that has one in its name.
    """
    online: bool
    """Whether the weights are stored in 16 bits and quantized while computing."""

    def applies_to(self, name: str) -> bool:
        """Return whether the parameter of this name is packed."""
        return is_projection(name) and not self.leaves_out(name.removesuffix(".weight"))

    def leaves_out(self, module: str) -> bool:
        """Return whether the module of this name is not quantized."""
        return any(
            re.match(rf"{left_out}(?:(?<=\.)|(?=\.|$))", module) or module.endswith(left_out)
            for left_out in self.left_out
        )


@dataclass(frozen=True)
class FolderModel:
    """The model that a `config.json` describes."""

    config: ModelConfig
    packing: Packing | None
    """None where the weights are computed with as they are."""
    bos_token_id: Any
    """As it is written there."""

    @property
    def ternary(self) -> tuple[str, ...]:
        """Weights that Transformers computes with as codes, whether they are stored as such or not."""
        packing = self.packing
        return tuple(name for name in parameter_shapes(self.config) if packing and packing.applies_to(name))

    def first_token(self, location: str) -> int | None:
        """The token before a text; None where the tokenizer says it.

        Raises:
            CheckpointError: what is written there is no token.
        """
        token = self.bos_token_id
        if token is None or (type(token) is int and 0 <= token < self.config.vocab_size):
            return token
        raise CheckpointError(
            f"{location}/{CONFIG}: bos_token_id {token!r} must be one token, 0 to {self.config.vocab_size - 1}, or null"
        )


def read_model(folder: Path) -> FolderModel:
    """Read a folder's `config.json`.

    Raises:
        CheckpointError: it is missing or damaged, or describes what this model does not compute.
    """
    hf_config = read_json(folder / CONFIG)
    with naming(folder / CONFIG):
        quantization = hf_config.pop("quantization_config", None)
        if quantization is None and "quantization" in hf_config:
            raise ValueError("quantization: is of a folder of MLX, which is not read")
        config = config_from_hf(hf_config)
        return FolderModel(config, read_packing(quantization, config), hf_config.get("bos_token_id"))


class HuggingFaceSource(Source):
    """A folder of one of the families in `model.hf`, opened: names, shapes and dtypes have been checked.

    Args:
        folder: with `config.json` and `model.safetensors`, or the files that an index names.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of `config.json`'s model, in which
            case it lists all that is wrong with them.
    """

    has_moments = False

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.model = read_model(folder)
        if (folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{folder}: holds an adapter ({ADAPTER}), whose weights would be left out; merge it into the model "
                f"(`merge_and_unload` of PEFT) and save that, or remove {ADAPTER} to take the model without it"
            )
        self.model_config, packing = self.model.config, self.model.packing
        self._packing = None if packing and packing.online else packing
        self.is_packed = self._packing is not None
        self._files: dict[str, TensorFile] = {}
        self._paths: dict[str, Path] = {}
        for path in weight_files(folder):
            with naming(path):
                file = TensorFile(path)
            for name in file.entries:
                if name in self._files:
                    raise CheckpointError(f"{path}: {name} is also in {self._paths[name].name}")
                self._files[name], self._paths[name] = file, path
        found = {name: file.entries[name] for name, file in self._files.items() if not name.endswith(DERIVED)}
        if self.model_config.tie_embeddings and HEAD in found:
            del found[HEAD]
            if EMBEDDING in found:
                self._check_tied()
        if self.model_config.num_layers > len(found):
            raise CheckpointError(
                f"{folder / CONFIG}: num_hidden_layers is {self.model_config.num_layers}, "
                f"but the folder holds only {len(found)} tensors"
            )
        self.shapes = parameter_shapes(self.model_config)
        self.ternary = self.model.ternary
        if problems := _problems(found, self.shapes, self._packing):
            raise CheckpointError(listed(f"{folder} does not hold the model that its {CONFIG} describes", problems))
        self.missing = weights_alone(HF_FOLDER)
        self.stored_dtypes = frozenset(found[name].dtype for name in self.shapes if found[name].dtype.is_floating_point)
        if narrow := self.stored_dtypes & {torch.bfloat16, torch.float16}:
            self.missing += (NOT_IN_16_BITS.format(" and ".join(sorted(map(dtype_name, narrow)))),)
        if self._packing:
            self.missing += (NOT_IN_CODES.format(HF_FOLDER),)
        elif self.ternary:
            self.missing += (ROUNDED_WHILE_COMPUTING,)

    @property
    def first_token(self) -> int | None:
        """See `FolderModel.first_token`."""
        return self.model.first_token(self.location)

    def _check_tied(self) -> None:
        """Make sure that a head that is stored besides the embedding holds the same; else it was trained by itself."""
        head, embedding = (self._files[name].entries[name] for name in (HEAD, EMBEDDING))
        same = head.shape == embedding.shape
        for start in range(0, head.num_elements if same else 0, PIECE_ELEMENTS):
            length = min(PIECE_ELEMENTS, head.num_elements - start)
            pieces = [self._files[name].read(name, start, length).float() for name in (HEAD, EMBEDDING)]
            same = same and torch.equal(*pieces)
        if not same:
            raise CheckpointError(
                f"{self.location}: {HEAD} differs from {EMBEDDING}, and {CONFIG} says tie_word_embeddings true, with "
                "which Transformers drops it; set tie_word_embeddings to false if it was trained, or remove it"
            )

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        if kind != "weight":
            raise CheckpointError(f"{self.location}: a Hugging Face folder holds no {kind}")
        with naming(self._paths[name]):
            if self._packing and self._packing.applies_to(name):
                return self._read_packed(name, start, length, divides=self._packing.divides)
            return self._files[name].read(name, start, length).float()

    def _read_packed(self, name: str, start: int, length: int, *, divides: bool) -> Tensor:
        """Unpack the bytes that the range needs: from each fourth of the rows it meets, a range as well."""
        file, num_bytes = self._files[name], self._files[name].entries[name].num_elements
        if start + length > CODES_PER_BYTE * num_bytes:
            raise TensorFileError(f"{name} holds {CODES_PER_BYTE * num_bytes} codes, not {start + length}")
        values = torch.empty(length)
        for block in range(CODES_PER_BYTE):
            first, last = max(start, block * num_bytes), min(start + length, (block + 1) * num_bytes)
            if first < last:
                packed = file.read(name, first - block * num_bytes, last - first)
                values[first - start : last - start] = unpack_block(packed, block)
        scale = self._scale(name)
        return values / scale if divides else values * scale

    def _scale(self, name: str) -> Tensor:
        scale_name = f"{name}_scale"
        scale = self._files[scale_name].read(scale_name).float()
        if not (0 < scale.item() < torch.inf and 1 / scale < torch.inf):
            raise TensorFileError(f"{scale_name} is {scale.item()} and must be positive")
        return scale

    def packed(self, name: str) -> tuple[Tensor, Tensor]:
        """The codes of a packed weight as they are stored, uint8 [O / 4, I], and what they are multiplied by, [1, 1].

        Raises:
            CheckpointError: a byte or the scale is none that may be there, or the layer has a bias that Transformers
                multiplies by the scale of the weights.
        """
        assert self._packing is not None, "the folder is not packed"
        if not self._packing.divides and name.replace(".weight", ".bias") in self.shapes:
            raise CheckpointError(
                f"{self.location}: Transformers' autobitlinear multiplies the bias of {name} by the weights' scale, "
                "which is not computed here; a folder of linear_class bitlinear is read"
            )
        file = self._files[name]
        with naming(self._paths[name]):
            packed_RI, scale = file.read(name).view(file.entries[name].shape), self._scale(name)
            for block in range(CODES_PER_BYTE):
                unpack_block(packed_RI, block)  # raises where a byte is none
        return packed_RI, (1 / scale if self._packing.divides else scale).view(1, 1)

    def read_step(self, name: str) -> float:
        raise CheckpointError(f"{self.location}: a Hugging Face folder holds no optimizer state")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn any problem of a file into one error that names it."""
    with reaching(path):
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: it is missing, or is none.
    """
    with naming(path):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; a Hugging Face folder must have it")
        if problem := pointer_problem(path):
            raise ValueError(problem)
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"must hold a JSON object, not a {type(content).__name__}")
    return content


def read_packing(quantization: Any, model: ModelConfig) -> Packing | None:
    """Read `quantization_config` of a model; None where the weights are stored as they are."""
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or method != "bitnet":
        raise ValueError(f"quantization_config of {method!r}: only quant_method 'bitnet' is read")
    layer = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    left_out = quantization.get("modules_to_not_convert")
    if left_out is None:  # Transformers leaves out the head, and the module of the last parameter
        left_out = ["lm_head", [*parameter_shapes(model)][-1].removesuffix(".weight")]
    problems = []
    if layer not in ("bitlinear", "autobitlinear"):
        problems.append(f"linear_class {layer!r} is not known; only bitlinear and autobitlinear are read")
    if mode not in ("offline", "online"):
        problems.append(f"quantization_mode {mode!r} is not known; only offline and online are read")
    if quantization.get("use_rms_norm"):
        problems.append("use_rms_norm true: the model has no norm of its own in each linear layer")
    if not isinstance(left_out, list) or not all(isinstance(part, str) for part in left_out):
        problems.append(f"modules_to_not_convert {left_out!r}: must be a list of names")
    elif patterns := [part for part in left_out if not re.fullmatch(r"[\w.-]*", part)]:
        problems.append(f"modules_to_not_convert {patterns!r}: are patterns, and only names of whole modules are read")
    if problems:
        raise ValueError(listed("its quantization_config cannot be read", problems))
    online = layer == "autobitlinear" and mode == "online"
    packing = Packing(divides=layer == "bitlinear", left_out=tuple(left_out), online=online)
    if online and not packing.leaves_out("lm_head"):
        raise ValueError(
            f"its quantization_config has modules_to_not_convert {left_out!r}, without lm_head, so that Transformers "
            "rounds the output head as well, which is only computed in 16 bits here; add lm_head to the list if the "
            "head was trained in 16 bits"
        )
    return packing


def weight_files(folder: Path) -> list[Path]:
    """The files to read, which all exist; a single file takes precedence over an index, as in Transformers."""
    with naming(folder):
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        if not (folder / INDEX).is_file():
            pickled = (folder / PICKLE).is_file()
            advice = f"; {PICKLE} is a pickle, which is never opened: save the model as safetensors" if pickled else ""
            raise ValueError(f"has neither {WEIGHTS} nor {INDEX}{advice}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    with naming(folder / INDEX):
        if not weight_map or not isinstance(weight_map, dict) or any(type(v) is not str for v in weight_map.values()):
            raise ValueError("must have a weight_map from names of tensors to names of files")
        names = sorted({bare_name(name) for name in weight_map.values()})
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"names files that do not exist: {', '.join(absent)}")
    return [folder / name for name in names]


def _problems(found: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], packing: Packing | None) -> list[str]:
    """Everything in which the stored tensors differ from those that belong there."""
    problems = []
    vocabulary = {name: shape for name, shape in shapes.items() if name in (EMBEDDING, HEAD)}
    rows = {found[name].shape[0] for name in vocabulary if name in found and found[name].shape}
    if len(rows) == 1 and rows != {shapes[EMBEDDING][0]}:
        (num_rows,) = rows
        problems.append(
            f"vocabulary: {CONFIG} says vocab_size {shapes[EMBEDDING][0]} and the embedding has {num_rows} rows; "
            f'"vocab_size": {num_rows} is right for these files, rows that no token uses included'
        )
        shapes = {**shapes, **{name: (num_rows, shape[1]) for name, shape in vocabulary.items()}}
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    for name, shape in shapes.items():
        expected[name] = shape, FLOATS
        if packing and packing.applies_to(name):
            if shape[0] % CODES_PER_BYTE:
                problems.append(f"{name} has {shape[0]} rows, and only a multiple of {CODES_PER_BYTE} can be packed")
            expected[name] = (shape[0] // CODES_PER_BYTE, shape[1]), (torch.uint8,)
            expected[f"{name}_scale"] = (1,), FLOATS
    problems += [f"missing: {name} {shape}" for name, (shape, _) in expected.items() if name not in found]
    problems += [f"not in the model: {name} {entry.shape}" for name, entry in found.items() if name not in expected]
    for name, (shape, dtypes) in expected.items():
        if name in found and found[name].shape != shape:
            problems.append(f"shape: {name} is {found[name].shape} and must be {shape}")
        if name in found and found[name].dtype not in dtypes:
            problems.append(
                f"dtype: {name} is {dtype_name(found[name].dtype)} and must be {' or '.join(map(dtype_name, dtypes))}"
            )
    return problems


def listed(what: str, problems: list[str]) -> str:
    """Problems, each in a line of its own; what is said alike of several parameters is said of the first."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        name, _, rest = problem.partition(" ")
        alike.setdefault(rest if name.endswith((".weight", ".bias")) else problem, []).append(problem)
    lines = (first + (f" (and {len(more)} more like it)" if more else "") for first, *more in alike.values())
    return "\n  ".join([f"{what}:", *lines])


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in other programs."""
    return str(dtype).removeprefix("torch.")
