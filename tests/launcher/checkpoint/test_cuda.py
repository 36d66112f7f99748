"""Saving from a GPU: pinned memory, copied while training goes on, holds the state at the moment of saving."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import shard, state_of, step_once

from launcher.process.ranks import Ranks
from model.transformer import Transformer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("offload", ["none", "all"])
def test_what_is_written_is_the_state_at_the_moment_of_saving(
    asynchronous: bool, offload: str, only_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xxhash")
    from engines import MODEL
    from variants import manifest

    from launcher.checkpoint.folders import folder_of
    from launcher.checkpoint.reader import CheckpointReader
    from launcher.checkpoint.saver import Saver
    from launcher.checkpoint.writer import CheckpointWriter

    opened, write = threading.Event(), CheckpointWriter.write_rank

    def held(writer: CheckpointWriter, *args: Any) -> Any:
        assert opened.wait(30)
        return write(writer, *args)

    monkeypatch.setattr(CheckpointWriter, "write_rank", held)
    with torch.device("meta"):
        model = Transformer(MODEL)
    engine = shard(model, "fsdp2", torch.bfloat16, only_rank.device, offload=offload)
    saver = Saver(tmp_path, only_rank, tokenizer=None, keep_last=0, asynchronous=asynchronous, say=print)
    for number in (1, 2):  # the second uses the memory of the first again
        step_once(engine, number)
        expected = {name: tensor.cpu().clone() for name, tensor in state_of(engine).items()}
        opened.clear() if asynchronous else opened.set()
        torch.cuda._sleep(200_000_000)  # the copies wait for a tenth of a second of work
        saver.save(engine, manifest=manifest(number), config_text="", must=True)
        for step in range(3):
            step_once(engine, 10 + step)
        opened.set()
        saver.wait()
        reader = CheckpointReader(folder_of(tmp_path, number))
        assert list(reader.damage()) == []
        for name, shape in reader.shapes.items():
            length = torch.Size(shape).numel()
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(reader.read(kind, name, 0, length), expected[f"{kind}/{name}"]), (number, kind, name)
            assert reader.read_step(name) == expected[f"step/{name}"].item()
        assert not torch.equal(state_of(engine)[f"weight/{name}"].cpu(), expected[f"weight/{name}"])
    if asynchronous:
        assert all(tensor.is_pinned() for tensor in saver._staging.values())
        assert saver._staging
