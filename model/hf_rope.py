"""The rotary settings of Hugging Face's `config.json`: `rope_scaling` of version 4, `rope_parameters` of version 5.

Version 5 reads both, and version 4 only `rope_scaling`, with `rope_theta` beside it; so that is what is written.
"""

from collections.abc import Mapping
from typing import Any

from model.config import ROPE_KEYS, RopeScalingConfig, yarn_attention

KEYS = {
    "factor": "factor",
    "original_max_sequence_length": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_slow": "beta_slow",
    "beta_fast": "beta_fast",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
"""Hugging Face's key for each key of `model.rope_scaling`."""

READ = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", *KEYS.values()}
ONLY_LINEAR = ("olmo", "olmo2")
"""Families whose configuration in version 4 accepts nothing but `type` and `factor`."""
LARGEST = 2.0**40
"""No number of a model is larger."""
REFUSED = {
    "dynamic": "it changes the frequencies as a sequence grows, so that keys in a cache no longer fit",
    "longrope": "it has other frequencies for short sequences than for long ones",
}


def rope_from_hf(given: Mapping[str, Any]) -> tuple[float, RopeScalingConfig | None]:
    """The rotary base and the scaling of a `config.json` whose defaults have been filled in.

    Raises:
        ValueError: the model cannot express it; says why, in lines.
    """
    name, rope = _settings(given)
    theta = rope.get("rope_theta", given["rope_theta"])
    if not _is_number(theta):
        raise ValueError(f"rope_theta {theta!r}: is no float")
    if name == "rope_scaling" and theta != given["rope_theta"]:
        raise ValueError(
            f"rope_scaling has rope_theta {theta!r}, and the model {given['rope_theta']!r}: Transformers reads the one "
            "or the other by its version; remove the wrong one"
        )
    if others := sorted(map(str, rope.keys() - READ)):
        raise ValueError(f"{name} has {', '.join(others)}: not known; the model has one setting for all of its layers")
    if (part := rope.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"{name} has partial_rotary_factor {part!r}: heads are rotated as a whole here")
    method = rope.get("rope_type", rope.get("type"))
    if "type" in rope and rope["type"] != method:
        raise ValueError(f"{name} has rope_type {method!r} and type {rope['type']!r}: remove the wrong one")
    if method in (None, "default"):
        return float(theta), None
    if not isinstance(method, str) or method not in ROPE_KEYS:
        reason = REFUSED.get(method, "it is not known") if isinstance(method, str) else "it is no name"
        raise ValueError(f"{name} has rope_type {method!r}: {reason}; {', '.join(ROPE_KEYS)} are computed here")
    return float(theta), _scaling(name, method, rope, given)


def _settings(given: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key whose settings count, and these."""
    found = {name: given[name] for name in ("rope_scaling", "rope_parameters") if given.get(name)}
    for name, rope in found.items():
        if not isinstance(rope, dict):
            raise ValueError(f"{name} {rope!r}: must hold a JSON object, or null")
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise ValueError(
            "rope_scaling and rope_parameters differ, and Transformers reads the one or the other by its version; "
            "remove the wrong one"
        )
    return next(iter(found.items()), ("rope_scaling", {}))


def _scaling(name: str, method: str, rope: Mapping[str, Any], given: Mapping[str, Any]) -> RopeScalingConfig:
    values: dict[str, Any] = {}
    for field in ("factor", *ROPE_KEYS[method]):
        key = KEYS[field]
        value = rope.get(key)
        kind = "true or false" if field == "truncate" else "whole number" if field.startswith("orig") else "number"
        if value is None or (value == 0 and field.startswith("beta")):  # Transformers takes its default then
            continue
        fits = type(value) is bool if kind == "true or false" else _is_number(value)
        if not fits or (kind == "whole number" and type(value) is not int):
            raise ValueError(f"{name} has {key} {value!r}: is no {kind}")
        values[field] = float(value) if kind == "number" else value
    beside = given.get("original_max_position_embeddings")
    if method == "llama3" and not set(ROPE_KEYS[method]) <= set(values):
        raise ValueError(f"{name} of rope_type llama3 must have {', '.join(KEYS[key] for key in ROPE_KEYS[method])}")
    if method == "yarn":
        values.setdefault("original_max_sequence_length", given["max_position_embeddings"])
        scales = [rope.get("mscale"), rope.get("mscale_all_dim")]
        if "attention_factor" not in values and all(scales) and "factor" in values:
            if not all(map(_is_number, scales)):
                raise ValueError(f"{name} has mscale {scales[0]!r} and mscale_all_dim {scales[1]!r}: are no numbers")
            above, below = (yarn_attention(values["factor"], float(scale or 1)) for scale in scales)
            values["attention_factor"] = above / below if below else 0.0
    if beside is not None and method != "linear" and beside != values["original_max_sequence_length"]:
        raise ValueError(
            f"original_max_position_embeddings is {beside!r} beside {name} and "
            f"{values['original_max_sequence_length']} in it: remove the wrong one"
        )
    if "factor" not in values:
        raise ValueError(f"{name} of rope_type {method} must have factor")
    try:
        return RopeScalingConfig(method=method, **values)  # type: ignore[arg-type]
    except ValueError as error:
        lines = [f"{name}.{KEYS[field]} {problem}" for field, problem in error.args[0].items()]
        raise ValueError("\n".join(lines)) from error


def rope_to_hf(scaling: RopeScalingConfig, family: str) -> dict[str, Any]:
    """The `rope_scaling` of a `config.json` that versions 4 and 5 read.

    Raises:
        ValueError: version 4 refuses it in a model of this family.
    """
    if family in ONLY_LINEAR:
        if scaling.method != "linear":
            raise ValueError(f"rope_scaling.method {scaling.method}: {family} in Transformers 4 knows only linear")
        return {"type": "linear", "factor": scaling.factor}
    values = {KEYS[field]: getattr(scaling, field) for field in ("factor", *ROPE_KEYS[scaling.method])}
    return {"rope_type": scaling.method} | {key: value for key, value in values.items() if value is not None}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST
