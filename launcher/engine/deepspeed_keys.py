"""The keys of `engine.deepspeed` before an engine is built: DeepSpeed itself ignores those that it does not know."""

import difflib
from collections.abc import KeysView
from typing import Any

from launcher.errors import ConfigError


class AskedKeys(dict[str, Any]):
    """A configuration that knows which keys it was asked for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.asked: set[Any] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        """A view that asks this object; a dict's own would look past `__contains__`."""
        return KeysView(self)


def check_keys(settings: dict[str, Any]) -> None:
    """Let DeepSpeed read a configuration before anything is built with it; the process group is there.

    Raises:
        ConfigError: it refuses the configuration, or there are keys that it never asks for.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    keys, version = AskedKeys(settings), f"DeepSpeed {deepspeed.__version__}"
    try:
        DeepSpeedConfig(keys)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(f"engine.deepspeed: {version} refuses it: {'; '.join(problems)} ({error.title})") from error
    except (DeepSpeedConfigError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f"engine.deepspeed: {version} refuses it: {error}") from error
    unknown = []
    for key in (key for key in settings if key not in keys.asked):
        near = difflib.get_close_matches(key, sorted(map(str, keys.asked)), n=1, cutoff=0.6)
        advice = f"did you mean {near[0]}?" if near else "leave it out, or see whether it belongs to a section"
        unknown.append(f"engine.deepspeed.{key}: {version} reads no such key; {advice}")
    if unknown:
        raise ConfigError("\n".join(unknown))
