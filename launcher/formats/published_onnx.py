"""Open folders for ONNX Runtime that Tritrain wrote: the weights of their graphs.

The layout of a ternary matrix is in `quant.onnx`. What the graph computes with them is not looked at, but for the
rounding of inputs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import file_in
from data.transformers_files import TOKENIZER_FILES
from launcher.checkpoint.location import local_folder
from launcher.checkpoint.tensor_file import TensorFileError, range_reader
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.hf_source import CONFIG, naming, read_json
from launcher.formats.onnx_export import ACCURACY, GRAPH
from launcher.formats.onnx_graph import CONTRIBUTED, DATA, PRODUCER
from launcher.formats.published import Coded, Published
from model.hf import config_from_hf
from quant.codes import unpack_neighbors
from quant.onnx import BITS, block_shapes

LARGEST_GRAPH_BYTES = 2**28
"""A graph has no weights in it; larger ones are none that Tritrain writes."""


def is_onnx(folder: Path) -> bool:
    """Return whether a folder is meant to be one for ONNX Runtime; it may still be damaged."""
    return (folder / GRAPH).is_file()


class PublishedONNX(Published):
    """A folder with `model.onnx`, its weights and `config.json`.

    Args:
        folder: the folder.

    Raises:
        ConfigError: the `onnx` package is missing.
    """

    form = "ONNX folder"
    stored_dtypes = frozenset({torch.float32})

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._weights: dict[str, Any] = {}
        self._products: dict[str, dict[str, int]] = {}
        """Attributes of MatMulNBits, by the weight."""
        try:
            hf_config = read_json(folder / CONFIG)
            token = hf_config.get("bos_token_id")
            with naming(folder / CONFIG):
                self.config = config_from_hf(hf_config)
            self.first_token = token if type(token) is int and 0 <= token < self.config.vocab_size else None
            with naming(folder / GRAPH):
                self._open_graph()
        except CheckpointError as error:
            self.problems.append(str(error))
            return
        with naming(folder / DATA):
            self._size = (folder / DATA).stat().st_size if (folder / DATA).is_file() else 0
            self._read_bytes = range_reader(folder / DATA) if self._size else None
        scales = {f"{name}_scale" for name in self._products}
        self.stored = [name for name in self._weights if name.endswith((".weight", ".bias")) and name not in scales]
        self.compare_names()

    def _open_graph(self) -> None:
        try:
            from google.protobuf.message import DecodeError
            from onnx import ModelProto
        except ImportError as error:
            raise ConfigError("ONNX files need the `onnx` package: pip install -e '.[onnx]'") from error
        path = self._folder / GRAPH
        if path.stat().st_size > LARGEST_GRAPH_BYTES:
            raise TensorFileError(f"has {path.stat().st_size} bytes; only graphs with weights in {DATA} are read")
        try:
            model = ModelProto.FromString(path.read_bytes())
        except (DecodeError, RecursionError) as error:
            raise TensorFileError(f"is not an ONNX graph: {error}") from error
        if model.producer_name != PRODUCER:
            raise TensorFileError(f"was made by {model.producer_name!r:.40}; only graphs that Tritrain wrote are read")
        self._weights = {each.name: each for each in model.graph.initializer}
        places = [place for each in model.graph.initializer for place in each.external_data]
        texts = [*self._weights, *(text for place in places for text in (place.key, place.value))]
        if not all(isinstance(text, str) for text in texts):  # protobuf gives the bytes of what is not UTF-8
            raise TensorFileError("is damaged: it has names that are no text")
        for node in model.graph.node:
            if node.op_type == "MatMulNBits" and node.domain == CONTRIBUTED and len(node.input) > 1:
                self._products[node.input[1]] = {each.name: each.i for each in node.attribute}
        if any(each.get("accuracy_level") == ACCURACY["int8"] for each in self._products.values()):
            self.inputs = "int8"

    def tokenizer_file(self) -> Path | None:
        return file_in(local_folder(self._folder, (*TOKENIZER_FILES, CONFIG)))

    def is_coded(self, name: str) -> bool:
        return name in self._products

    def read(self, name: str) -> Tensor | Coded:
        with naming(self._folder / DATA):
            if name not in self._products:
                return self._values(name, np.float32)
            given = self._products[name]
            O, I, size = (given.get(key, 0) for key in ("N", "K", "block_size"))  # noqa: E741
            if given.get("bits") != BITS or min(O, I) < 1 or size < 16:
                raise TensorFileError(f"{name} is multiplied with attributes {given}, which is not read")
            packed, scale = self._values(name, np.uint8), self._values(f"{name}_scale", np.float32)
            bytes_shape, scale_shape = block_shapes((O, I), size)
            if packed.shape != bytes_shape or scale.shape != scale_shape:
                raise TensorFileError(f"{name} is {tuple(packed.shape)}, its scales {tuple(scale.shape)}: not {given}")
            codes_OI = unpack_neighbors(packed.flatten(1))[:, :I].to(torch.int8) - 2
            if I % size and not (scale == scale[:, :1]).all():
                raise TensorFileError(f"{name} has blocks of {size} with scales of their own, and rows of {I}")
            return Coded(codes_OI, scale[:, :1] if I % size else scale)

    def _values(self, name: str, kind: type[np.generic]) -> Tensor:
        from onnx import helper

        if name not in self._weights:
            raise TensorFileError(f"{name} is missing")
        weight, dtype = self._weights[name], np.dtype(kind)
        place = {each.key: each.value for each in weight.external_data}
        shape = tuple(weight.dims)
        offset, length = place.get("offset", ""), place.get("length", "")
        numbers = offset.isdecimal() and length.isdecimal()
        if place.get("location") != DATA or not numbers or min(shape, default=0) < 0:
            raise TensorFileError(f"{name} is not in {DATA}")
        if weight.data_type != helper.np_dtype_to_tensor_dtype(dtype):
            raise TensorFileError(f"{name} is of type {weight.data_type}, not {dtype.name}")
        start, num_bytes = int(offset), int(length)
        if num_bytes != dtype.itemsize * int(np.prod(shape, dtype=object)):
            raise TensorFileError(f"{name} has {num_bytes} bytes, which is not shape {shape}")
        if start + num_bytes > self._size or self._read_bytes is None:
            raise TensorFileError(f"is cut off: {name} ends at byte {start + num_bytes}, and it has {self._size}")
        values = np.frombuffer(self._read_bytes(start, num_bytes), dtype).reshape(shape)
        return torch.from_numpy(values.copy())
