import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" not in os.environ and "gpu" not in sys.argv:
    # Several ranks would have to share a GPU: only `pytest -m gpu` sees any. Workers have this environment.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which torch does

import hypothesis
import pytest
import torch
import typer.testing

if TYPE_CHECKING:
    from stores import Store

    from launcher.process.ranks import Ranks

ENOUGH_MEMORY_BYTES = 8 * 2**30
"""Free in `/dev/shm`: several times what the tests that run at once write."""

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::UserWarning"  # of torch and its kin, in subprocesses
# Tensors are tiny here, and several processes share the cores: a second thread costs more than it gains.
os.environ["OMP_NUM_THREADS"] = "1"
# Many processes import the same modules: without files of bytecode each compiles the whole project, for half a second.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test takes the power away, and a busy disk takes long for all of them
typer.testing._get_command = functools.cache(typer.testing._get_command)  # else each call of `tritrain` makes them all
for helper in (Path(__file__).parent / "support").glob("*.py"):
    pytest.register_assert_rewrite(helper.stem)  # so that its asserts show what differs, as those of tests do
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers for the whole suite, one of which often waits; what is named on the command line runs here."""
    return 3 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


def temporary_place(config: pytest.Config) -> str:
    """Where temporary files are, in memory if there is enough: writing them takes a fifth of the suite's time.

    Hosts and clusters of slow tests have a `/dev/shm` of their own.
    """
    if "not slow" not in config.option.markexpr:
        return tempfile.gettempdir()
    in_memory = Path("/dev/shm")
    has_room = in_memory.is_dir() and shutil.disk_usage(in_memory).free >= ENOUGH_MEMORY_BYTES
    return str(in_memory) if has_room and "TMPDIR" not in os.environ else tempfile.gettempdir()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session one temporary folder, for its workers and all that they start; it is removed at the end."""
    if hasattr(config, "workerinput"):
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", place := temporary_place(config))  # the folders of failed tests stay
    folder = tempfile.mkdtemp(prefix="tritrain-tests-", dir=place)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "torchinductor")  # one for ranks and tests
    # multiprocessing removes its own folder in it with priority -100; a lower one comes later.
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-200)


def pytest_collection_finish() -> None:
    """Keep all that is imported and collected out of the rounds of the garbage collector."""
    gc.collect()
    gc.freeze()


class TookTooLong(BaseException):
    """A test's time is over. Hypothesis would take a failure for that of an example, and run it again."""


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer() -> Iterator[Any]:
    """Have the alarm end a test, whatever the test does; it rings again, for a `finally` may wait as well."""
    is_set = yield
    seconds, _ = signal.getitimer(signal.ITIMER_REAL)
    ring = signal.getsignal(signal.SIGALRM)
    if seconds and callable(ring):

        def end(number: int, frame: Any) -> None:
            try:
                ring(number, frame)
            except pytest.fail.Exception as error:
                raise TookTooLong(str(error)) from None

        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 30))
    return is_set


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` before any fixture of theirs is made."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def only_rank() -> "Iterator[Ranks]":
    """This process as the only rank, in a group with gloo; if there is a GPU, with NCCL too, and it is the device."""
    from launcher.process.ranks import process_group

    before = dict(os.environ)
    with process_group(60) as ranks:
        yield ranks
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of the tiny corpus."""
    from tiny import SEQUENCE_LENGTH, write_corpus

    from data.shards import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("corpus")
    corpus = write_corpus(folder / "corpus.jsonl")
    config = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:320", validation_fraction=0.1)
    prepare(config, SEQUENCE_LENGTH, folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two prepared folders of different sizes with the same tokenizer, of about 150 and 70 rows."""
    from mixtures import LENGTH, write_text

    from data.shards import PrepareConfig, prepare

    root = tmp_path_factory.mktemp("prepared")
    big, small = root / "big", root / "small"
    text = write_text(root / "big.jsonl", 1, 180)
    prepare(PrepareConfig(inputs=(text,), tokenizer="bpe:400", validation_fraction=0.2), LENGTH, big)
    text = write_text(root / "small.jsonl", 2, 80)
    tokenizer = str(big / "tokenizer.model")
    prepare(PrepareConfig(inputs=(text,), tokenizer=tokenizer, validation_fraction=0.2), LENGTH, small)
    return str(big), str(small)


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The package, which imports torchvision."""
    from data.torchvision_repair import repair_torchvision

    repair_torchvision()
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def uncompiled_transformers(transformers: Any) -> Iterator[Any]:
    """The package; its packed layers are not compiled, which would take minutes at their first call."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    yield transformers
    torch._dynamo.config.disable = False
    os.environ.pop("TORCHDYNAMO_DISABLE", None)


@pytest.fixture(scope="session")
def llama_python() -> Path:
    """The Python of an environment that has llama.cpp."""
    from llama_environment import python_with_llama

    return python_with_llama()


@pytest.fixture
def ask(llama_python: Path, tmp_path: Path) -> Any:
    """Ask llama.cpp about a file; see `llama_client.py`."""
    import numpy as np
    from places import SUPPORT

    def client(path: Path, **request: Any) -> dict[str, Any]:
        (tmp_path / "request.json").write_text(json.dumps(request))
        script = SUPPORT / "llama_client.py"
        arguments = [path, tmp_path / "request.json", tmp_path / "answer.npz"]
        done = subprocess.run([llama_python, script, *arguments], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        return dict(np.load(tmp_path / "answer.npz"))

    return client


@pytest.fixture(scope="session")
def store(shards: Path) -> Iterator["Store"]:
    """A server of a store, with a bucket that holds a copy of the prepared folder."""
    from stores import BUCKET, Store

    server = Store()
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"shards/{path.relative_to(shards)}")
    yield server
    server.close()


@pytest.fixture
def reachable(store: "Store", monkeypatch: pytest.MonkeyPatch) -> "Store":
    """The server, with this process's environment set for it."""
    from stores import enter, environment

    enter(monkeypatch, environment(store.endpoint))
    return store


@pytest.fixture(scope="session")
def at_2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where plain DeepSpeed wrote folders at two ranks; and by their names, what they hold and how training went on."""
    from deepspeed_folders import AT_2, write_folders
    from ranks import run_group

    root = tmp_path_factory.mktemp("two")
    return root, run_group(2, write_folders, str(root), AT_2)[0]


@pytest.fixture(scope="session")
def at_3(tmp_path_factory: pytest.TempPathFactory, at_2: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """What three ranks write, and how they continue from what two ranks wrote and we converted."""
    from deepspeed_folders import AT_3, FP32, OPTIMIZER, continue_and_write
    from ranks import run_group

    from launcher.formats.deepspeed_native import DeepSpeedSource
    from launcher.formats.deepspeed_universal import write_universal

    root = tmp_path_factory.mktemp("three")
    for name in ("zero2", "zero3"):
        write_universal(
            DeepSpeedSource(at_2[0] / name), root / f"universal-{name}", learning_rate=OPTIMIZER.learning_rate / 4
        )
    continued = [(str(root / f"universal-{name}"), stage, FP32) for name, stage in (("zero3", 2), ("zero2", 3))]
    return root, run_group(3, continue_and_write, continued, str(root), AT_3)[0]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of stand-ins for a cluster's programs."""
    from slurm_stand_ins import stand_ins

    return stand_ins(tmp_path / "programs")
