"""The exports that a model can have: pure checks of its configuration, which the exports themselves make too.

`tritrain plan` shows them before any weight exists. `launcher.formats` adds what only a checkpoint can tell: whether
its tensors fit, and how far its quantization is on.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.gguf_byte_level import byte_level_vocabulary
from data.prepared import read_manifest
from data.tokenizer import TRAINED_SPEC, file_in
from data.tokenizer_definition import read_definition
from data.tokenizer_json import UNIGRAM, sentencepiece_problem
from launcher.config.sections import Config
from launcher.plan.course import Course
from model.config import ModelConfig
from model.gguf import gguf_architecture
from model.hf import config_to_hf
from model.mlx import mlx_problems
from model.size import linear_shapes, parameter_shapes
from quant.compressed_tensors import ROUNDED, InputBits, compressed_bytes, default_inputs
from quant.config import IN_2_BITS, QuantConfig
from quant.gguf import (
    BLOCK_BYTES,
    BLOCK_TYPES,
    BLOCK_WIDTHS,
    TERNARY_TYPES,
    BlockType,
    EmbeddingType,
    StoredType,
    block_width_problem,
    recipe_problem,
)
from quant.mlx import GROUP_SIZES, group_size_for, mlx_bytes
from quant.onnx import BLOCK_SIZES, onnx_bytes
from quant.size import CODES_PER_BYTE

EMBEDDINGS = ("model.embed_tokens.", "lm_head.")
"""What the parameters begin with that have the type of embeddings."""

NO_OTHER_WAY = "export the latent weights (--format hf --weights latent)"
AS_WEIGHTS = "export their weights (--format hf --weights dequantized)"
AS_CODES = "--format compressed-tensors holds the codes; or " + AS_WEIGHTS


@dataclass(frozen=True)
class Export:
    """One export of the model at the end of a run."""

    name: str
    """Options of `tritrain export`: `hf`, `gguf --type tq2_0`."""
    problems: list[str]
    """Why the model cannot have it; empty if it can."""
    num_bytes: int
    """Size of its weights."""


def exports_of(course: Course) -> list[Export]:
    """All exports of the model that a run ends with."""
    return list(_exports_of(course))


def _exports_of(course: Course) -> Iterator[Export]:
    config, model = course.config, course.config.model
    quantization = course.phases[-1].quantization
    shapes = parameter_shapes(model)
    coded = coded_matrices(model, quantization) if quantization else []
    element_bytes = config.training.compute_bytes
    all_bytes = element_bytes * sum(map(prod, shapes.values()))
    tokenizer = tokenizer_problems(config)
    in_hf = [*hf_problems(model), *tokenizer]
    yield Export("hf" if quantization is None else "hf --weights latent", in_hf, all_bytes)
    without_codes = codes_problems(course)
    packing = [*in_hf, *without_codes]
    if quantization is not None:
        dequantizing = recipe_problems(quantization, packed=False)
        yield Export("hf --weights dequantized", [*in_hf, *without_codes, *dequantizing], all_bytes)
        packing += recipe_problems(quantization, packed=True) + packing_problems(model, coded, shapes, "bitlinear")
    packed = sum(prod(shapes[name]) for name in coded)
    without_packed = all_bytes - element_bytes * packed
    yield Export("hf-ternary", packing, without_packed + ceil(packed / CODES_PER_BYTE))
    problems, num_bytes = [*in_hf, *without_codes], all_bytes
    if quantization is not None:
        problems += compressed_problems(quantization, default_inputs(quantization))
        num_bytes = without_packed + sum(compressed_bytes(shapes[name], quantization) for name in coded)
    yield Export("compressed-tensors", problems, num_bytes)
    problems, num_bytes = [*tokenizer, *mlx_problems(model), *without_codes], all_bytes
    if quantization is not None:
        problems += mlx_recipe_problems(quantization, coded, shapes)
        size = group_size_for((shapes[name][1] for name in coded), quantization) or GROUP_SIZES[-1]
        num_bytes = without_packed + sum(mlx_bytes(shapes[name], size, element_bytes) for name in coded)
    yield Export("mlx", problems, num_bytes)
    problems, num_bytes = [*in_hf, *without_codes], all_bytes
    if quantization is not None:
        problems += onnx_problems(quantization)
        others = 4 * sum(prod(shape) for name, shape in shapes.items() if name not in coded)
        others += 4 * model.max_sequence_length * model.head_width  # sines and cosines
        num_bytes = others + sum(onnx_bytes(shapes[name], quantization) for name in coded)
    yield Export("onnx", problems, num_bytes)
    for into in BLOCK_TYPES:
        types = gguf_types(shapes, coded, into, default_embeddings(into))
        problems = [*gguf_problems(model, types), *tokenizer, *gguf_tokenizer_problems(config)]
        if quantization is not None or into in TERNARY_TYPES:
            problems += without_codes
        if quantization is not None and (problem := recipe_problem(quantization, into)):
            problems.append(f"quantization.{problem}")
        sizes = [BLOCK_BYTES[kind] * prod(shapes[name]) / BLOCK_WIDTHS[kind] for name, kind in types.items()]
        yield Export(f"gguf --type {into}", problems, ceil(sum(sizes)))


def coded_matrices(model: ModelConfig, quantization: QuantConfig) -> list[str]:
    """Names of the weights that a recipe turns into codes: of all linear layers, those that its `include` matches."""
    return list(linear_shapes(model, quantization.include))


def codes_problems(course: Course) -> list[str]:
    """Why the last step of a run does not compute with codes alone, as every export of codes needs."""
    quantization = course.phases[-1].quantization
    if quantization is None:
        return ["the last phase is in 16 bits, so the model has no codes"]
    weights, activations = course.strengths_at(course.total_steps - 1)
    if min(weights if quantization.activations == "none" else weights + activations) < 1:
        return ["the last phase ends on its ramp, where the model computes with more than its codes"]
    return []


def hf_problems(model: ModelConfig) -> list[str]:
    """Why no family of Hugging Face computes what the model does."""
    try:
        config_to_hf(model)
    except ValueError as error:
        return str(error).splitlines()
    return []


def recipe_problems(config: QuantConfig, *, packed: bool) -> list[str]:
    """Why Transformers does not compute what a recipe does, each with what would be exportable."""
    problems = []
    if config.layer_norm:
        problems.append(f"layer_norm true: its layers do not normalize their inputs; {NO_OTHER_WAY}")
    if config.dead_zone_bias:
        problems.append(f"dead_zone_bias {config.dead_zone_bias}: its layers have no such bias; {NO_OTHER_WAY}")
    if not packed:
        return problems
    problems = codes_times_level_problems(config)
    if config.granularity != "matrix":
        kind = "learned scales" if config.learned else f"granularity {config.granularity}"
        problems.append(f"{kind}: a packed matrix has one scale; {AS_CODES}")
    if config.activations != "int8":
        problems.append(f"activations {config.activations}: packed layers round inputs as int8 does; {AS_CODES}")
    return problems


def codes_times_level_problems(config: QuantConfig) -> list[str]:
    """Why layers are no plain product of ternary codes with a level, each with what would be exportable."""
    problems = recipe_problems(config, packed=False)
    if config.levels not in IN_2_BITS:
        problems.append(f"levels {config.levels}: only -1, 0 and +1 are packed; {AS_WEIGHTS}")
    if config.hadamard != "none":
        problems.append(f"hadamard {config.hadamard}: packed layers do not rotate their inputs; {AS_WEIGHTS}")
    return problems


def compressed_problems(config: QuantConfig, inputs: InputBits) -> list[str]:
    """Why the format of compressed-tensors cannot hold what a recipe trains."""
    problems = codes_times_level_problems(config)
    if inputs == "int8" and config.activations not in ROUNDED:
        problems.append(
            f"activations {config.activations}: programs round inputs to 8 bits by their absmax / 127.5 or 127, which "
            f"was trained with {' or '.join(ROUNDED)} alone; leave them in 16 bits with --activations none"
        )
    return problems


def mlx_recipe_problems(config: QuantConfig, coded: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why MLX cannot hold what a recipe trains.

    Args:
        config: the recipe.
        coded: names of the matrices that are quantized.
        shapes: of all parameters.
    """
    problems = codes_times_level_problems(config)
    if group_size_for((shapes[name][1] for name in coded), config) is None:
        *larger, smallest = GROUP_SIZES
        if config.granularity == "group" and config.group_size % smallest:
            sizes = f"{', '.join(map(str, larger))} and {smallest}"
            problems.append(f"group_size {config.group_size}: MLX has groups of {sizes}; {AS_WEIGHTS}")
        problems += [
            f"{name} has rows of {width} weights, and MLX's groups of {smallest} must divide them; {AS_WEIGHTS}"
            for name in coded
            if (width := shapes[name][1]) % smallest
        ]
    return problems


def onnx_problems(config: QuantConfig) -> list[str]:
    """Why ONNX Runtime's product with 2-bit weights is not what a recipe trains."""
    problems = codes_times_level_problems(config)
    if config.granularity == "group" and config.group_size % BLOCK_SIZES[-1]:
        problems.append(
            f"group_size {config.group_size}: ONNX Runtime has blocks of 16 and its doubles, which must divide it; "
            f"{AS_WEIGHTS}"
        )
    return problems


def packing_problems(
    model: ModelConfig,
    coded: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    linear_class: Literal["bitlinear", "autobitlinear"],
) -> list[str]:
    """Why matrices cannot be packed.

    Args:
        model: that they are of.
        coded: names of the matrices that are quantized.
        shapes: of all parameters that are there.
        linear_class: what is to compute the packed layers.
    """
    problems = [
        f"{name} has {shapes[name][0]} rows, and only a multiple of {CODES_PER_BYTE} can be packed; {AS_WEIGHTS}"
        for name in coded
        if name in shapes and shapes[name][0] % CODES_PER_BYTE
    ]
    if model.qkv_bias and linear_class == "autobitlinear":
        problems.append("qkv_bias true: autobitlinear multiplies the bias by the scale of the weights; take bitlinear")
    return problems


def default_embeddings(into: BlockType) -> EmbeddingType:
    """The type of the embedding and the head beside matrices of a type."""
    return "f16" if into == "f16" else "q8_0"


def gguf_types(
    shapes: Mapping[str, tuple[int, ...]], coded: Iterable[str], into: BlockType, embeddings: EmbeddingType
) -> dict[str, StoredType]:
    """The type that each parameter has in a GGUF file.

    Args:
        shapes: of all parameters.
        coded: names of those that are quantized.
        into: type of the projections.
        embeddings: type of the embedding and the head.
    """
    types: dict[str, StoredType] = {}
    coded = frozenset(coded)
    for name, shape in shapes.items():
        if name in coded:
            types[name] = into
        elif name.startswith(EMBEDDINGS):
            types[name] = embeddings
        elif len(shape) > 1:
            types[name] = "f16" if into in TERNARY_TYPES else into
        else:
            types[name] = "f32"
    return types


def gguf_problems(model: ModelConfig, types: Mapping[str, StoredType]) -> list[str]:
    """Why llama.cpp has no graph for the model, and which rows have a width that their type cannot have.

    Args:
        model: that is to be written.
        types: of its parameters; matrices are named in their first block only.
    """
    problems = []
    try:
        gguf_architecture(model)
    except ValueError as error:
        problems.append(str(error))
    shapes = parameter_shapes(model)
    named: set[str] = set()
    for name, kind in types.items():
        in_any_block = re.sub(r"\.\d+\.", ".N.", name)
        if in_any_block not in named and (problem := block_width_problem(name, shapes[name][-1], kind)):
            named.add(in_any_block)
            problems.append(problem)
    return problems


def tokenizer_of_data(config: Config) -> Path | None:
    """The tokenizer in a run's first folder of data; None if it is not on this machine's file systems."""
    first = config.data.sources[0]
    if first.is_remote:
        return None
    try:
        path = Path(first.path) / read_manifest(Path(first.path))["tokenizer"]["file"]
    except DataError:
        return None
    return path if path.is_file() else None


def tokenizer_file(config: Config) -> Path | None:
    """The tokenizer of a run's data, prepared or not; None where it is yet to be trained, remote or missing."""
    found, prepare = tokenizer_of_data(config), config.data.prepare
    if found is not None or prepare is None or TRAINED_SPEC.fullmatch(prepare.tokenizer):
        return found
    path = Path(prepare.tokenizer)
    return file_in(path) if path.is_dir() else path if path.is_file() else None


def tokenizer_problems(config: Config) -> list[str]:
    """Why other programs would tokenize differently; empty also where the tokenizer cannot be seen yet."""
    path, prepare = tokenizer_file(config), config.data.prepare
    if path is None and prepare is not None and prepare.tokenizer.startswith("unigram:"):
        return [f"the tokenizer {prepare.tokenizer} {UNIGRAM}"]
    problem = sentencepiece_problem(path) if path is not None and path.suffix == ".model" else None
    return [f"the tokenizer {path} {problem}"] if problem else []


def gguf_tokenizer_problems(config: Config) -> list[str]:
    """Why a GGUF file cannot hold the tokenizer."""
    path = tokenizer_file(config)
    if path is None or path.suffix == ".model":
        return []
    try:
        definition = read_definition(path)
        byte_level_vocabulary(definition)
    except DataError as error:
        return [str(error)]
    except ValueError as error:
        return [f"the tokenizer {path} {error}"]
    return []
