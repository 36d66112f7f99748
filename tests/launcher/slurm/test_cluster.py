"""What a cluster needs, as its users name it: read strictly."""

from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.slurm.cluster import SiteConfig, load_site


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "site.partitoin: unknown key; did you mean partition?"),
        ("gpus_per_node: '8'", "site.gpus_per_node: is '8'"),
        ("time: a day", "site.time: is 'a day'; must be such as 90"),
        ('account: "a\\nb"', "site.account: is 'a\\nb'; must be printable text on one line"),
        (
            "sbatch_options: ['--wrap=x', '--output=/x', '-N 3', '--mem=\"1\"']",
            "site.sbatch_options.1: is '--output=/x'",
        ),
        ("environment: {HF_TOKEN: x}", "site.environment.HF_TOKEN: looks like a secret"),
        ("environment: {'A;touch x': x}", "is not a valid name of a variable"),
        ("container: {runtime: docker, image: x}", "site.container.runtime"),
        ("container: {runtime: pyxis, image: x, mounts: ['/a,/b']}", "site.container.mounts.0"),
        ("- a", "must be a mapping of keys"),
    ],
)
def test_site_file_is_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_site(path)
    assert message in str(error.value)


def test_names_of_variables_that_are_no_secrets() -> None:
    SiteConfig(environment={"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO", "EMPTY": ""})
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "token", "MY_PASSWORD", "GH_TOKEN_2"):
        with pytest.raises(ValueError, match="secret"):
            SiteConfig(environment={name: "x"})


def test_site_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text("partition: gpu")
    monkeypatch.setenv("TRITRAIN_SITE", str(tmp_path / "site.yaml"))
    assert load_site(None).partition == "gpu"
    monkeypatch.delenv("TRITRAIN_SITE")
    assert load_site(None) == SiteConfig()
