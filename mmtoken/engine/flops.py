"""Floating-point operations of a decoder's prefill, counted from its shape (a multiply-add counts as two)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that the count needs; widths in features, that of the MLP as a token sees it on average over layers."""

    layers: int
    width: int
    mlp_width: int
    query_width: int
    key_width: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> DecoderShape:
        """Read a Hugging Face text config; gated MLP as in Llama and Qwen, of experts those that a token visits."""
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=_mlp_width(config),
            query_width=heads * head_width,
            key_width=key_heads * head_width,
        )


def _mlp_width(config: PreTrainedConfig) -> int:
    visited = getattr(config, "num_experts_per_tok", None)
    if not visited or not getattr(config, "moe_intermediate_size", None):
        return int(config.intermediate_size)
    layers, dense = config.num_hidden_layers, set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", 1)
    sparse = sum(number not in dense and (number + 1) % step == 0 for number in range(layers))
    width = sparse * visited * config.moe_intermediate_size + (layers - sparse) * config.intermediate_size
    return int(width / layers + 0.5)


@dataclass(frozen=True)
class TowerShape:
    """The sizes that the count of a vision transformer's block needs.

    Attributes:
        width: C, features of a patch.
        mlp: multiply-adds of the MLP per patch, 2 C C_m for one hidden layer of C_m features, 3 C C_m for a gated one.
    """

    width: int
    mlp: int


def block_multiply_adds(shape: TowerShape, patches: int, computed: int) -> int:
    """Multiply-adds of one block of a vision transformer on a frame of T patches of which n are computed.

    (T + 3 n) C^2 + 2 n T C + n x MLP: keys of all patches; queries, values, output projection and MLP of n; their
    attention to all. n = T is the plain block, 4 T C^2 + 2 T^2 C + T x MLP. Windows of attention are not allowed for.

    Args:
        shape: the block's sizes.
        patches: T.
        computed: n.
    """
    c, t, n = shape.width, patches, computed
    return (t + 3 * n) * c * c + 2 * n * t * c + n * shape.mlp


def prefill_flops(shape: DecoderShape, layer_lengths: list[list[int]]) -> float:
    """FLOPs of one prefill.

    Per layer and row of n tokens: projections 2 n d (2 d_q + 2 d_k), gated MLP 2 n (3 d m), attention scores and
    values 2 (2 n^2 d_q); causal skipping is not counted, as in FastV's equation 5. Embedding and head are left out.

    Args:
        shape: the decoder's sizes.
        layer_lengths: per layer, the tokens of every row.
    """
    linear = 2 * (2 * shape.width * (shape.query_width + shape.key_width) + 3 * shape.width * shape.mlp_width)
    return float(sum(linear * n + 4 * shape.query_width * n * n for lengths in layer_lengths for n in lengths))


def multiply_adds(shape: DecoderShape, layer_lengths: list[list[int]]) -> float:
    """The same as TransPrune and VLA-Pruner count it: 4 n d^2 + 2 n^2 d + 3 n d m per layer and row of n tokens.

    Half of `prefill_flops`, because a multiply-add counts once, for decoders with as many key as query heads and
    heads that make up the width; grouped heads have smaller projections than this formula allows for.

    Args:
        shape: the decoder's sizes.
        layer_lengths: per layer, the tokens of every row.
    """
    d, m = shape.width, shape.mlp_width
    return float(sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for lengths in layer_lengths for n in lengths))
