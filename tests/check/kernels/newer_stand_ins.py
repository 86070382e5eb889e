"""Stand-ins as those of ``stand_ins``: FlashAttention 4, and SGLang's attention in plain PyTorch."""

import math
from types import ModuleType

import torch

from .stand_ins import attend, band, module


def flash_4(calls):
    """FlashAttention 4.0.0b36, flash_attn.cute: a side of a window is None where it is open, lengths stand alone."""

    def one(q, k, v, scale, causal, window, softcap, sink):
        left, right = window
        right = 0 if causal else right
        assert all(x is None or x >= 0 for x in (left, right))
        n, m = len(q), len(k)
        seen = band(n, m, -1 if left is None else left, -1 if right is None else right, m - n)
        out, lse = attend(q, k, v, seen, scale, softcap)
        if sink is not None:
            whole = torch.logaddexp(lse, sink.double()[:, None])
            out, lse = out * torch.exp(lse - whole).T[..., None], whole
        return out, lse

    def checked(q, k, v, learnable_sink):
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] % 8 == 0 == v.shape[-1] % 8
        assert learnable_sink is None or learnable_sink.shape == (q.shape[-2],)

    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
                        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
                        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
                        aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
                        gather_bwd_recompute_p=False, gather_bwd_token_chunk=None):  # fmt: skip
        checked(q, k, v, learnable_sink)
        how = (softmax_scale, causal, window_size, softcap, learnable_sink)
        found = [one(a, b, c, *how) for a, b, c in zip(q, k, v, strict=True)]
        lse = torch.stack([x for _, x in found]).float() if return_lse else None
        return torch.stack([o for o, _ in found]).to(q.dtype), lse

    def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                               max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
                               gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
                               window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
                               deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
                               block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
                               scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
                               gather_bwd_recompute_p=False, gather_bwd_token_chunk=None):  # fmt: skip
        checked(q, k, v, learnable_sink)
        assert page_table is None or cu_seqlens_k is None
        how = (softmax_scale, causal, window_size, softcap, learnable_sink)
        given = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
        assert all(x is None or x.dtype == torch.int32 for x in given)
        many = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1

        def part(x, ends, used, t):
            x = x[t] if ends is None else x[int(ends[t]) : int(ends[t + 1])]
            return x if used is None else x[: int(used[t])]

        out = torch.zeros(*q.shape[:-1], v.shape[-1])
        lse = torch.full((len(q), q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], len(q)), -math.inf)
        for t in range(many):
            if page_table is None:
                keys, values = (part(x, cu_seqlens_k, seqused_k, t) for x in (k, v))
            else:
                keys, values = (x[page_table[t].long()].flatten(0, 1)[: int(seqused_k[t])] for x in (k, v))
            rows = part(q, cu_seqlens_q, seqused_q, t)
            o, s = one(rows, keys, values, *how)
            if cu_seqlens_q is None:
                out[t, : len(rows)], lse[t, :, : len(rows)] = o, s
            else:
                a = int(cu_seqlens_q[t])
                out[a : a + len(rows)], lse[:, a : a + len(rows)] = o, s
        return out.to(q.dtype), lse if return_lse else None

    functions = {f.__name__: f for f in (flash_attn_func, flash_attn_varlen_func)}
    return {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": module("flash_attn.cute", calls, **functions)}


def sglang(calls):
    """SGLang 0.5.23: a request's queries are its last tokens, keys lie in a pool."""

    class TorchNativeAttnBackend:
        def __init__(self, model_runner):
            raise AssertionError("the adapter makes no runner of a model")

        def _run_sdpa_forward_extend(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                                     extend_prefix_lens, extend_seq_lens, encoder_lens=None, scaling=None,
                                     enable_gqa=False, causal=False, is_cross_attn=False,
                                     sliding_window_size=None):  # fmt: skip
            calls.append(("extend", {"sliding_window_size": sliding_window_size, "enable_gqa": enable_gqa}))
            assert enable_gqa or query.shape[1] == k_cache.shape[1]
            start = 0
            for i in range(len(seq_lens)):
                before, n, m = (int(x[i]) for x in (extend_prefix_lens, extend_seq_lens, seq_lens))
                assert before + n == m
                at = req_to_token[req_pool_indices[i], :m]
                window = sliding_window_size is not None and sliding_window_size > -1
                seen = band(n, m, sliding_window_size if window else -1, 0 if causal or window else -1, before)
                output[start : start + n] = attend(query[start : start + n], k_cache[at], v_cache[at], seen, scaling)[0]
                start += n
            return output

    name = "sglang.srt.layers.attention.torch_native_backend"
    inner = ModuleType(name)
    inner.TorchNativeAttnBackend = TorchNativeAttnBackend
    return {"sglang": ModuleType("sglang"), name: inner}
