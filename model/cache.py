"""Key-value cache: keys and values of earlier tokens are kept, so that only the next token is computed.

Dimensions: B sequences, K key-value heads, S tokens that there is room for, T new tokens, E width of a head.
"""

from torch import Tensor


class LayerCache:
    """Rotated keys, and values, of one attention layer; both `[B, K, S, E]`, filled from the front."""

    def __init__(self, keys_BKSE: Tensor, values_BKSE: Tensor) -> None:
        self._keys_BKSE, self._values_BKSE = keys_BKSE, values_BKSE
        self.num_tokens = 0

    def extend(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens; returns views of all so far.

        Raises:
            ValueError: there is no room for them.
        """
        first, end, room = self.num_tokens, self.num_tokens + k_BKTE.shape[2], self._keys_BKSE.shape[2]
        if end > room:
            raise ValueError(f"the cache has room for {room} tokens, but {end} are needed")
        self._keys_BKSE[:, :, first:end], self._values_BKSE[:, :, first:end] = k_BKTE, v_BKTE
        self.num_tokens = end
        return self._keys_BKSE[:, :, :end], self._values_BKSE[:, :, :end]


class KeyValueCache:
    """A cache for each block; `Transformer.new_cache` makes one."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the cache."""
        return self.layers[0].num_tokens
