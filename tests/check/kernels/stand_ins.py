"""Stand-ins for packages that need a GPU: their functions' names, arguments and layouts, and the definition in float64.

Each keeps the calls that it got. What an argument means is written as the package's documentation says it, and nothing
of refattn is used.
"""

import math
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch


def attend(q, k, v, seen, scale, softcap=0.0, bias=0.0):
    """One sequence, (n, h, d) each, in float64: out (n, h, d_v) and lse (h, n); rows without keys get 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    s = q @ k.mT * (q.shape[2] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = (s + bias).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    p = torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(s - lse[..., None]))
    return (p @ v).transpose(0, 1), lse


def band(n, m, left, right, first):
    """Row i sees keys i + first - left to i + first + right; below 0 is no limit."""
    far = torch.arange(m) - torch.arange(n)[:, None] - first
    seen = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        seen &= far >= -left
    if right >= 0:
        seen &= far <= right
    return seen


def flash(q, k, v, scale, causal, window, softcap, slopes=None):
    """One sequence as FlashAttention's documentation has it."""
    n, m = len(q), len(k)
    left, right = window
    seen = band(n, m, left, 0 if causal else right, m - n)
    far = (torch.arange(n)[:, None] + m - n - torch.arange(m)).abs().double()
    bias = 0.0 if slopes is None else -slopes.double()[:, None, None] * far
    return attend(q, k, v, seen, scale, softcap, bias)


def kept(calls, name, function):
    def call(*args, **kwargs):
        calls.append((name, kwargs))
        return function(*args, **kwargs)

    return call


def module(name, calls, **functions):
    found = ModuleType(name)
    vars(found).update(
        {n: kept(calls, n, f) if callable(f) and not isinstance(f, type) else f for n, f in functions.items()}
    )
    return found


def of_batch(q, k, v, slopes, **how):
    """FlashAttention's layout (b, n, h, d)."""
    each = (
        [None] * len(q)
        if slopes is None
        else [slopes if slopes.ndim == 1 else x for x in (slopes if slopes.ndim == 2 else q)]
    )
    found = [flash(a, b, c, slopes=s, **how) for a, b, c, s in zip(q, k, v, each, strict=True)]
    return torch.stack([o for o, _ in found]).to(q.dtype), torch.stack([x for _, x in found]).float()


def of_packed(q, k, v, starts_q, starts_k, used_q=None, used_k=None, **how):
    """FlashAttention's layout (rows, h, d) with offsets; what is not used stays 0."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    out, lse = torch.zeros(*q.shape[:2], v.shape[2]), torch.full((q.shape[1], q.shape[0]), -math.inf)
    for t in range(len(starts_q) - 1):
        a, b, c, d = (int(x[t + i]) for x in (starts_q, starts_k) for i in (0, 1))
        b, d = a + int(used_q[t]) if used_q is not None else b, c + int(used_k[t]) if used_k is not None else d
        out[a:b], lse[:, a:b] = flash(q[a:b], k[c:d], v[c:d], **how)
    return out.to(q.dtype), lse


def of_cache(q, k_cache, v_cache, k, v, cache_seqlens, table, slopes=None, **how):
    """FlashAttention's caches (b or pages, room, h, d): new keys go behind `cache_seqlens`, then all is read."""
    out, lse = [], []
    for b in range(len(q)):
        n = int(cache_seqlens[b])
        if k is not None:
            for i in range(k.shape[1]):
                page, at = (
                    (b, n + i)
                    if table is None
                    else (int(table[b, (n + i) // k_cache.shape[1]]), (n + i) % k_cache.shape[1])
                )
                k_cache[page, at], v_cache[page, at] = k[b, i], v[b, i]
            n += k.shape[1]
        keys, values = (
            x[b, :n] if table is None else torch.cat([x[int(i)] for i in table[b][: -(-n // x.shape[1])]])[:n]
            for x in (k_cache, v_cache)
        )
        o, x = flash(q[b], keys, values, slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b], **how)
        out.append(o)
        lse.append(x)
    return torch.stack(out).to(q.dtype), torch.stack(lse).float()


def flash_attn(calls):
    """FlashAttention 2.8.4."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        found = of_batch(q, k, v, alibi_slopes, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
        return (*found, None) if return_attn_probs else found[0]

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        found = of_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, slopes=alibi_slopes, **how)
        return (*found, None) if return_attn_probs else found[0]

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
                                cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
                                softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                rotary_interleaved=True, alibi_slopes=None, num_splits=0,
                                return_softmax_lse=False):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        found = of_cache(q, k_cache, v_cache, k, v, cache_seqlens, block_table, slopes=alibi_slopes, **how)
        return found if return_softmax_lse else found[0]

    functions = flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    return {"flash_attn": module("flash_attn", calls, **{f.__name__: f for f in functions})}


def flash_3(calls, name="flash_attn_interface"):
    """FlashAttention 3.0.0, and the wheel fa3-fwd 0.0.3, whose module has another name."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
        found = of_batch(q, k, v, None, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
        return found if return_attn_probs else found[0]

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                               seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                               k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                               num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
                               return_attn_probs=False):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        found = of_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, **how)
        return found if return_attn_probs else found[0]

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
                                cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
                                cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
                                q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
                                window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
                                scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
                                return_softmax_lse=False):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        found = of_cache(q, k_cache, v_cache, k, v, cache_seqlens, page_table, **how)
        return (*found, None, None) if return_softmax_lse else found[0]

    functions = flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    return {name: module(name, calls, **{f.__name__: f for f in functions})}


def vllm(calls):
    """vllm-project/flash-attention at 617264c: lengths before offsets, keys in pages by `seqused_k`."""

    def flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
                               q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None,
                               softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
                               block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
                               q_descale=None, k_descale=None, v_descale=None, num_splits=0, fa_version=2,
                               s_aux=None):  # fmt: skip
        assert (cu_seqlens_k is None) != (seqused_k is None)
        how = {"scale": softmax_scale, "causal": causal, "window": window_size or (-1, -1), "softcap": softcap}
        if block_table is None:
            found = of_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **how)
        else:
            each, starts = [], cu_seqlens_q.tolist()
            for t, (a, b) in enumerate(pairwise(starts)):
                one = slice(t, t + 1)
                each.append(of_cache(q[a:b][None], k, v, None, None, seqused_k[one], block_table[one], **how))
            found = torch.cat([o[0] for o, _ in each]), torch.cat([x[0] for _, x in each], 1)
        return found if return_softmax_lse else found[0]

    inner = module("vllm.vllm_flash_attn", calls, flash_attn_varlen_func=flash_attn_varlen_func)
    return {"vllm": ModuleType("vllm"), "vllm.vllm_flash_attn": inner}


def flashinfer(calls):
    """flashinfer 0.6.18: rows first, lse to base 2 as (rows, heads), the left side of a window alone."""

    def one(q, k, v, causal, sm_scale, window_left, logits_soft_cap):
        out, lse = flash(q, k, v, sm_scale, causal, (window_left, -1), logits_soft_cap or 0.0)
        return out.to(q.dtype), (lse / math.log(2)).T.float()

    def single_prefill_with_kv_cache(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
                                     packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
                                     use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
                                     rope_scale=None, rope_theta=None, backend="auto", return_lse=False):  # fmt: skip
        found = one(q, k, v, causal, sm_scale, window_left, logits_soft_cap)
        return found if return_lse else found[0]

    def single_decode_with_kv_cache(q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False,
                                    q_scale=None, k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None,
                                    sm_scale=None, rope_scale=None, rope_theta=None, return_lse=False):  # fmt: skip
        out, lse = one(q[None], k, v, True, sm_scale, window_left, logits_soft_cap)
        return (out[0], lse[0]) if return_lse else out[0]

    class Paged:
        def __init__(self, float_workspace_buffer, kv_layout="NHD"):
            assert float_workspace_buffer.dtype == torch.uint8
            self.layout = kv_layout

        def keys(self, caches):
            for t in range(len(self.starts) - 1):
                pages = self.numbers[self.starts[t] : self.starts[t + 1]].long()
                found = [x[pages] if self.layout == "NHD" else x[pages].transpose(1, 2) for x in caches]
                n = (len(pages) - 1) * self.size + int(self.last[t])
                yield [x.flatten(0, 1)[:n] for x in found]

    class BatchPrefillWithPagedKVCacheWrapper(Paged):
        def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
                 head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
                 pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
                 logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type="float16",
                 kv_data_type=None):  # fmt: skip
            calls.append(("plan", {"causal": causal, "window_left": window_left, "q_data_type": q_data_type}))
            self.rows, self.starts, self.numbers = qo_indptr, paged_kv_indptr, paged_kv_indices
            self.last, self.size = paged_kv_last_page_len, page_size
            self.how = causal, sm_scale, window_left, logits_soft_cap

        def run(self, q, paged_kv_cache, *, return_lse=False):
            rows = list(pairwise(self.rows.tolist()))
            found = [one(q[a:b], *kv, *self.how) for (a, b), kv in zip(rows, self.keys(paged_kv_cache), strict=True)]
            out, lse = (torch.cat(x) for x in zip(*found, strict=True))
            return (out, lse) if return_lse else out

    class BatchDecodeWithPagedKVCacheWrapper(Paged):
        def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
                 pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
                 kv_data_type=None, sm_scale=None, rope_scale=None, rope_theta=None):  # fmt: skip
            calls.append(("plan", {"window_left": window_left, "q_data_type": q_data_type}))
            self.starts, self.numbers, self.last, self.size = indptr, indices, last_page_len, page_size
            self.how = True, sm_scale, window_left, logits_soft_cap

        def run(self, q, paged_kv_cache, *, return_lse=False):
            found = [one(x[None], *kv, *self.how) for x, kv in zip(q, self.keys(paged_kv_cache), strict=True)]
            out, lse = (torch.cat(x) for x in zip(*found, strict=True))
            return (out, lse) if return_lse else out

    functions = {f.__name__: f for f in (single_prefill_with_kv_cache, single_decode_with_kv_cache)}
    wrappers = {f.__name__: f for f in (BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper)}
    return {"flashinfer": module("flashinfer", calls, **functions, **wrappers)}


def xformers(calls):
    """xFormers 0.0.33: masks are objects, grouped heads a further axis, the rows of lse padded to 32."""

    class Mask:
        def __init__(self, of, **how):
            self.of, self.how = of, how

        def seen(self, n, m):
            first = 0 if self.of == "top" else m - n
            left, right = (
                (-1, 0) if self.of in ("top", "bottom") else (self.how["window_left"], self.how["window_right"])
            )
            return band(n, m, left, right, first)

    class BlockDiagonalMask(Mask):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None):
            return cls("blocks", lengths=(q_seqlen, kv_seqlen), inner=None)

        def make_causal(self):
            return BlockDiagonalMask("blocks", lengths=self.how["lengths"], inner="top")

        def make_causal_from_bottomright(self):
            return BlockDiagonalMask("blocks", lengths=self.how["lengths"], inner="bottom")

        def seen(self, n, m):
            blocks = [
                Mask(self.how["inner"]).seen(a, b) if self.how["inner"] else torch.ones(a, b, dtype=torch.bool)
                for a, b in zip(*self.how["lengths"], strict=True)
            ]
            return torch.block_diag(*[x.int() for x in blocks]).bool()

    def both(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        grouped = query.ndim == 5
        if grouped:
            assert key.shape[:4] == (query.shape[0], key.shape[1], *query.shape[2:4])
            shape = query.shape[2:4]
            query, key, value = (x.flatten(2, 3) for x in (query, key, value))
        n, m = query.shape[1], key.shape[1]
        plain = attn_bias is None or torch.is_tensor(attn_bias)
        if torch.is_tensor(attn_bias):
            assert attn_bias.shape == (len(query), query.shape[2], n, m)
            assert attn_bias.dtype == query.dtype
        seen = torch.ones(n, m, dtype=torch.bool) if plain else attn_bias.seen(n, m)
        bias = attn_bias.double() if torch.is_tensor(attn_bias) else torch.zeros(len(query), 1, 1, 1)
        found = [attend(a, b, c, seen, scale, 0.0, x) for a, b, c, x in zip(query, key, value, bias, strict=True)]
        out, lse = torch.stack([o for o, _ in found]).to(query.dtype), torch.stack([x for _, x in found]).float()
        if isinstance(attn_bias, BlockDiagonalMask):  # a row for each sequence
            parts = lse[0].split(attn_bias.how["lengths"][0], -1)
            longest = max(x.shape[-1] for x in parts)
            lse = torch.stack([torch.nn.functional.pad(x, (0, longest - x.shape[-1])) for x in parts])
        lse = torch.nn.functional.pad(lse, (0, -n % 32), value=math.inf)
        return (out.unflatten(2, shape), lse.unflatten(1, shape)) if grouped else (out, lse)

    def memory_efficient_attention(*args, **more):
        return both(*args, **more)[0]

    attn_bias = SimpleNamespace(
        LowerTriangularMask=lambda: Mask("top"),
        LowerTriangularFromBottomRightMask=lambda: Mask("bottom"),
        LocalAttentionFromBottomRightMask=lambda window_left, window_right: Mask(
            "window", window_left=window_left, window_right=window_right
        ),
        BlockDiagonalMask=BlockDiagonalMask,
    )
    functions = {
        "memory_efficient_attention": memory_efficient_attention,
        "memory_efficient_attention_forward_requires_grad": both,
    }
    fmha = module("xformers.ops.fmha", calls, **functions)
    fmha.attn_bias = attn_bias
    ops = ModuleType("xformers.ops")
    ops.fmha = fmha
    return {"xformers": ModuleType("xformers"), "xformers.ops": ops}


def transformer_engine(calls):
    """Transformer Engine 2.20: a layer; out is (b, n, h d), a mask is True where it hides."""

    class DotProductAttention:
        def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
                     qkv_format="sbhd", attn_mask_type="causal", window_size=None, bottom_right_diagonal=None,
                     sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=None,
                     attention_type="self", softmax_scale=None, softmax_type="vanilla"):  # fmt: skip
            calls.append(("DotProductAttention", {"attn_mask_type": attn_mask_type, "window_size": window_size}))
            assert attention_dropout == 0.0
            self.heads = num_attention_heads, num_gqa_groups, kv_channels
            self.format, self.mask, self.window, self.scale = qkv_format, attn_mask_type, window_size, softmax_scale

        def seen(self, n, m, attention_mask):
            if self.mask == "arbitrary":
                return ~attention_mask
            kind = self.mask.removeprefix("padding").removeprefix("_").removeprefix("no_mask")
            left, right = self.window
            return band(n, m, left, 0 if kind else right, 0 if kind == "causal" else m - n)

        def __call__(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None,
                     cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None,
                     max_seqlen_kv=None, core_attention_bias_type="no_bias", core_attention_bias=None):  # fmt: skip
            q, k, v = query_layer, key_layer, value_layer
            assert (q.shape[-2], k.shape[-2], (k.shape[-1], v.shape[-1])) == self.heads
            if self.format == "thd":
                assert self.mask.startswith("padding")
                ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_kv.tolist(), strict=True))
                parts = [
                    attend(q[a:b], k[c:d], v[c:d], self.seen(b - a, d - c, None), self.scale)[0]
                    for (a, c), (b, d) in pairwise(ends)
                ]
                return torch.cat(parts).to(q.dtype).flatten(1)
            bias = torch.zeros(1, 1, 1) if core_attention_bias is None else core_attention_bias[0].double()
            assert (core_attention_bias_type == "post_scale_bias") == (core_attention_bias is not None)
            mask = [self.seen(q.shape[1], k.shape[1], x) for x in (attention_mask if attention_mask is not None else q)]
            mask = mask * len(q) if len(mask) < len(q) else mask
            out = [attend(a, b, c, s, self.scale, 0.0, bias)[0] for a, b, c, s in zip(q, k, v, mask, strict=True)]
            return torch.stack(out).to(q.dtype).flatten(2)

    inner = module("transformer_engine.pytorch", calls, DotProductAttention=DotProductAttention)
    return {"transformer_engine": ModuleType("transformer_engine"), "transformer_engine.pytorch": inner}


def sageattention(calls):
    """SageAttention 2.2.0, without its int8."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        assert tensor_layout == "HND"
        how = {"scale": sm_scale, "causal": is_causal, "window": (-1, -1), "softcap": 0.0}
        out, lse = of_batch(*(x.transpose(1, 2) for x in (q, k, v)), None, **how)
        return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)

    return {"sageattention": module("sageattention", calls, sageattn=sageattn)}
