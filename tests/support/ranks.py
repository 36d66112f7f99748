"""Real ranks: processes with a gloo group that start fast.

`import streaming` and `import deepspeed` take seconds, and so does what training imports. One fork server imports it
all once, and the ranks are forked from there.
"""

import atexit
import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 400
IN_FORK_SERVER = "TRITRAIN_TEST_FORK_SERVER"
PRELOADED = "TRITRAIN_TEST_PRELOADED"
"""Variable of a program that has a fork server of its own: the modules that are enough for it."""
IMPORTED_ONCE = (
    *("data.rows", "launcher.pretrain", "launcher.engine.zero", "launcher.engine.fsdp", "torch._dynamo"),
    # What deepspeed.initialize imports when it is called.
    *("deepspeed", "deepspeed.compile.backend", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops", "deepspeed.comm.mori"),
    # What modules of tests import, and runs when they begin.
    *("pytest", "hypothesis", "runs", "tiny", "pydantic.dataclasses", "rich._emoji_codes", "sentencepiece"),
    "s3fs",
)

if IN_FORK_SERVER in os.environ:
    for name in os.environ.get(PRELOADED, "").split() or IMPORTED_ONCE:
        importlib.import_module(name)
    tiny: Any = importlib.import_module("tiny")
    tiny.tiny_config(Path("shards"), Path("run"))  # what it takes to read a configuration is built the first time
    for library in list(weakref.finalize._registry):
        if (state := library.peek()) is not None and state[1] is torch.library._del_library:
            library.atexit = False  # to take back each kernel of torch's at the end costs a rank 80 ms
    os.fsync = lambda descriptor: None  # as in conftest.py
    gc.freeze()  # else each rank's first collection would copy all of it

os.environ[IN_FORK_SERVER] = "1"  # the server inherits it, and imports this module by name
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, ranks_per_node: int | None = None
) -> list[Any]:
    """Return what `function(rank, world_size, *args)` gives on each rank; without a process group for one rank."""
    with tempfile.TemporaryDirectory() as folder:
        queue = CONTEXT.Queue()
        processes = [
            CONTEXT.Process(
                target=_rank,
                args=(queue, f"{folder}/store", rank, world_size, ranks_per_node or world_size, function, args),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results = _results(queue, processes)
        finally:
            for process in processes:
                process.join(20)
                process.kill()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[rank] for rank in range(world_size)]


def _results(queue: Any, processes: list[Any]) -> dict[int, Any]:
    """What each rank gives, by its number; it is an error at once if one has ended without a result."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(results) < len(processes):
        codes = {rank: process.exitcode for rank, process in enumerate(processes) if rank not in results}
        try:
            rank, result = queue.get(timeout=1)
        except Empty:
            ended = {rank: code for rank, code in codes.items() if code is not None}
            assert not ended, f"ranks have ended without a result; their exit codes: {ended}"
            assert time.monotonic() < deadline, f"no result of ranks {sorted(codes)}"
        else:
            results[rank] = result
    return results


def end_with_parent() -> None:
    """Have this process killed when the fork server ends, whatever it waits for: nobody else would end it."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _rank(
    queue: Any, store: str, rank: int, world_size: int, ranks_per_node: int, function: Callable[..., Any], args: Any
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(ranks_per_node),
        LOCAL_RANK=str(rank % ranks_per_node),
    )
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
            dist.barrier()  # else a rank that ends at once closes its connections while others still make theirs
        queue.put((rank, function(rank, world_size, *args)))
    except BaseException as error:
        error.add_note(f"rank {rank}:\n{traceback.format_exc()}")
        queue.put((rank, error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # forked ranks skip it, and `streaming` would leave its shared memory behind


def run_group(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(*args)` gives on each rank (tensors and plain containers), a single one in a group too."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(world_size, _call_in_group, folder, function, args)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]


def _call_in_group(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    if world_size == 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    # A file, because tensors in a queue are gone with the process that put them there.
    torch.save(function(*args), Path(folder, f"{rank}.pt"))
    dist.barrier()
