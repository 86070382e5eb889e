"""Softmax attention (Vaswani et al. 2017), with every option that kernels in use have."""

from __future__ import annotations

from typing import Any

from ..norms import NORMS, multiplied
from .variant import COMMON_BUGS, COMMON_FAMILIES, COMMON_LAWS, Variant

__all__ = ["SOFTMAX", "scores"]


def scores(q: Any, k: Any, o: Any) -> Any:
    """Return the scores: norms, rotary positions, products, scale, softcap, ALiBi, bias, in this order."""
    q, k = multiplied(q, k, o)
    s = q @ k.T * o.scale
    if o.softcap is not None:
        s = (s / o.softcap).tanh() * o.softcap
    if o.slope is not None:
        s = s - o.apart * o.slope
    return s if o.bias is None else s + o.bias


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Define softmax attention of one head."""
    s = scores(q, k, o)
    m = s.shift(o.allowed, o.sink)  # any number per row will do: it cancels
    p = (s - m).exp(where=o.allowed)
    if o.weight is not None:
        p = p * o.weight
    z = p.sum() if o.sink is None else p.sum() + (o.sink - m).exp()
    if o.kept is not None:
        p = p.where(o.kept) / o.share
    return (p @ v) / z, m + z.log()


SOFTMAX = Variant(
    name="softmax",
    define=attention,
    formula="out_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink)),  "
    "s_ij = softcap·tanh(scale·q_i·k_j / softcap) - slope·|place_i - place_j| + bias_ij + log weight_ij, "
    "q and k normed (w x / sqrt(mean(x^2) + eps)), then turned by rotary positions;  "
    "lse_i = log(sum_j exp(s_ij) + exp(sink));  "
    "with dropout v_j counts kept_ij / (1 - p) times in out",
    unit="u · sum_j p_ij |v_jc|",
    source="Vaswani et al., arXiv 1706.03762, eq. 1; softcap as in Gemma 2 (arXiv 2408.00118, section 2); "
    "the sink logit as in StreamingLLM's softmax1 (arXiv 2309.17453, eq. 2), learnable in gpt-oss. "
    "Recalled, not read again.",
    compared="PyTorch, JAX, ONNX Runtime, OpenVINO and Keras: {doc}`../kernels`",
    uses=frozenset({"causal", "window", "softcap", "sink", "bias", "allowed", "weight", "dropout_mask"})
    | {"lengths_q", "lengths_k", "offset", "alignment", "rotary", "alibi_slopes", "philox_layout", *NORMS},
    has_lse=True,
    positive=True,
    fused="softmax",
    laws=(
        *COMMON_LAWS,
        "split_and_merge",
        "lengths_cut",
        "offset_of_corner",
        "scales_moved",
        "rotary_none",
        "positions_moved",
        "alibi_none",
        "corner_of_window",
        "norm_scaled",
        "dropout_complement",
        "philox_moved",
        "pages_moved",
        "unowned_unread",
        "latent_expanded",
        "bias_shifted",
        "gradient_steps",
        "lse_gradient",
        "dk_sums",
        "dbias_sums",
    ),
    bugs=(
        *COMMON_BUGS,
        "bias_ignored",
        "softcap_ignored",
        "softcap_after_bias",
        "sink_ignored",
        "lse_base_two",
        "lse_of_empty_row_zero",
        "empty_row_mean",
        "scores_clamped",
        "lengths_ignored",
        "lengths_one_more",
        "corner_of_unused",
        "offset_ignored",
        "offset_of_first_batch",
        "alignment_ignored",
        "key_scale_ignored",
        "value_scale_ignored",
        "out_scale_ignored",
        "scale_of_next_head",
        "scale_of_next_token",
        "scale_of_next_channel",
        "query_scale_ignored",
        "query_scale_of_next_head",
        "query_scale_of_first_in_group",
        "block_scale_of_next",
        "block_scale_of_first",
        "blocks_of_32_read_as_16",
        "blocks_of_16_read_as_32",
        "tensor_scale_lost",
        "tensor_scale_twice",
        "nibbles_of_keys_swapped",
        "nibbles_of_values_swapped",
        "scale_exponent_off_by_one",
        "scale_clamped",
        "page_of_other_layout",
        "page_tail_read",
        "table_ignored",
        "table_off_by_one",
        "table_of_next_item",
        "appended_one_late",
        "appended_unseen",
        "appended_not_kept",
        "appended_over_tail",
        "rotary_ignored",
        "rotary_pairs_swapped",
        "rotary_other_way",
        "rotary_rest_dropped",
        "rotary_before_scale",
        "query_at_next_position",
        "positions_ignored",
        "norm_ignored",
        "norm_unweighted",
        "norm_after_rotary",
        "norm_over_all_heads",
        "norm_of_keys_over_all_heads",
        "norm_over_a_group",
        "norm_over_all_heads_by_one_width",
        "t5_both_ways_for_one",
        "t5_one_way_for_both",
        "t5_query_less_key",
        "t5_other_base",
        "t5_last_unreached",
        "temperature_ignored",
        "temperature_of_next_position",
        "temperature_of_last_query",
        "temperature_on_keys",
        "rotary_own_tables",
        "positions_in_bfloat16",
        "tree_sibling_seen",
        "document_boundary_off_by_one",
        "window_side_clamped",
        "offset_of_causal_alone",
        "scale_of_latent_width",
        "alibi_ignored",
        "alibi_of_next_head",
        "alibi_of_zero_made",
        "dropout_ignored",
        "dropout_unscaled",
        "dropout_before_softmax",
        "dropout_in_lse",
        "dropout_of_next_head",
        "dropout_of_next_warp",
        "dropout_of_next_lane",
        "dropout_inverted",
        "dropout_bits_turned",
        "philox_offset_by_warp",
        "philox_seed_halved",
    ),
    families=(*COMMON_FAMILIES, "shifted", "extreme", "types", "pages", "positions", "dropout"),
    quick=frozenset(
        {
            "empty/rows-allowed",
            "empty/rows-with-everything",
            "gaussian/allowed-whole",
            "gaussian/bias-for-all-rows",
            "gaussian/dim-40",
            "gaussian/everything",
            "gaussian/offset-by-batch",
            "gaussian/window-before",
            "gaussian/window-top-left",
            "gaussian/softcap-bias",
            "gaussian/window-both-sides-top-left",
            "gaussian/window-lengths-differ",
            "pages/appended",
            "pages/appended-packed",
            "pages/in-one-array",
            "pages/shared",
            "pages/unowned-nan",
            "poison/key-behind-mask",
            "poison/key-seen-by-some",
            "poison/value-seen-by-some",
            "ragged/keys-past-16-bits",
            "ragged/lengths",
            "ragged/lengths-of-keys",
            "ragged/lengths-packed",
            "ragged/no-batch",
            "ragged/no-keys",
            "ragged/no-queries",
            "ragged/packed-ends",
            "ragged/rows-past-16-bits",
            "shifted/below-sentinels-causal",
            "shifted/below-sentinels-window",
            "shifted/large-sink",
            "shifted/small",
            "sparse/scale-zero",
            "types/float8-by-head",
            "types/int8-by-token-and-channel",
            "types/mxfp4",
            "types/mxfp8",
            "types/nvfp4",
            "types/out-float8",
            "types/rotary-by-channel",
            "positions/rotary-half",
            "positions/rotary-given",
            "positions/alibi-by-batch",
            "positions/norm-aligned",
            "positions/norm-rotary",
            "positions/t5",
            "positions/t5-causal",
            "positions/tempered",
            "dropout/plain",
            "dropout/square",
            "dropout/bits",
            "dropout/philox",
        }
    ),
    contract=(
        "A row without any key gives out 0 and lse -inf; a sink counts as a key without a value.",
        "A key that is not allowed, whose bias is -inf or whose weight is 0, is never read: NaN there changes nothing.",
        "NaN or inf in a query, or in a key that a row sees, or +inf in a bias: that row's out and lse are NaN.",
        "NaN in a value that a row sees: that element is NaN; inf: it is the same inf (NaN if both signs meet).",
        "lse is the natural logarithm.",
    ),
)
