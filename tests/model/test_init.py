import math
from dataclasses import replace

import pytest
import torch
from models import TINY, VARIANTS, every_variant
from torch import nn

from model.config import ModelConfig
from model.init import initial_value, initialize_
from model.size import parameter_shapes
from model.transformer import Transformer

WIDE = replace(
    TINY,
    hidden_size=256,
    intermediate_size=640,
    num_layers=3,
    tie_embeddings=False,
    vocab_size=512,
    qkv_bias=True,
)


@every_variant
def test_meta_device_ends_up_with_the_same_bits(config):
    direct = Transformer(config)
    initialize_(direct, seed=3)
    with torch.device("meta"):
        empty = Transformer(config)
    empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialize_(empty, seed=3)
    for (name, expected), actual in zip(direct.named_parameters(), empty.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_no_parameter_depends_on_another_or_on_the_global_generator():
    shapes = parameter_shapes(TINY)
    in_order = {name: initial_value(name, shape, TINY, 0) for name, shape in shapes.items()}
    torch.manual_seed(99)
    for name in reversed(list(shapes)[::2]):
        torch.rand(1)
        assert torch.equal(initial_value(name, shapes[name], TINY, 0), in_order[name])
    deeper = replace(TINY, num_layers=5, initialization="mitchell", tie_embeddings=False)
    for name, shape in parameter_shapes(replace(TINY, initialization="mitchell")).items():
        expected = initial_value(name, shape, replace(TINY, initialization="mitchell"), 0)
        assert torch.equal(initial_value(name, shape, deeper, 0), expected)


def test_streams_differ_between_parameters_and_seeds():
    shapes = {name: shape for name, shape in parameter_shapes(WIDE).items() if len(shape) == 2}
    values = [initial_value(name, shape, WIDE, seed) for name, shape in shapes.items() for seed in (0, 1)]
    starts = {tuple((value.flatten()[:8] / value.std()).tolist()) for value in values}
    assert len(starts) == 2 * len(shapes)


def test_values_are_pinned():
    """A run resumed or repeated with a later version starts from the same weights."""
    value = initial_value("model.layers.1.mlp.down_proj.weight", (32, 56), TINY, 17)
    pinned = torch.tensor([0.0132289585, -0.0063624945, 0.0003130852, -0.0028780748])
    torch.testing.assert_close(value[0, :4], pinned, atol=1e-7, rtol=0)


@pytest.mark.parametrize("embedding_std", [None, 0.5])
@pytest.mark.parametrize("initialization", ["normal", "mitchell"])
def test_standard_deviations(initialization, embedding_std):
    config = replace(WIDE, initialization=initialization, embedding_init_std=embedding_std)
    for name, shape in parameter_shapes(config).items():
        value = initial_value(name, shape, config, 0)
        assert value.dtype == torch.float32
        if "norm" in name or name.endswith(".bias"):
            assert (value == ("norm" in name)).all()
            continue
        layer = int(name.split(".")[2]) if "layers" in name else 0
        if "o_proj" in name or "down_proj" in name:
            std = {"normal": 0.02 / math.sqrt(6), "mitchell": 1 / math.sqrt(2 * shape[1] * (layer + 1))}
        else:
            std = {"normal": 0.02, "mitchell": 1 / math.sqrt(256)}
        expected = std[initialization] if embedding_std is None or "embed_tokens" not in name else embedding_std
        if initialization == "mitchell":
            assert value.abs().max() <= 3 * expected
            expected *= 0.98658  # standard deviation of a normal that is cut off at 3
        assert abs(value.mean()) < 5 * expected / math.sqrt(value.numel())
        assert abs(value.std() / expected - 1) < 5 / math.sqrt(2 * value.numel()), name


def test_unknown_names_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"layers\.7.*no such parameter"):
        initial_value("model.layers.7.mlp.up_proj.weight", (56, 32), TINY, 0)
    with pytest.raises(ValueError, match=r"\(32, 56\).*it in shape \(56, 32\)"):
        initial_value("model.layers.0.mlp.up_proj.weight", (32, 56), TINY, 0)
    with pytest.raises(ValueError, match="lm_head"):
        initial_value("lm_head.weight", (96, 32), VARIANTS["bitnet"], 0)
    model = Transformer(TINY)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        initialize_(model, 0)


def test_values_arrive_in_the_models_dtype():
    narrow, wide = Transformer(TINY).bfloat16(), Transformer(TINY)
    initialize_(narrow, 0)
    initialize_(wide, 0)
    for actual, expected in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected.bfloat16())


def test_the_norms_of_subln_start_small_and_all_others_at_1():
    config = replace(TINY, sub_norm=True, sub_norm_init=0.25)
    values = {name: initial_value(name, shape, config, seed=0) for name, shape in parameter_shapes(config).items()}
    norms = {name: value for name, value in values.items() if value.ndim == 1}
    assert len(norms) == 4 * config.num_layers + 1
    for name, value in norms.items():
        assert (value == (0.25 if "_sub_norm." in name else 1)).all(), name
    assert ModelConfig.__dataclass_fields__["sub_norm_init"].default == 0.03


@pytest.mark.parametrize("initialization", ["normal", "mitchell"])
def test_rows_are_those_of_the_whole(initialization, monkeypatch):
    config = replace(TINY, initialization=initialization)
    monkeypatch.setattr("model.init.BLOCK_ELEMENTS", 32 * 10)
    for name, shape in parameter_shapes(config).items():
        whole = initial_value(name, shape, config, 0)
        for rows in (
            range(0),
            range(1),
            range(7, 24),
            range(10, 20),
            range(shape[0] - 1, shape[0]),
            range(shape[0]),
        ):
            if rows.stop <= shape[0]:
                assert torch.equal(initial_value(name, shape, config, 0, rows), whole[rows.start : rows.stop]), rows
        if whole.std() > 0 and len(shape) == 2:
            assert len(whole.unique(dim=0)) == len(whole)  # no block repeats another


def test_a_rank_draws_little_more_than_its_own(monkeypatch):
    monkeypatch.setattr("model.init.BLOCK_ELEMENTS", 32 * 8)
    drawn = []
    monkeypatch.setattr("model.init._draw_", lambda value, *_: drawn.append(len(value)))
    initial_value("model.layers.0.mlp.up_proj.weight", (56, 32), TINY, 0, range(20, 27))
    assert drawn == [8, 8]
