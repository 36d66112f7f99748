"""GPUs by name: how fast they multiply at best, and how much memory they have."""

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError

UTILIZATION = 0.4
"""Share of the peak that training is taken to reach: between the 38 to 43 % of Llama 3 405B on H100s (arXiv 2407.21783,
table 4) and the 46 % of PaLM (arXiv 2204.02311, table 3)."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from NVIDIA's data sheets."""

    peak_flops_per_second: float
    """Dense, in bf16."""
    memory_gib: int


GPUS = {
    "NVIDIA A100": Gpu(312e12, 80),
    "NVIDIA A100-PCIE-40GB": Gpu(312e12, 40),
    "NVIDIA A100-SXM4-40GB": Gpu(312e12, 40),
    "NVIDIA H100 PCIe": Gpu(756e12, 80),
    "NVIDIA H100": Gpu(989e12, 80),
    "NVIDIA H200": Gpu(989e12, 141),
    "NVIDIA B200": Gpu(2250e12, 180),
}
"""By the beginning of the device's name; the longest match counts."""


def find_gpu(device_name: str) -> Gpu | None:
    """The entry of a device; None if it is not known, so that no utilization is made up."""
    matches = [known for known in GPUS if device_name.startswith(known)]
    return GPUS[max(matches, key=len)] if matches else None


def named_gpu(name: str) -> tuple[str, Gpu]:
    """The GPU that a person names, such as `H100`, with its full name.

    Raises:
        ConfigError: it is not known.
    """
    full = next((known for known in GPUS if known.lower() in (name.lower(), f"nvidia {name.lower()}")), None)
    if full is None:
        choices = ", ".join(known.removeprefix("NVIDIA ") for known in GPUS)
        raise ConfigError(f"--gpu {name} is not known; choose one of {choices}")
    return full, GPUS[full]


def gpu_of_this_machine(driver: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, Gpu] | None:
    """The first GPU of this machine as the driver names it, which needs no torch; None where none is known."""
    for information in sorted(driver.glob("*/information")):
        for line in information.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model" and (gpu := find_gpu(value.strip())):
                return value.strip(), gpu
    return None
