"""The model as an ONNX graph: standard operators of version 23, and ONNX Runtime's MatMulNBits for ternary layers.

Inputs and outputs have the names that Optimum and Transformers.js use. ``past_key_values`` may be empty. What
``attention_mask`` has 0 for is padding, which no other token sees.

Dimensions: B sequences, T tokens, P tokens before, S = P + T, D hidden, H query heads, K key-value heads, E head width.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launcher.formats.hf_folder import Stored
from model.config import ModelConfig
from model.rotary import rotary_tables

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 23
DATA = "model.onnx.data"
CONTRIBUTED = "com.microsoft"
PRODUCER = "tritrain"


class Graph:
    """Operators and weights, in the order in which they were added."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Stored] = []
        self._constants: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, outputs: int | list[str] = 1, domain: str = "", **attributes: Any) -> Any:
        """Add an operator; the name of its output, or a list of them."""
        from onnx import helper

        names = outputs if isinstance(outputs, list) else [f"{kind}.{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def weight(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> str:
        """Add a tensor."""
        self.weights.append(Stored(name, dtype, shape, pieces))
        return name

    def integers(self, *values: int, scalar: bool = False) -> str:
        """Integers as a constant: a list, or one number."""
        from onnx import TensorProto, helper

        name = f"integers{values}{'' if scalar else '[]'}"
        shape = [] if scalar else [len(values)]
        self._constants[name] = helper.make_tensor(name, TensorProto.INT64, shape, values)
        return name

    def model(self, inputs: list[Any], outputs: list[Any]) -> "ModelProto":
        """The graph's file, which names places in the file of weights."""
        from onnx import TensorProto, helper

        kinds = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}
        tensors, offset = list(self._constants.values()), 0
        for weight in self.weights:
            tensor = TensorProto(name=weight.name, data_type=kinds[weight.dtype], dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": DATA, "offset": offset, "length": weight.num_bytes}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            offset += weight.num_bytes
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIBUTED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name=PRODUCER)


Project = Callable[[Graph, str, str], str]
"""Adds the product of an input with a parameter ``NAME.weight``: of the graph, the input and NAME; returns its name."""

Vector = Callable[[Graph, str], str]
"""Adds a parameter as it is; returns its name."""


def decoder(config: ModelConfig, project: Project, vector: Vector) -> tuple[Graph, list[Any], list[Any]]:
    """The graph of a model, its inputs and its outputs."""
    from onnx import TensorProto, helper

    graph = Graph()
    cos_TE, sin_TE = rotary_tables(config, config.max_sequence_length, torch.device("cpu"))
    half = config.head_width // 2
    tables = [
        graph.weight(name, torch.float32, (config.max_sequence_length, half), [table[:, :half].contiguous()])
        for name, table in (("rotary.cos", cos_TE), ("rotary.sin", sin_TE))
    ]
    if config.norm != "rmsnorm":  # the operator wants weights
        graph.weight("ones", torch.float32, (config.hidden_size,), [torch.ones(config.hidden_size)])
    embedding = vector(graph, "model.embed_tokens.weight")
    x_BTD = graph.op("Gather", embedding, "input_ids")
    mask_B1TS = _mask(graph)
    for block in range(config.num_layers):
        x_BTD = _block(graph, config, f"model.layers.{block}", x_BTD, mask_B1TS, tables, project, vector)
    x_BTD = _norm(graph, config, "model.norm", x_BTD, vector)
    head = embedding if config.tie_embeddings else vector(graph, "lm_head.weight")
    flat = graph.op("Reshape", x_BTD, graph.integers(-1, config.hidden_size))
    logits = graph.op("Gemm", flat, head, transB=1)
    shape = graph.op("Concat", graph.op("Shape", "input_ids"), graph.integers(config.vocab_size), axis=0)
    graph.op("Reshape", logits, shape, outputs=["logits"])

    def value(name: str, *shape: str | int, kind: int = TensorProto.INT64) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def caches(name: str, length: str) -> list[Any]:
        return [
            value(f"{name}.{block}.{part}", "B", config.kv_heads, length, config.head_width, kind=TensorProto.FLOAT)
            for block in range(config.num_layers)
            for part in ("key", "value")
        ]

    inputs = [value("input_ids", "B", "T"), value("attention_mask", "B", "S"), value("position_ids", "B", "T")]
    outputs = [value("logits", "B", "T", config.vocab_size, kind=TensorProto.FLOAT)]
    return graph, inputs + caches("past_key_values", "P"), outputs + caches("present", "S")


def _mask(graph: Graph) -> str:
    """Which token sees which, [B, 1, T, S]: those before that are no padding, and itself, so that no row is empty."""
    from onnx import TensorProto

    num_tokens = graph.op("Gather", graph.op("Shape", "input_ids"), graph.integers(1, scalar=True))
    length = graph.op("Gather", graph.op("Shape", "attention_mask"), graph.integers(1, scalar=True))
    zero, one = (graph.integers(value, scalar=True) for value in (0, 1))
    keys_S = graph.op("Range", zero, length, one)
    queries_T = graph.op("Range", graph.op("Sub", length, num_tokens), length, one)
    queries_T1 = graph.op("Unsqueeze", queries_T, graph.integers(1))
    before_TS = graph.op("LessOrEqual", keys_S, queries_T1)
    itself_TS = graph.op("Equal", keys_S, queries_T1)
    real_BS = graph.op("Cast", "attention_mask", to=TensorProto.BOOL)
    real_B11S = graph.op("Unsqueeze", real_BS, graph.integers(1, 2))
    return str(graph.op("And", before_TS, graph.op("Or", itself_TS, real_B11S)))


def _block(
    graph: Graph,
    config: ModelConfig,
    name: str,
    x_BTD: str,
    mask_B1TS: str,
    tables: list[str],
    project: Project,
    vector: Vector,
) -> str:
    def norm(part: str, x: str) -> str:
        return _norm(graph, config, f"{name}.{part}", x, vector)

    def attention(x: str) -> str:
        return _attention(graph, config, name, x, mask_B1TS, tables, project, vector)

    def mlp(x: str) -> str:
        gate, up = (project(graph, x, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        if config.activation == "silu":
            gate = graph.op("Mul", gate, graph.op("Sigmoid", gate))
        else:
            gate = graph.op("Relu", gate)
            gate = graph.op("Mul", gate, gate)
        inner = graph.op("Mul", gate, up)
        inner = norm("mlp.ffn_sub_norm", inner) if config.sub_norm else inner
        return project(graph, inner, f"{name}.mlp.down_proj")

    if config.norm_position == "pre":
        x_BTD = graph.op("Add", x_BTD, attention(norm("input_layernorm", x_BTD)))
        return str(graph.op("Add", x_BTD, mlp(norm("post_attention_layernorm", x_BTD))))
    x_BTD = graph.op("Add", x_BTD, norm("post_attention_layernorm", attention(x_BTD)))
    return str(graph.op("Add", x_BTD, norm("post_feedforward_layernorm", mlp(x_BTD))))


def _attention(
    graph: Graph,
    config: ModelConfig,
    block: str,
    x_BTD: str,
    mask_B1TS: str,
    tables: list[str],
    project: Project,
    vector: Vector,
) -> str:
    name, number = f"{block}.self_attn", block.rpartition(".")[2]
    heads = {"q": config.num_heads, "k": config.kv_heads, "v": config.kv_heads}
    parts = {}
    for part, count in heads.items():
        x = project(graph, x_BTD, f"{name}.{part}_proj")
        if config.qkv_bias:
            x = graph.op("Add", x, vector(graph, f"{name}.{part}_proj.bias"))
        if config.qk_norm == "full" and part != "v":
            x = _norm(graph, config, f"{name}.{part}_norm", x, vector)
        x = graph.op("Reshape", x, graph.integers(0, 0, count, config.head_width))
        if config.qk_norm == "head" and part != "v":
            x = _norm(graph, config, f"{name}.{part}_norm", x, vector)
        x = graph.op("Transpose", x, perm=[0, 2, 1, 3])
        parts[part] = x if part == "v" else graph.op("RotaryEmbedding", x, *tables, "position_ids")
    past = [f"past_key_values.{number}.{part}" for part in ("key", "value")]
    present = [f"present.{number}.{part}" for part in ("key", "value")]
    y_BHTE, *_ = graph.op(
        "Attention", *parts.values(), mask_B1TS, *past, outputs=[f"{name}.output", *present], is_causal=0
    )
    y_BTHE = graph.op("Transpose", y_BHTE, perm=[0, 2, 1, 3])
    y = graph.op("Reshape", y_BTHE, graph.integers(0, 0, config.num_heads * config.head_width))
    y = _norm(graph, config, f"{name}.attn_sub_norm", y, vector) if config.sub_norm else y
    return project(graph, y, f"{name}.o_proj")


def _norm(graph: Graph, config: ModelConfig, name: str, x: str, vector: Vector) -> str:
    if config.norm == "rmsnorm":
        return str(graph.op("RMSNormalization", x, vector(graph, f"{name}.weight"), epsilon=config.norm_eps))
    return str(graph.op("LayerNormalization", x, "ones", epsilon=config.norm_eps))
