"""The ring of refattn.devices with one thing wrong each, and functions that break the contract: ranks import them."""

import inspect
import os
import re
import signal
import sys
import time
import types
from dataclasses import replace

from refattn import UnsupportedProblem
from refattn.devices import ring as right
from refattn.devices import tree as trees

EDITS = {
    "lse_in_base_2": ("torch.logaddexp(lse, part)", "torch.logaddexp2(lse, part)"),
    "lse_returned_in_base_2": ('"lse": lse,', '"lse": lse / 0.6931471805599453,'),
    "chunks_the_other_way_round": ("shard.dout, shard.rows", "shard.dout, shard.rows.roll(len(shard.rows) // 2)"),
    "mask_of_the_own_chunk": ("k, v, at = _passed_on(shard, k, v, at)", "k, v = _passed_on(shard, k, v)"),
    "no_mask": ("causal is not None", "False"),
    "mask_off_by_one": ("at > rows[:, None] + first", "at >= rows[:, None] + first"),
    "dk_of_the_neighbour": ("k, v, at, dk, dv = _passed_on(shard, k, v, at, dk, dv)",
        "dv = _passed_on(shard, dv)[0]; k, v, at, dk = _passed_on(shard, k, v, at, dk) if _ + 1 < shard.world_size "
        "else (k, v, at, dk)"),
    "a_step_skipped": ("range(shard.world_size)", "range(shard.world_size - 1)"),
    "not_rescaled": ("kept * out + new", "out + new"),
    "merged_by_halves": ("kept * out + new *", "(out if lse.isinf().all() else out / 2) + 0.5 *"),
    "delta_of_a_part": ("delta = (dout * out).sum(3, keepdim=True)", "delta = 0.5 * (dout * out).sum(3, keepdim=True)"),
    "lse_of_a_part": ("- lse[..., None]", "- part[..., None]"),
    "dq_of_the_last_step": ("dq = dq + ds", "dq = ds"),
    "dv_not_summed_over_ranks": ("dv = dv + summed", "dv = summed"),
    "heads_in_another_order": ("x.repeat_interleave(shard.query.shape[1] // x.shape[1], 1)",
        "x.repeat(1, shard.query.shape[1] // x.shape[1], 1, 1)"),
}  # fmt: skip
"""What is replaced, and by what, where it stands first."""


def edited(right, name, old, new):
    """Return a module with an edit."""
    source = inspect.getsource(right)
    assert old in source, name
    module = types.ModuleType(f"{right.__name__}_{name}")
    module.__package__ = right.__package__
    code = re.sub(r"from __future__.*\n", "", source.replace(old, new, 1))
    exec(compile(code, f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    return module


for _name in EDITS:
    globals()[_name] = edited(right, _name, *EDITS[_name]).ring


def always_causal(shard):
    return right.ring(replace(shard, options=shard.options | {"causal": "bottom_right"}))


def never_scaled(shard):
    return right.ring(replace(shard, options={n: x for n, x in shard.options.items() if n != "scale"}))


def without(option):
    """Return the ring that does not look at an option."""

    def ignoring(shard):
        return right.ring(replace(shard, options={n: x for n, x in shard.options.items() if n != option}))

    ignoring.__qualname__ = ignoring.__name__ = f"no_{option}"
    return ignoring


no_window, no_offset, no_softcap = map(without, ("window", "offset", "softcap"))


def other_corner(shard):
    return right.ring(replace(shard, options=shard.options | {"causal": "bottom_right"}))


def first_of_the_batch(shard):
    return {n: x[:1].expand_as(x).clone() for n, x in right.ring(shard).items()}


unweighed = edited(trees, "unweighed", "own * out + other * others_out", "(out + others_out) / 2").tree


def out_alone(shard):
    return {"out": right.ring(shard)["out"]}


def nothing(shard):
    return {}


def unknown_name(shard):
    return {"out": shard.query, "dbias": shard.query}


def transposed(shard):
    return {"out": right.ring(shard)["out"].mT.contiguous()}


def wider(shard):
    return {"out": right.ring(shard)["out"].double()}


def lse_on_one_rank(shard):
    found = right.ring(shard)
    return found if shard.rank else {"out": found["out"]}


def dies(shard):
    if shard.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return right.ring(shard)


class Sleeper:
    """Hangs where it is imported, before a rank has imported PyTorch; what it starts hangs, too."""

    def __reduce__(self):
        return hang, (os.environ.get("REFATTN_TEST_NOTE", ""),)

    def __call__(self, shard):
        raise AssertionError


def hang(note):
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if note:
        with open(note, "a") as f:
            f.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(600)


class Quitter:
    """Ends its process where it is imported."""

    def __reduce__(self):
        return os._exit, (7,)

    def __call__(self, shard):
        raise AssertionError


class Raiser:
    """Names nothing that another process finds."""

    def __reduce__(self):
        return int, ("no\x1b[31m number\nat all",)

    def __call__(self, shard):
        raise AssertionError


class Refuser:
    """Refuses where it is imported."""

    def __reduce__(self):
        return refuse, ()

    def __call__(self, shard):
        raise AssertionError


def refuse():
    raise UnsupportedProblem("window: not here")
