"""A decoder-only transformer: tokens in, logits or loss out, and nothing else.

One definition covers the families whose checkpoints it reads and writes, and the parameters carry the names that these
have in Hugging Face Transformers: Llama (arXiv 2302.13971: pre-norm, RMSNorm, SwiGLU, rotary positions), OLMo
(2402.00838: LayerNorm without parameters), OLMo 2 (2501.00656: norms after the sublayers, and on queries and keys),
Qwen2 (2407.10671: biases on queries, keys and values), Qwen3 (2505.09388: queries and keys normalized per head) and
BitNet b1.58 2B4T (2504.12285: squared ReLU and SubLN).
In bfloat16 as in float32 every operation rounds where the family's does, so that a model computes the same bits here
and there.

The projections are plain `nn.Linear`, without bias but for Qwen2's, and are always called as modules: whatever changes
their class from outside, a quantizer for one, takes part in every product. Parameters hold what torch puts there until
`model.init.initialize_` or a checkpoint fills them. There are no buffers: a model that was built on the meta device has
nothing but parameters to fill.

Dimensions in names: B sequences, T tokens of a sequence, N = B * T rows, D hidden, F intermediate, V vocabulary,
H query heads, K key-value heads, E width of a head.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from model.cache import KeyValueCache, LayerCache
from model.config import DistillationConfig, ModelConfig
from model.distillation import Lesson, relation_loss, watched_projections
from model.documents import MARKED, attend, beginnings, mask_of, positions
from model.loss import (
    IGNORED_LABEL,
    GradientOfLogits,
    distillation_loss,
    linear_cross_entropy,
    token_nll_and_misses,
)
from model.preference import Reference, preference_loss
from model.rotary import rotary_tables, rotate


def _widened(x: Tensor) -> Tensor:
    """Cast to float32, but leave float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, times a weight (arXiv 1910.07467)."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.rounds_once = config.rounds_once
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is `size`; the result has the input's dtype."""
        wide = _widened(x)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide if self.rounds_once else wide.to(x.dtype))).to(x.dtype)


class LayerNorm(nn.Module):
    """Subtract the mean and divide by the standard deviation over the last dimension; no parameters."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.size = size
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is `size`; the result has the input's dtype."""
        return F.layer_norm(_widened(x), (self.size,), eps=self.eps).to(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm-nonparametric": LayerNorm}


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, E = config.hidden_size, config.head_width
        H, K = config.num_heads, config.kv_heads
        self.head_dim, self.qk_norm, self.grouped, self.group_size = E, config.qk_norm, K < H, H // K
        self.q_proj = nn.Linear(D, H * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * E, D, bias=False)
        norm = NORMS[config.norm]
        if config.qk_norm != "none":
            self.q_norm = norm(E if config.qk_norm == "head" else H * E, config)
            self.k_norm = norm(E if config.qk_norm == "head" else K * E, config)
        self.attn_sub_norm = norm(H * E, config) if config.sub_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        cache: LayerCache | None = None,
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """Return what attention adds to the residual stream, `[B, T, D]`.

        The tokens follow those in the cache. Without one, a mask may say what each sees: `[B, 1, T, T]`, added to the
        scores, or the blocks of flex attention.
        """
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in (q, k, v))
        q_BHTE, k_BKTE = rotate(q_BHTE, cos_TE, sin_TE), rotate(k_BKTE, cos_TE, sin_TE)
        before = 0
        if cache is not None:
            before = cache.num_tokens
            k_BKTE, v_BKTE = cache.extend(k_BKTE, v_BKTE)
            if before and len(cos_TE) > 1:
                mask = torch.ones(len(cos_TE), k_BKTE.shape[2], dtype=torch.bool, device=x_BTD.device).tril(before)
        if isinstance(mask, BlockMask):
            out_BHTE = attend(q_BHTE, k_BKTE, v_BKTE, mask)
        else:
            grouped = self.grouped
            if grouped and x_BTD.device.type == "cuda" and (x_BTD.dtype == torch.float32 or mask is not None):
                # No fused kernel shares keys in fp32, or with a mask; without one, T x T scores of every head exist.
                k_BKTE, v_BKTE = (x.repeat_interleave(self.group_size, dim=1) for x in (k_BKTE, v_BKTE))
                grouped = False
            causal = mask is None and before == 0
            out_BHTE = F.scaled_dot_product_attention(
                q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
        return self.o_proj(self.attn_sub_norm(out_BHTE.transpose(1, 2).flatten(-2)))


class MLP(nn.Module):
    """Gated linear unit (arXiv 2002.05202): down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.ffn_sub_norm = NORMS[config.norm](config.intermediate_size, config) if config.sub_norm else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream, `[B, T, D]`."""
        gate_BTF = self.gate_proj(x_BTD)
        gate_BTF = F.silu(gate_BTF) if self.activation == "silu" else F.relu(gate_BTF).square()
        return self.down_proj(self.ffn_sub_norm(gate_BTF * self.up_proj(x_BTD)))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream: the unit that is sharded, compiled and checkpointed.

    The rotary tables must arrive in the dtype they are given in: with FSDP2, `cast_forward_inputs=False`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_position = config.norm_position
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        norm = NORMS[config.norm]
        if config.norm_position == "pre":
            self.input_layernorm = norm(config.hidden_size, config)
        self.post_attention_layernorm = norm(config.hidden_size, config)
        if config.norm_position == "post":
            self.post_feedforward_layernorm = norm(config.hidden_size, config)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        cache: LayerCache | None = None,
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """Return the residual stream after this block, `[B, T, D]`; the arguments are those of `Attention`."""
        if self.norm_position == "pre":
            x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE, cache, mask)
            # Hugging Face's name for it; before the MLP is where it stands.
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(x_BTD, cos_TE, sin_TE, cache, mask))
        return x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm."""

    first_token: int | None
    """The token with which documents begin, or `MARKED`, if those of a row are to be kept apart; see `model.documents`.
    With a cache all tokens are of one document."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.first_token = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config)

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the normalized residual stream after the last block, `[B, T, D]`; the cache is extended."""
        marked = self.first_token == MARKED
        num_tokens, before = tokens_BT.shape[1], 0 if cache is None else cache.num_tokens
        if (length := before + num_tokens) > self.config.max_sequence_length:
            raise ValueError(
                f"a sequence has {length} tokens, but max_sequence_length is {self.config.max_sequence_length}"
            )
        x_BTD = self.embed_tokens(tokens_BT.where(tokens_BT >= 0, ~tokens_BT) if marked else tokens_BT)
        cos_TE, sin_TE = rotary_tables(self.config, num_tokens, tokens_BT.device, before)
        if not self.config.rounds_once:
            cos_TE, sin_TE = cos_TE.to(x_BTD.dtype), sin_TE.to(x_BTD.dtype)
        if cache is not None:
            for block, layer in zip(self.layers, cache.layers, strict=True):
                x_BTD = block(x_BTD, cos_TE, sin_TE, layer)
            return self.norm(x_BTD)
        given: tuple[Tensor | BlockMask | None, ...] = (cos_TE, sin_TE)
        if self.first_token is not None:
            first_BT = beginnings(tokens_BT, self.first_token)
            positions_BT, config = positions(first_BT), self.config
            mask = mask_of(first_BT, x_BTD.dtype, (config.num_heads, config.kv_heads, config.head_width))
            given = (cos_TE[positions_BT][:, None], sin_TE[positions_BT][:, None], None, mask)
        for block in self.layers:
            x_BTD = block(x_BTD, *given)
        return self.norm(x_BTD)


class Output(NamedTuple):
    """The result of every forward pass of a `Transformer`: one of the first three, and None for what was not asked for.

    Losses are float32 (float64 where the parameters are), in nats.
    """

    logits: Tensor | None = None
    """`[B, T, V]`, in the parameters' dtype."""
    loss: Tensor | None = None
    """What training minimizes, 0-dim: the mean cross-entropy of the labels that count, plus the z-loss; with a teacher
    also the weighted divergences; with a reference the mean loss of pairs alone."""
    token_nll: Tensor | None = None
    """Cross-entropy of every label, in the shape of the labels, 0 at -100; without z-loss and without gradient."""
    token_misses: Tensor | None = None
    """Beside `token_nll`, if asked for: 1 where a label is not the likeliest token, else 0."""
    parts: Tensor | None = None
    """With a teacher, `[3]`, without gradient and unweighted, in this order: cross-entropy, divergence from the
    teacher's predictions, and from its attention relations. With a reference, those of
    `model.preference.preferences`."""


class Transformer(nn.Module):
    """A decoder and its output head."""

    gradient_of_logits: GradientOfLogits | None
    """`model.loss.gradient_of_logits`, compiled, for the loss of training; None to do without."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_of_logits = None
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output head, `[V, D]`."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        reduction: Literal["mean", "none", "greedy"] = "mean",
        teacher: Lesson | Reference | None = None,
    ) -> Output:
        """Compute logits, the training loss, or the loss of every token.

        Args:
            tokens_BT: int64.
            labels_BT: `labels_BT[b, t]` is the token that follows `tokens_BT[b, :t + 1]`, so the caller shifts; -100 is
                left out. Without labels the output has `logits`.
            reduction: with "mean" the output has `loss`, with "none" it has `token_nll`; labels may then be
                `[B, T, A]`, A for each place. "greedy" is "none" with `token_misses` too.
            teacher: a lesson on the same tokens, or what the reference of preferences gives for them, for reduction
                "mean"; the output then has `parts` too.
        """
        if isinstance(teacher, Lesson) and labels_BT is not None:
            return self._taught(tokens_BT, labels_BT, teacher)
        hidden_BTD, head_VD = self.model(tokens_BT), self.head
        if labels_BT is None:
            return Output(logits=F.linear(hidden_BTD, head_VD))
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten(0, 1)
        chunk_tokens, z_loss = self.config.loss_chunk_tokens, self.config.z_loss
        if isinstance(teacher, Reference):
            loss, parts = preference_loss(
                hidden_ND, head_VD, tokens_BT, labels_BT, chunk_tokens, teacher, self.gradient_of_logits
            )
            return Output(loss=loss, parts=parts)
        if reduction != "mean":
            greedy = reduction == "greedy"
            nll_N, misses_N = token_nll_and_misses(hidden_ND, head_VD, labels_N, chunk_tokens, misses=greedy)
            misses = misses_N.view_as(labels_BT) if greedy else None
            return Output(token_nll=nll_N.view_as(labels_BT), token_misses=misses)
        return Output(
            loss=linear_cross_entropy(hidden_ND, head_VD, labels_N, chunk_tokens, z_loss, self.gradient_of_logits)
        )

    def new_cache(self, batch_size: int, capacity_tokens: int) -> KeyValueCache:
        """Make an empty cache for `capacity_tokens` tokens of each sequence: 2 * L * B * K * S * E elements."""
        shape = (batch_size, self.config.kv_heads, capacity_tokens, self.config.head_width)
        like = self.head  # of a sharded model a DTensor, whose `new_empty` would be another one

        def empty() -> Tensor:
            return torch.empty(shape, dtype=like.dtype, device=like.device)

        return KeyValueCache([LayerCache(empty(), empty()) for _ in self.model.layers])

    @torch.no_grad()
    def next_logits(self, tokens_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits of the next token, `[B, V]`; `tokens_BT` follow those in the cache and are added to it."""
        return F.linear(self.model(tokens_BT, cache)[:, -1], self.head)

    def _taught(self, tokens_BT: Tensor, labels_BT: Tensor, lesson: Lesson) -> Output:
        hidden_BTD, relations = self._hidden_and_relations(tokens_BT, lesson.config, self.config.num_layers)
        loss, nll, divergence = distillation_loss(
            hidden_BTD.flatten(0, 1),
            self.head,
            labels_BT.flatten(),
            self.config.loss_chunk_tokens,
            self.config.z_loss,
            teacher=(lesson.hidden.flatten(0, 1), lesson.head),
            temperature=lesson.config.temperature,
            weight=lesson.config.weight,
        )
        relation = torch.zeros_like(nll)
        if relations:
            first_token, counts_BT = self.model.first_token, labels_BT != IGNORED_LABEL
            first_BT = None if first_token is None else beginnings(tokens_BT, first_token)
            heads = self.config.kv_heads, lesson.relation_heads
            relation = relation_loss(relations, lesson.relations, heads, counts_BT, first_BT)
            loss = loss + lesson.config.relation_weight * relation
        return Output(loss=loss, parts=torch.stack([nll, divergence, relation]).detach())

    @torch.no_grad()
    def teach(self, tokens_BT: Tensor, config: DistillationConfig, student_layers: int) -> Lesson:
        """Run this model as the teacher of a student with `student_layers` layers."""
        hidden_BTD, relations = self._hidden_and_relations(tokens_BT, config, student_layers)
        return Lesson(hidden_BTD, self.head, relations, self.config.kv_heads, config)

    def _hidden_and_relations(
        self, tokens_BT: Tensor, config: DistillationConfig, student_layers: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not config.relation_weight:
            return self.model(tokens_BT), ()
        layer = config.layer_of(self.config.num_layers, student_layers)
        with watched_projections(self.model.get_submodule(f"layers.{layer}.self_attn")) as relations:
            return self.model(tokens_BT), tuple(relations)
