"""The identity of a model covers every file that holds it."""

import fsspec
from hf_folders import edit_config, write_variant

from launcher.checkpoint.location import to_location
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.hf_source import HuggingFaceSource
from launcher.inference.sharded import digest_of_files, files_of, stored_dtype


def test_every_file_of_the_weights_belongs_to_a_model(tmp_path):
    write_variant(tmp_path / "hf", max_shard_bytes=20_000)
    files = files_of(HuggingFaceSource(tmp_path / "hf"))
    assert len(files) > 2
    digests = {digest_of_files(files)}
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        digests.add(digest_of_files(files))
    assert len(digests) == len(files) + 1


def test_so_do_those_that_deepspeed_wrote_beside_a_configuration(tmp_path):
    tag = tmp_path / "global_step3"
    tag.mkdir()
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (tag / name).touch()
    source = DeepSpeedSource.__new__(DeepSpeedSource)  # which files they are does not depend on what is in them
    source.folder, source.location = tag, str(tmp_path)
    assert sorted(files_of(source)) == sorted([tmp_path / "config.json", *tag.iterdir()])


def test_a_folder_at_a_url_is_the_same_model(tmp_path):
    write_variant(tmp_path / "hf")
    edit_config(tmp_path / "hf", torch_dtype="bfloat16")
    store = fsspec.filesystem("memory")
    for file in (tmp_path / "hf").iterdir():
        store.pipe(f"/identity/{file.name}", file.read_bytes())
    remote = HuggingFaceSource(to_location("memory://identity"))
    assert digest_of_files(files_of(remote)) == digest_of_files(files_of(HuggingFaceSource(tmp_path / "hf")))
    assert stored_dtype(to_location(remote.location)) == "bfloat16"
