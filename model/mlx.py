"""Say which models mlx-lm computes as they were trained.

Its models (github.com/ml-explore/mlx-lm, `mlx_lm/models`) fix what a `config.json` says elsewhere: the activation above
all. Names of parameters are those of Hugging Face.
"""

from model.config import ModelConfig
from model.hf import config_to_hf

FAMILIES = ("llama", "qwen2", "qwen3", "olmo2")
"""Families whose layers mlx-lm can have in 2 bits."""


def mlx_problems(config: ModelConfig) -> list[str]:
    """Why mlx-lm does not compute what the model does; empty if it does."""
    try:
        family = config_to_hf(config)["model_type"]
    except ValueError as error:
        return str(error).splitlines()
    problems = []
    if family == "bitnet":
        problems.append(
            "sub_norm true: mlx-lm's bitnet computes squared ReLU, with layers that read the codes of --format "
            "hf-ternary alone"
        )
    elif family not in FAMILIES:
        problems.append(f"mlx-lm has other names for the parameters of {family}; it has {', '.join(FAMILIES)}")
    elif config.activation != "silu":
        problems.append(
            f"mlx-lm's {family} always computes SiLU and would load a model with activation {config.activation} "
            "without a word, and be wrong"
        )
    if (scaling := config.rope_scaling) and (scaling.attention_factor is not None or not scaling.truncate):
        problems.append("mlx-lm reads neither attention_factor nor truncate of rope_scaling, and would be wrong")
    heads = config.num_heads * config.head_width
    if family == "qwen2" and heads != config.hidden_size:
        problems.append(
            f"mlx-lm's qwen2 has no head width of its own: num_heads * head_dim is {heads} and must be hidden_size "
            f"{config.hidden_size}"
        )
    return problems
