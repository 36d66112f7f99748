"""Folders for ONNX Runtime: a graph, and beside it the codes of ternary layers and everything else in fp32."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from launcher.checkpoint.load import check_fits
from launcher.checkpoint.location import create, new_location, reaching
from launcher.checkpoint.source import in_pieces
from launcher.checkpoint.tensor_file import byte_view
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.codes import CodedMatrices
from launcher.formats.hf_export import INPUTS, common_files
from launcher.formats.hf_folder import to_json, write_bytes
from launcher.formats.hf_source import CONFIG, listed
from launcher.formats.onnx_graph import CONTRIBUTED, DATA, Graph, decoder
from launcher.formats.opened import Exportable
from launcher.plan.exports import hf_problems, onnx_problems
from model.size import parameter_shapes
from quant.compressed_tensors import InputBits
from quant.onnx import BITS, block_shapes, block_size_for, to_blocks

GRAPH = "model.onnx"

ACCURACY: dict[InputBits, int] = {"none": 1, "int8": 4}
"""ONNX Runtime's names for products in fp32 and in integers, with inputs rounded to 8 bits by blocks."""


def export_onnx(
    exportable: Exportable,
    folder: Path,
    *,
    inputs: InputBits | None = None,
    tokenizer: Path | None,
    license_name: str | None = None,
) -> None:
    """Write a folder that ONNX Runtime opens.

    Args:
        exportable: opened with ``ternary``.
        folder: to be written; must not be there.
        inputs: of quantized layers: rounded to 8 bits, or not; None: as in training, as far as there is a choice.
        tokenizer: its file; None leaves it out.
        license_name: of the weights, for the model card.

    Raises:
        ConfigError: the `onnx` package is missing.
        CheckpointError: the format cannot hold what was trained (all reasons are listed), or the folder is there
            already, or cannot be written.
        DataError: the tokenizer cannot be expressed exactly, or is of another model.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ConfigError("ONNX files need the `onnx` package: pip install -e '.[onnx]'") from error
    model, quantization, source = exportable.model, exportable.quantization, exportable.source
    assert quantization is not None
    matrices = CodedMatrices(source, model, quantization)
    if problems := hf_problems(model) + onnx_problems(quantization):
        raise CheckpointError(listed(f"{source.location}: ONNX Runtime cannot compute this", problems))
    check_fits(source, parameter_shapes(model))
    inputs = inputs or ("none" if quantization.activations == "none" else "int8")
    holds = f"ternary codes in 2 bits, as an ONNX graph; {INPUTS[inputs]}"
    hf_config, files = common_files(
        exportable, folder, torch.float32, holds, "ONNX Runtime", tokenizer=tokenizer, license_name=license_name
    )

    def vector(graph: Graph, name: str) -> str:
        pieces = (piece.contiguous() for piece in in_pieces(source, "weight", name))
        return graph.weight(name, torch.float32, source.shapes[name], pieces)

    def project(graph: Graph, x: str, name: str) -> str:
        weight, (O, I) = f"{name}.weight", source.shapes[f"{name}.weight"]  # noqa: E741
        if weight not in matrices:
            return str(graph.op("MatMul", x, graph.op("Transpose", vector(graph, weight), perm=[1, 0])))
        size = block_size_for(I, quantization)
        assert size is not None, "checked above"
        scales: list[Tensor] = []

        def blocks() -> Iterator[Tensor]:
            packed, scale = to_blocks(*matrices.codes(weight), size)
            scales.append(scale)
            yield packed

        bytes_shape, scale_shape = block_shapes((O, I), size)
        packed = graph.weight(weight, torch.uint8, bytes_shape, blocks())
        scale = graph.weight(f"{weight}_scale", torch.float32, scale_shape, scales)  # filled by then
        how = {"K": I, "N": O, "bits": BITS, "block_size": size, "accuracy_level": ACCURACY[inputs]}
        return str(graph.op("MatMulNBits", x, packed, scale, domain=CONTRIBUTED, **how))

    graph, graph_inputs, graph_outputs = decoder(model, project, vector)
    with reaching(folder), new_location(folder) as building:
        with create(building / DATA) as file:
            for each in graph.weights:
                for piece in each.pieces:
                    file.write(byte_view(piece))
        write_bytes(building / GRAPH, graph.model(graph_inputs, graph_outputs).SerializeToString())
        for name, content in files.items():
            write_bytes(building / name, content)
        write_bytes(building / CONFIG, to_json(hf_config))
