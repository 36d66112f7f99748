"""A checkpoint of any engine on any number of ranks goes on with any other, twice in a row.

Every source's state is loaded by every target, and what the target saves at once holds the same bits. Then it trains:
20 steps of a 16-bit phase in fp32 agree with the run that was never stopped within 1e-5, and bit for bit where engine
and ranks are the same. A ternary phase has the same first loss and codes, then stays inside the rounding envelope
(see tests/launcher/engine/test_engines.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_group
from torch import Tensor
from variants import CPU, MODEL, VARIANTS, build, manifest, step_once, world_size_of

from launcher.checkpoint.folders import folder_of
from launcher.checkpoint.load import load_state
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.source import KINDS
from launcher.engine.contract import Engine, load_weights
from launcher.process.ranks import Ranks
from model.init import initial_value
from quant.linear import quantized_layers
from quant.rounding import quantize_weight

FIRST, SECOND, LAST = 3, 6, 23
ENVELOPE = 0.09

A_FEW = ("fsdp2 x1", "zero-3 x2")


def save(engine: Engine, folder: Path, step: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, world_size, rank, CPU)
    saver = Saver(folder, ranks, tokenizer=None, keep_last=0, asynchronous=True, say=print)
    saver.save(engine, manifest=manifest(step), config_text="", must=True)
    saver.wait()


def originals(out: str, variant: str, quantized: bool) -> list[float]:
    """Train from the initial weights, saving once on the way; the losses."""
    engine = build(variant, quantized=quantized)
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, MODEL, 0, rows))
    losses = [step_once(engine, step) for step in range(FIRST)]
    save(engine, Path(out, variant), FIRST)
    return losses + [step_once(engine, step) for step in range(FIRST, LAST)]


def continuations(out: str, variant: str, quantized: bool, sources: list[list[str]], begin: int) -> dict[str, Any]:
    """Load, save what was loaded, train, saving once more on the way; by source, the losses and first codes."""
    results = {}
    for path in sources:
        came_from, here = "/".join(path), "/".join([*path, variant])
        engine = build(variant, quantized=quantized)
        load_state(CheckpointReader(folder_of(Path(out, came_from), begin)), engine, with_optimizer=True)
        save(engine, Path(out, here), begin)
        codes = first_codes(engine) if quantized and variant.startswith("fsdp2 x1") else {}
        losses = []
        for step in range(begin, LAST):
            if step == SECOND and begin == FIRST:
                save(engine, Path(out, here), step)
            losses.append(step_once(engine, step))
        results[came_from] = {"losses": losses, "codes": codes}
    return results


def first_codes(engine: Engine) -> dict[str, Tensor]:
    return {name: quantize_weight(layer.weight.to_local())[0] for name, layer in quantized_layers(engine.model).items()}  # type: ignore[operator]


def same_state(first: Path, second: Path) -> None:
    """Two checkpoints hold the same bits, however they are cut."""
    a, b = CheckpointReader(first), CheckpointReader(second)
    assert a.shapes == b.shapes
    for name, shape in a.shapes.items():
        length = torch.Size(shape).numel()
        for kind in KINDS:
            assert torch.equal(a.read(kind, name, 0, length), b.read(kind, name, 0, length)), (second, kind, name)
        assert a.read_step(name) == b.read_step(name) > 0


def run_matrix(out: Path, variants: tuple[str, ...], *, quantized: bool) -> None:
    tolerance = ENVELOPE if quantized else 1e-5
    whole: dict[str, list[float]] = {}
    for variant in variants:
        whole[variant] = run_group(world_size_of(variant), originals, str(out), variant, quantized)[0]
        assert whole[variant][:1] == pytest.approx(whole[variants[0]][:1], abs=1e-6)
        assert whole[variant] == pytest.approx(whole[variants[0]], abs=tolerance), variant

    for variant in variants:
        paths = [[source] for source in variants]
        results = run_group(world_size_of(variant), continuations, str(out), variant, quantized, paths, FIRST)[0]
        check(out, variant, results, {source: whole[source][FIRST:] for source in variants}, FIRST, tolerance)

    # The second time, each pair is taken up by the variant behind its target.
    for index, variant in enumerate(variants):
        paths = [[source, variants[index - 1]] for source in variants]
        results = run_group(world_size_of(variant), continuations, str(out), variant, quantized, paths, SECOND)[0]
        expected = {"/".join(path): whole[path[0]][SECOND:] for path in paths}
        check(out, variant, results, expected, SECOND, tolerance)


def check(
    out: Path, variant: str, results: dict[str, Any], expected: dict[str, list[float]], begin: int, tolerance: float
) -> None:
    assert results.keys() == expected.keys()
    for source, result in results.items():
        same_state(folder_of(out / source, begin), folder_of(out / source / variant, begin))
        assert len(result["losses"]) == LAST - begin
        # What differs at first is the order in which ranks' losses are summed.
        if begin == FIRST:
            assert result["losses"][0] == pytest.approx(expected[source][0], abs=1e-6), (source, variant)
        assert result["losses"] == pytest.approx(expected[source], abs=tolerance), (source, variant)
        if set(source.split("/")) == {variant}:
            assert result["losses"] == expected[source], variant
        for name, codes in result["codes"].items():
            reader = CheckpointReader(folder_of(out / source, begin))
            latent = reader.read("weight", f"{name}.weight", 0, codes.numel()).view(codes.shape)
            assert torch.equal(codes, quantize_weight(latent)[0]), (source, name)


def test_a_few_engines_take_each_others_checkpoints(tmp_path: Path) -> None:
    run_matrix(tmp_path, A_FEW, quantized=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_engines_take_each_others_checkpoints_in_16_bits(tmp_path: Path) -> None:
    run_matrix(tmp_path, VARIANTS, quantized=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_engines_take_each_others_checkpoints_when_ternary(tmp_path: Path) -> None:
    run_matrix(tmp_path, VARIANTS, quantized=True)
