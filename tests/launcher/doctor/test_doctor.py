"""`tritrain doctor`: each check is given a fault, and must find it, name it, and say what to do."""

import hashlib
import json
import mmap
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import tritrain
from packaging.requirements import Requirement
from places import ROOT
from ranks import run_ranks
from tiny import tiny_config, tiny_tree, write_corpus

from launcher.doctor import checks as doctor_checks
from launcher.doctor import doctor
from launcher.doctor.checks import Verdict
from launcher.doctor.facts import (
    MIB,
    AllReduce,
    DiskProbe,
    RankFacts,
    digest_of,
    free_memory_bytes,
    installed_versions,
    leftovers,
    look_around,
    probe_disk,
    requirements,
    slow_settings,
)
from launcher.errors import CheckpointError, ConfigError, PlacementError
from launcher.plan.disk import existing_part
from launcher.plan.plan import Plan, make_plan
from launcher.plan.table import describe
from launcher.process.ranks import ALONE, Ranks

GIB = 2**30
SOUND = RankFacts(
    rank=0,
    host="host1",
    versions={"python": "3.11.9", "torch": "2.13.0"},
    torchvision_fits=True,
    gpu="NVIDIA H100",
    gpu_bytes=80 * GIB,
    gpu_free_bytes=79 * GIB,
    has_nvidia_device=True,
    free_memory_bytes=500 * GIB,
    open_files=65_536,
    locked_bytes=None,
    rdma_devices=8,
    shm_bytes=64 * GIB,
    shm_free_bytes=64 * GIB,
    leftovers=[],
    address="10.0.0.1",
    interfaces=["eth0", "lo"],
    gloo_interface=None,
    threads=8,
    cores=96,
    settings={},
    has_plan=True,
    paths={"/data": "folder 12345678"},
)
TWO = [SOUND, replace(SOUND, rank=1, host="host2", address="10.0.0.2")]
REQUIRED = [Requirement("python<3.14,>=3.11"), Requirement("torch<2.14,>=2.11")]
FAST = AllReduce("nccl", 64 * MIB, 0.001, 2, is_right=True)
CPU = {"gpu": None, "has_nvidia_device": False}


def second(**changes: Any) -> list[RankFacts]:
    """Two hosts, with something changed on the second."""
    return [TWO[0], replace(TWO[1], **changes)]


def fast(ranks: list[RankFacts]) -> Verdict:
    return doctor_checks.check_all_reduce([FAST], several_hosts=len(ranks) > 1)[0]


SOUND_VERDICTS = {
    "versions": lambda ranks: doctor_checks.check_versions(ranks, REQUIRED),
    "torchvision": doctor_checks.check_torchvision,
    "GPUs": doctor_checks.check_gpus,
    "GPU memory": lambda ranks: doctor_checks.check_gpu_memory(ranks, 60 * GIB),
    "host memory": lambda ranks: doctor_checks.check_host_memory(ranks, 100 * GIB),
    "host names": doctor_checks.check_host_names,
    "all-reduce, nccl": fast,
    "clocks": lambda ranks: doctor_checks.check_clocks(ranks, [0.0, -0.9]),
    "paths": doctor_checks.check_paths,
    "open files": lambda ranks: doctor_checks.check_limits(ranks)[0],
    "locked memory": lambda ranks: doctor_checks.check_limits(ranks)[1],
    "shared memory": lambda ranks: doctor_checks.check_shared_memory(ranks, None),
    "dead jobs": doctor_checks.check_leftovers,
    "environment": doctor_checks.check_environment,
}
FAULTS = [
    ("versions", {"versions": {"python": "3.11.9", "torch": "2.12.1"}}, "failure", "2.12.1 on host2 .rank 1"),
    ("versions", {"versions": {"python": "3.11.9"}}, "failure", "torch 2.13.0 on host1 .* missing on host2"),
    ("torchvision", {"torchvision_fits": False}, "warning", "another torch on host2 .*--no-deps torchvision"),
    ("GPUs", {"gpu": None}, "failure", "no GPU is seen on host2"),
    ("GPUs", {"gpu": "NVIDIA A100", "gpu_bytes": 40 * GIB}, "warning", "NVIDIA A100, 40 GiB on host2 .rank 1"),
    ("GPU memory", {"gpu_free_bytes": 50 * GIB}, "failure", "60 GiB of 50 GiB are needed on host2 .rank 1"),
    ("GPU memory", {"gpu_free_bytes": 61 * GIB}, "warning", "micro_batch_sequences"),
    ("host memory", {"free_memory_bytes": 90 * GIB}, "failure", "100 GiB of 90 GiB are needed on host2"),
    ("host memory", {"free_memory_bytes": 105 * GIB}, "warning", "checkpoint.asynchronous"),
    ("host names", {"address": "127.0.1.1"}, "warning", "127.0.1.1 on host2 .* GLOO_SOCKET_IFNAME .*eth0"),
    ("host names", {"address": ""}, "warning", "unknown on host2"),
    ("host names", {"gloo_interface": "ib0"}, "failure", "ib0; host2 has eth0, lo"),
    ("paths", {"paths": {"/data": None}}, "failure", "/data is missing on host2 .rank 1"),
    ("paths", {"paths": {"/data": "folder 87654321"}}, "failure", "/data differs: .*87654321 on host2"),
    ("open files", {"open_files": 256}, "failure", "256 may be open on host2 .*ulimit -n"),
    ("open files", {"open_files": 1024}, "warning", "ulimit -n"),
    ("locked memory", {"locked_bytes": 64 * 1024}, "failure", "64 KiB may be locked on host2 .*ulimit -l"),
    ("shared memory", {"shm_bytes": 64 * MIB, "shm_free_bytes": 64 * MIB}, "failure", "host2: 64 MiB .*--shm-size"),
    ("dead jobs", {"leftovers": ["000003_locals"]}, "warning", "000003_locals on host2 .*rm /dev/shm/000003_"),
    ("environment", {"threads": 97}, "warning", "97 threads on 96 cores of host2: set OMP_NUM_THREADS to 96"),
    ("environment", {"settings": {"NCCL_IB_DISABLE": "1"}}, "warning", "NCCL_IB_DISABLE=1 on host2: .* TCP"),
]


@pytest.mark.parametrize("check", SOUND_VERDICTS)
def test_sound_hosts_pass(check: str) -> None:
    verdict = SOUND_VERDICTS[check](TWO)
    assert (verdict.check, verdict.level, verdict.advice) == (check, "ok", "")
    assert verdict.found


@pytest.mark.parametrize(("check", "fault", "level", "told"), FAULTS)
def test_fault_is_found_and_named(check: str, fault: dict[str, Any], level: str, told: str) -> None:
    verdict = SOUND_VERDICTS[check](second(**fault))
    assert (verdict.check, verdict.level) == (check, level)
    assert re.search(told, f"{verdict.found} {verdict.advice}")
    assert verdict.advice


@pytest.mark.parametrize("version", ["2.10.0", "2.14.0", "1.0"])
def test_unsupported_version(version: str) -> None:
    ranks = [replace(SOUND, versions=SOUND.versions | {"torch": version})]
    verdict = doctor_checks.check_versions(ranks, REQUIRED)
    assert verdict.level == "failure"
    assert f"torch {version}, <2.14,>=2.11 is needed" in verdict.found
    verdict = doctor_checks.check_versions([replace(SOUND, versions={"torch": "2.13.0+cu126"})], REQUIRED)
    assert verdict.found == "python is missing, <3.14,>=3.11 is needed"


def test_this_environment_is_supported() -> None:
    facts = look_around(ALONE, None, requirements())
    assert {"python", "torch", "deepspeed", "mosaicml-streaming", "code"} <= facts.versions.keys()
    assert doctor_checks.check_versions([facts], requirements()).level == "ok"


def test_a_driver_without_a_gpu_in_torch_is_a_failure() -> None:
    without = [replace(SOUND, gpu=None), replace(SOUND, rank=1, gpu=None)]
    assert "docs/installing.md" in doctor_checks.check_gpus(without).advice
    assert doctor_checks.check_gpus([replace(SOUND, **CPU)]).level == "skipped"


def test_bandwidths_are_those_of_nccl_tests() -> None:
    result = AllReduce("nccl", 10**9, 0.5, 4, is_right=True)
    assert result.algorithm_gb_per_second == 2.0
    assert result.bus_gb_per_second == 3.0  # 2 * (4 - 1) / 4 times as much


@pytest.mark.parametrize(
    ("result", "level", "told"),
    [
        (replace(FAST, seconds=0.05), "warning", "NCCL_SOCKET_IFNAME"),
        (replace(FAST, backend="gloo", seconds=5.0), "warning", "GLOO_SOCKET_IFNAME"),
        (replace(FAST, is_right=False), "failure", "broken"),
    ],
)
def test_slow_or_wrong_sums(result: AllReduce, level: str, told: str) -> None:
    (verdict,) = doctor_checks.check_all_reduce([result], several_hosts=True)
    assert verdict.level == level
    assert told in verdict.advice
    assert verdict.numbers[f"bus_gb_per_second_at_{64 * MIB}_bytes"] == result.bus_gb_per_second


def test_disk_space_counts_what_is_there() -> None:
    def level(free: float, there: int) -> str:
        return doctor_checks.check_disk_space(free, 10 * GIB, 4, there, "/runs").level

    assert [level(free * GIB, 0) for free in (49, 51, 56)] == ["failure", "warning", "ok"]
    assert [level(free * GIB, 3) for free in (19, 22)] == ["failure", "ok"]
    assert level(0, 5) == "ok"


def test_slow_disk_and_broken_disk() -> None:
    slow = [DiskProbe(MIB, 1.0, 1.0)] * 2
    verdict = doctor_checks.check_disk_speed(slow, 1000 * MIB, "/runs")
    assert (verdict.level, verdict.numbers["write_bytes_per_second"]) == ("warning", 2 * MIB)
    assert "a checkpoint takes 5e+02 s" in verdict.found
    assert doctor_checks.check_disk_speed(slow, 100 * MIB, "/runs").level == "ok"
    broken = [slow[0], DiskProbe(MIB, 0, 0, "Input/output error (/runs/x)")]
    verdict = doctor_checks.check_disk_speed(broken, None, "/runs")
    assert (verdict.level, verdict.found) == ("failure", "rank 1: Input/output error (/runs/x)")


def test_planned_memory_is_the_plans(shards: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny_config(shards, tmp_path, checkpoint={"asynchronous": False}), 2)
    numbers = describe(plan)
    assert doctor_checks.planned_bytes(plan, on_gpu=True) == (numbers["total_bytes_per_rank"], 0)
    copying = make_plan(tiny_config(shards, tmp_path, checkpoint={"asynchronous": True}), 2)
    assert doctor_checks.planned_bytes(copying, on_gpu=True)[1] == numbers["checkpoint_bytes"] / 2
    device, host = doctor_checks.planned_bytes(copying, on_gpu=False)
    assert (device, host) == (0, numbers["total_bytes_per_rank"] + numbers["checkpoint_bytes"] / 2)


def with_few_files(rank: int, world_size: int) -> RankFacts:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
    return look_around(ALONE, None, requirements())


def test_a_process_with_few_files() -> None:
    """In a process of its own, because this one may have more open."""
    verdict = doctor_checks.check_limits(run_ranks(1, with_few_files))[0]
    assert (verdict.level, verdict.found[:3]) == ("failure", "512")


def test_shared_memory_of_a_dead_job_is_told_from_that_of_a_live_one(tmp_path: Path) -> None:
    for name in ("000007_locals", "000007_barrier", "psm_1234", "000008_locals"):
        (tmp_path / name).write_bytes(bytes(4096))
    assert leftovers(tmp_path) == ["000007_barrier", "000007_locals", "000008_locals"]
    with (tmp_path / "000007_locals").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert leftovers(tmp_path) == ["000008_locals"]


def test_paths_that_the_run_still_needs_are_digested(shards: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str | None]:
        text = {"prepare": {"inputs": [str(shards), "hf:x:train", "python-stdlib", "none"], "tokenizer": "bpe:320"}}
        config = tiny_config(folder, tmp_path / "run", data=text, checkpoint={"start_from": "trunk"})
        return look_around(ALONE, config, requirements()).paths

    assert digests(tmp_path / "out") == {str(shards): digest_of(shards), "none": None, "trunk": None}
    assert digests(shards) == {str(shards): digest_of(shards), "trunk": None}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert digests(shards) == {str(shards): digest_of(shards)}
    assert digest_of(shards) == digest_of(shards) != digest_of(tmp_path)


def test_hosts_that_need_different_paths_are_compared_where_they_need_the_same() -> None:
    ranks = [replace(SOUND, paths={"/tokens": "a", "/teacher": "b"}), replace(SOUND, host="host2", rank=1)]
    ranks[1] = replace(ranks[1], paths={"/text": None, "/teacher": "c"})
    verdict = doctor_checks.check_paths(ranks)
    assert (verdict.level, verdict.found) == (
        "failure",
        "/teacher differs: b on host1 (rank 0); c on host2 (rank 1); /text is missing on host2 (rank 1)",
    )


def test_the_digest_of_the_code_is_of_every_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        return installed_versions(requirements())["code"]

    checkout = b"".join(
        path.read_bytes()
        for name in ("launcher", "model", "data", "quant", "eval")
        for path in sorted((ROOT / name).rglob("*.py"))
    )
    assert digest() == hashlib.sha256(checkout).hexdigest()[:12]
    monkeypatch.setattr("launcher.doctor.facts.ROOT", tmp_path)
    found = {digest()}
    for name in ("launcher", "model", "data", "quant", "eval"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "new.py").write_text(f"# {name}")
        found.add(digest())
    assert len(found) == 6


def test_files_that_the_kernel_keeps_are_free_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\nactive_file 100\n")
    assert free_memory_bytes(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path) > 600


def test_ranks_that_are_placed_wrong_have_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(timeout_seconds: int) -> None:
        raise PlacementError("Every host must have as many ranks as any other")

    monkeypatch.setattr(doctor, "process_group", refuse)
    assert doctor.main([]) == 2
    assert capsys.readouterr().err == "Every host must have as many ranks as any other\n"


def test_an_error_of_one_rank_is_reported_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def as_rank_1(timeout_seconds: int) -> Iterator[Ranks]:
        yield Ranks(1, 2, 1, torch.device("cpu"))

    def fail(ranks: Ranks, plan: Plan | None) -> None:
        raise CheckpointError("runs/a/checkpoints: cannot be read")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(doctor, "process_group", as_rank_1)
    monkeypatch.setattr(doctor, "examine", fail)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    assert end.value.code == 2
    assert capsys.readouterr().err == "rank 1: runs/a/checkpoints: cannot be read\n"


def test_a_folder_that_cannot_be_is_an_error_to_act_on(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_tree(shards, tmp_path / ("x" * 300))))
    assert doctor.main(["--config", str(tmp_path / "config.yaml")]) == 2
    assert capsys.readouterr().err.endswith("File name too long\n")


def test_settings_that_slow_down() -> None:
    assert slow_settings({"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "0", "HOME": "/root"}) == {}
    assert slow_settings({"NCCL_DEBUG": "TRACE", "CUDA_LAUNCH_BLOCKING": "1"}).keys() == {
        "NCCL_DEBUG",
        "CUDA_LAUNCH_BLOCKING",
    }


def test_a_disk_is_written_and_read(tmp_path: Path) -> None:
    probe = probe_disk(tmp_path, 2 * MIB, 0)
    assert probe.error is None
    assert probe.write_seconds > 0 < probe.read_seconds
    assert not list(tmp_path.iterdir())
    assert existing_part(tmp_path / "a" / "b") == tmp_path
    assert "No such file" in (probe_disk(tmp_path / "none", MIB, 0).error or "")


def one_blind(rank: int, world_size: int, folder: str, shards: str) -> list[Verdict]:
    """Verdicts of a rank, where the second one has a wrong clock and seems to be on a host that lacks disk and data."""
    if rank == 1:
        doctor.look_for = lambda path, seconds: ""
        doctor.look_around = elsewhere
    plan = make_plan(tiny_config(Path(shards), Path(folder, "run")), world_size)
    return doctor.examine(
        Ranks(rank, world_size, rank, torch.device("cpu")),
        plan,
        clock=lambda: time.time() - 7 * rank,
        probe_bytes=MIB,
        all_reduce_bytes=(MIB,),
    )


def elsewhere(*arguments: Any) -> RankFacts:
    """Facts as of a host that lacks the data."""
    facts = look_around(*arguments)
    return replace(facts, host="other", address="127.0.1.1", paths=dict.fromkeys(facts.paths))


def test_two_real_ranks_find_what_is_wrong_between_them(tmp_path: Path, shards: Path) -> None:
    both = run_ranks(2, one_blind, str(tmp_path), str(shards))
    assert both[0] == both[1]
    found = {verdict.check: verdict for verdict in both[0]}
    assert found["clocks"].level == "warning"
    assert re.fullmatch(r"the clock of other \(rank 1\) is (6\.9\d|7(\.0\d)?) s behind rank 0's", found["clocks"].found)
    assert found["paths"].level == "failure"
    assert f"{shards} is missing on other (rank 1)" in found["paths"].found
    assert found["shared folder"].level == "failure"
    assert "on other (rank 1)" in found["shared folder"].found
    assert found["host names"].level == "warning"
    assert found["disk speed"].level == "ok"
    assert "1 MiB in" in found["all-reduce, gloo"].found
    assert not list(tmp_path.glob("tritrain-doctor-*"))


MOUNTED = "mount -t tmpfs -o size=40M tmpfs {0} && cd {0} && {1}"
DOCTOR = f"{sys.executable} -c 'from launcher.cli import main; main()' doctor"


def run_doctor(folder: Path, arguments: str) -> tuple[int, str]:
    (folder / "small").mkdir()
    command = MOUNTED.format(folder / "small", f"{DOCTOR} {arguments}")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", command],
        capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_wrong_configuration_is_told_before_ranks_are_started(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_tree(shards, tmp_path / "run")))
    monkeypatch.setattr("launcher.cli.watching.become_ranks", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ConfigError, match="8 sequences do not divide into micro-batches of 2 on 3 ranks"):
        tritrain("doctor", tmp_path / "config.yaml", "--ranks", "3")


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="mounts a small disk: needs root")
def test_the_command_on_a_disk_that_is_too_small(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "shards", tmp_path / "small" / "run")
    tree["model"]["hidden_size"], tree["model"]["vocab_size"] = 384, 4096
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    write_corpus(tmp_path / "shards")
    code, output = run_doctor(tmp_path, f"--ranks 2 --json {tmp_path / 'config.yaml'}")
    assert code == 1, output
    told = json.loads(output[output.index("{") :])
    levels = {check["check"]: check["level"] for check in told["checks"]}
    assert levels["disk space"] == "failure"
    assert levels["disk speed"] == "failure"  # two ranks write more than there is room for
    assert "No space left on device" in output
    assert told["problems"] == 2
