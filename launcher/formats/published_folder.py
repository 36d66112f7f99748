"""Open folders of Hugging Face as they are published: plain, BitNet's, compressed-tensors' and MLX's.

The layouts are described in `quant.codes`, `quant.compressed_tensors` and `quant.mlx`. Which one a matrix has follows
from the tensors that are stored for it.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.tokenizer import file_in
from data.transformers_files import TOKENIZER_FILES
from launcher.checkpoint.location import local_folder
from launcher.checkpoint.tensor_file import TensorFile, TensorFileError
from launcher.errors import CheckpointError
from launcher.formats.hf_source import (
    ADAPTER,
    CONFIG,
    DERIVED,
    EMBEDDING,
    HEAD,
    Packing,
    dtype_name,
    naming,
    read_json,
    read_packing,
    weight_files,
)
from launcher.formats.published import Coded, Published, codes_of_values, counted, named
from model.hf import config_from_hf
from model.size import is_projection
from quant.codes import CODES_PER_BYTE, unpack_neighbors
from quant.rounding import quantize_weight

PART = re.compile(
    r"(?P<weight>.+\.weight)_(?P<part>packed|scale|shape|zero_point|g_idx)|(?P<layer>.+)\.(scales|biases)"
)
"""Names of tensors that belong to a matrix, and stand beside its codes."""

WIDTHS = (2, 4, 8)
"""Bits of an integer that are read."""

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
UNSAID = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
"""What compressed-tensors takes for keys that are not there."""
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
WHOLE_INPUTS = {"num_bits": 16, "type": "float"}
"""Which are not rounded."""
FORMS = {
    "bitnet": "Hugging Face folder, BitNet",
    "compressed-tensors": "Hugging Face folder, compressed-tensors",
    "mlx": "MLX folder",
    None: "Hugging Face folder",
}


def _rounding_of(inputs: Any) -> Literal["none", "int8-127.5"] | None:
    """How compressed-tensors rounds inputs, by a group's `input_activations`; None for what is not computed here."""
    given = UNSAID | inputs if isinstance(inputs, dict) else {}
    if inputs is None or given.items() >= WHOLE_INPUTS.items():
        return "none"
    return "int8-127.5" if given.items() >= INT8_INPUTS.items() else None


class PublishedFolder(Published):
    """A folder with `config.json` and safetensors.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._files: dict[str, TensorFile] = {}
        self._paths: dict[str, Path] = {}
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)
        self._packing: Packing | None = None
        self.form = FORMS[None]
        hf_config: dict[str, Any] = {}
        try:
            hf_config = read_json(folder / CONFIG)
        except CheckpointError as error:
            self.problems.append(str(error))
        quantization = hf_config.pop("quantization_config", None)
        quantization = hf_config.pop("quantization", quantization)
        self._quantization: dict[str, Any] = quantization if isinstance(quantization, dict) else {}
        try:
            self.config = config_from_hf(hf_config) if hf_config else None
        except ValueError as error:
            self.notes.append(f"{folder / CONFIG}: {error}; so names were not compared, and nothing was predicted")
        self._read_method()
        self._open_weights()
        self._check_tokens(hf_config)
        if (folder / ADAPTER).is_file():
            self.problems.append(
                f"{ADAPTER} is an adapter, which Transformers adds to the model; merge it, or remove it"
            )

    def _read_method(self) -> None:
        """What `config.json` says about the layers with codes."""
        method = self._quantization.get("quant_method", "mlx" if "bits" in self._quantization else None)
        if method not in FORMS or (method is None and self._quantization):
            self.problems.append(
                f"quant_method {method!r} in {CONFIG} is not read; bitnet, compressed-tensors and MLX's are"
            )
            return
        self.form = FORMS[method]
        if method == "bitnet":
            self.only_ternary, self.inputs = True, "int8"
            linear_class = self._quantization.get("linear_class", "bitlinear")
            self.form += (
                f", {linear_class}: weights are codes {'times' if linear_class == 'autobitlinear' else '/'} scale"
            )
            try:
                if self.config:
                    self._packing = read_packing(self._quantization, self.config)
            except ValueError as error:
                self.problems.append(f"{self._folder / CONFIG}: {error}")
        elif method == "compressed-tensors":
            groups = self._quantization.get("config_groups")
            inputs = [
                group.get("input_activations") for group in (groups.values() if isinstance(groups, dict) else ())
                if isinstance(group, dict)
            ]  # fmt: skip
            ways = {_rounding_of(each) for each in inputs}
            if ways == {"int8-127.5"}:
                self.inputs = "int8-127.5"
            elif ways - {"none"}:
                self.problems.append(
                    f"{CONFIG} rounds inputs of layers in another way than all to 8 bits by a scale for each token, "
                    f"which is not computed here: {json.dumps(inputs)[:200]}"
                )

    def _open_weights(self) -> None:
        paths: list[Path] = []
        try:
            paths = weight_files(self._folder)
        except CheckpointError as error:
            self.problems.append(str(error))
        complete = bool(paths)
        for path in paths:
            try:
                with naming(path):
                    file = TensorFile(path)
            except CheckpointError as error:
                self.problems.append(f"{error}; its tensors were not looked at. Take another copy of this file")
                complete = False
                continue
            for name in file.entries:
                if name in self._files:
                    self.problems.append(f"{path}: {name} is also in {self._paths[name].name}; remove one of the two")
                self._files[name], self._paths[name] = file, path
                if name.endswith(DERIVED):
                    continue
                found = PART.fullmatch(name)
                weight = (found["weight"] or f"{found['layer']}.weight") if found else name
                self._parts[weight][(found["part"] or found[4]) if found else ""] = name
        self.stored = list(self._parts)
        whole = [self._files[parts[""]].entries[parts[""]] for parts in self._parts.values() if [*parts] == [""]]
        self.stored_dtypes = frozenset(
            entry.dtype for entry in whole if entry.dtype.is_floating_point and len(entry.shape) > 1
        )
        if complete:
            self.compare_names(ignored=(HEAD,) if self.config and self.config.tie_embeddings else ())
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Compare what is stored as codes with what `config.json` says is."""
        codes = [name for name, parts in self._parts.items() if self._stored_as_bitnet(name, parts)]
        if codes and not self._quantization:
            self.problems.append(
                f"{counted(codes, 'matrix')} in packed codes ({named(codes)}), but {CONFIG} has no "
                'quantization_config, so programs would take the bytes for weights; "quant_method": "bitnet" is missing'
            )
        if self._packing is None or self._packing.online:
            return
        other = [
            name for name in self._parts if is_projection(name) and self._packing.applies_to(name) != (name in codes)
        ]
        if other:
            self.problems.append(
                f"{counted(other, 'matrix')} stored in another way than {CONFIG} says: {named(other)}; "
                "modules_to_not_convert must name the layers that are not packed, and no others"
            )

    def _stored_as_bitnet(self, name: str, parts: dict[str, str]) -> bool:
        return "" in parts and self._files[parts[""]].entries[parts[""]].dtype == torch.uint8

    def _check_tokens(self, hf_config: dict[str, Any]) -> None:
        """Look for special tokens that the embedding does not have."""
        if self.config is None:
            return
        token = hf_config.get("bos_token_id")
        self.first_token = token if type(token) is int and 0 <= token < self.config.vocab_size else None
        places = [(CONFIG, hf_config)]
        if (self._folder / GENERATION).is_file():
            try:
                places.append((GENERATION, read_json(self._folder / GENERATION)))
            except CheckpointError as error:
                self.problems.append(str(error))
        for place, content in places:
            for key in TOKENS:
                value = content.get(key)
                for each in value if isinstance(value, list) else [value]:
                    if each is not None and not (type(each) is int and 0 <= each < self.config.vocab_size):
                        self.problems.append(
                            f"{place}: {key} {each!r} is no token of the model, which has 0 to "
                            f"{self.config.vocab_size - 1}"
                        )

    def tokenizer_file(self) -> Path | None:
        return file_in(local_folder(self._folder, (*TOKENIZER_FILES, CONFIG)))

    def is_coded(self, name: str) -> bool:
        return bool({"packed", "scales", "scale"} & self._parts[name].keys())

    def read(self, name: str) -> Tensor | Coded:
        parts = self._parts[name]
        with naming(self._paths[next(iter(parts.values()))]):
            if "packed" in parts:
                return self._read_compressed(parts)
            if "scales" in parts or "biases" in parts:
                return self._read_mlx(name, parts)
            values = self._whole(parts, "")
            if self._stored_as_bitnet(name, parts):
                return self._read_bitnet(values, self._whole(parts, "scale"))
            if not values.is_floating_point():
                raise TensorFileError(f"{name} is {dtype_name(values.dtype)}, which no format here has")
            if "scale" in parts:
                raise TensorFileError(f"{name} is {dtype_name(values.dtype)} and has a scale, but no codes")
            values = values.float()
            if self._packing and self._packing.online and self._packing.applies_to(name):
                codes_OI, level = quantize_weight(values)
                return Coded(codes_OI.to(torch.int8), level)
            coded = codes_of_values(values) if is_projection(name) and values.dim() == 2 else None
            return values if coded is None else coded

    def _whole(self, parts: dict[str, str], part: str) -> Tensor:
        if part not in parts:
            raise TensorFileError(f"{next(iter(parts.values()))} is there, but its {part or 'codes'} is missing")
        file = self._files[parts[part]]
        return file.read(parts[part]).view(file.entries[parts[part]].shape)

    def _read_bitnet(self, packed_RI: Tensor, scale: Tensor) -> Coded:
        """Codes in four blocks of rows, each plus 1, and a scale that is multiplied by, or divided by."""
        if packed_RI.dim() != 2 or scale.numel() != 1 or not scale.is_floating_point():
            raise TensorFileError(f"codes of shape {tuple(packed_RI.shape)} and a scale of {tuple(scale.shape)}")
        bits = torch.cat([(packed_RI >> 2 * block) & 3 for block in range(CODES_PER_BYTE)])
        scale = scale.float().view(1, 1)
        divides = self._quantization.get("linear_class", "bitlinear") != "autobitlinear"
        return Coded(bits.to(torch.int8) - 1, 1 / scale if divides else scale)

    def _read_compressed(self, parts: dict[str, str]) -> Tensor | Coded:
        """Integers plus half of their range, from the low bits of int32 words up."""
        if {"zero_point", "g_idx"} & parts.keys():
            raise TensorFileError(f"{parts['packed']} has zero points or an order of its own, which is not read")
        words, scale = self._whole(parts, "packed"), self._whole(parts, "scale").float()
        shape = self._whole(parts, "shape").flatten().tolist()
        if words.dtype != torch.int32 or words.dim() != 2 or len(shape) != 2 or shape[0] != len(words):
            raise TensorFileError(f"{parts['packed']} of {dtype_name(words.dtype)} {tuple(words.shape)} is not {shape}")
        O, I = shape  # noqa: E741
        bits = next((bits for bits in WIDTHS if -(-I * bits // 32) == words.shape[1]), None)
        scale = scale.reshape(1, 1) if scale.numel() == 1 else scale.view(len(scale), -1)
        if bits is None or len(scale) not in (1, O) or not scale.shape[1] or I % scale.shape[1]:
            raise TensorFileError(f"{parts['packed']} {tuple(words.shape)}, scale {tuple(scale.shape)}, shape {shape}")
        codes_OI = (unpack_neighbors(words.view(torch.uint8), bits)[:, :I].short() - 2 ** (bits - 1)).to(torch.int8)
        coded = Coded(codes_OI, scale)
        return coded if bits == 2 else coded.values()

    def _read_mlx(self, name: str, parts: dict[str, str]) -> Tensor | Coded:
        """Unsigned integers from the low bits of uint32 words up, times a scale plus a bias for each group."""
        words, scales, biases = (self._whole(parts, part) for part in ("", "scales", "biases"))
        own = self._quantization.get(name.removesuffix(".weight"))
        group_size = (own if isinstance(own, dict) else self._quantization).get("group_size")
        if words.dtype != torch.uint32 or words.dim() != 2 or scales.shape != biases.shape or len(scales) != len(words):
            raise TensorFileError(f"{name} {tuple(words.shape)}, scales {tuple(scales.shape)}: not of MLX")
        width = group_size * scales.shape[1] if type(group_size) is int else 0
        bits = next((bits for bits in WIDTHS if bits * width == 32 * words.shape[1]), None)
        if not width or bits is None:
            raise TensorFileError(
                f"{name} {tuple(words.shape)} with scales {tuple(scales.shape)} and group_size {group_size}: "
                f"gives no width of {', '.join(map(str, WIDTHS))} bits"
            )
        codes, scales, biases = unpack_neighbors(words.view(torch.uint8), bits), scales.float(), biases.float()
        if bits == 2 and torch.equal(biases, -scales):
            return Coded(codes.to(torch.int8) - 1, scales)
        wide = codes.float().unflatten(1, (-1, width // scales.shape[1]))
        return (wide * scales[..., None] + biases[..., None]).flatten(1)

    def tied_problem(self) -> str | None:
        """A head that is stored besides the embedding that it is tied to, and differs."""
        if self.config is None or not self.config.tie_embeddings or not {HEAD, EMBEDDING} <= self._parts.keys():
            return None
        head, embedding = self.read(HEAD), self.read(EMBEDDING)
        if isinstance(head, Tensor) and isinstance(embedding, Tensor) and torch.equal(head, embedding):
            return None
        return (
            f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true, so programs drop it; "
            "set tie_word_embeddings to false if the head was trained"
        )
