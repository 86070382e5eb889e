"""Sphinx configuration; the pages of the operators are written from the table."""

import pkgutil
import shutil
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

import refattn
import refattn.functions
from refattn import masks
from refattn.check import FAMILIES, LAWS
from refattn.check.inputs.families import cases
from refattn.exact.lowering import lower
from refattn.papers import PAPERS
from refattn.theory import CLAIMS, run
from refattn.theory.plots import figure
from refattn.variants import Lowered, Selected

project = "refattn"
copyright = "2026, the refattn authors"
version = release = refattn.__version__
extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "refattn"
exclude_patterns = ["_build"]
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
intersphinx_mapping = {}
suppress_warnings = ["mystnb.unknown_mime_type"]

HERE = Path(__file__).parent
MOST_KEYS = 140
"""Of a case that is drawn."""


def _page(v: refattn.Variant) -> str:
    scale = "1/sqrt(d_k)" if v.default_scale == "rsqrt" else "1"
    own = [f"- `{n}` (default `{o.default!r}`): {o.meaning}" for n, o in v.options.items()] or ["- none"]
    parts = [
        f"# {v.name.capitalize()} attention",
        f"```text\n{v.formula}\n```",
        *_picture(v),
        f"Error unit: `{v.unit}`. `scale=None` is {scale}.",
        f"Options of `Problem` that it has: {', '.join(f'`{u}`' for u in sorted(v.uses))}.",
        "## Its own options",
        "\n".join(own),
        "## Contract",
        "\n".join(f"- {c}" for c in v.contract),
        "## Laws",
        "\n".join(f"- `{n}`: {LAWS[n].statement}" for n in v.laws),
        "## Input families",
        "\n".join(f"- `{n}`: {FAMILIES[n]}" for n in v.families),
        "## Planted bugs that its checks catch",
        ", ".join(f"`{b}`" for b in v.bugs) + ".",
        *_mistakes(v),
        "## Source",
        v.source,
        f"Compared with: {v.compared}.",
    ]
    return "\n\n".join(parts) + "\n"


def _mistakes(v: refattn.Variant) -> list[str]:
    if not v.wrong:
        return []
    lines = [f"- `{n}`: {text}" for n, (text, _) in v.wrong.items()]
    return ["## What implementers get wrong, each caught by its own cases", "\n".join(lines)]


def _picture(v: refattn.Variant) -> list[str]:
    """Draw which keys the rows of its own cases see, where it is another operator's call over some keys."""
    if not isinstance(v.shape, Lowered | Selected):
        return []
    shown = {c.label: c.problem("float32") for c in cases(v.name) if c.label in v.cases}
    shown = {n: p for n, p in shown.items() if p.n_k <= MOST_KEYS}
    rows = -(-len(shown) // 5)
    fig, axes = plt.subplots(rows, 5, figsize=(10, 2.3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (label, p) in zip(axes.flat, shown.items(), strict=False):
        q = lower(p).problem
        seen = np.broadcast_to(q.allowed, (*p.out_shape[:3], p.n_k))[0, 0]
        seen = seen & (True if p.causal is None else masks.causal(p.n_q, p.n_k, p.causal))
        axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="auto")
        axis.set_title(label, fontsize=8)
        axis.tick_params(labelsize=6)
    fig.supxlabel("key", fontsize=8)
    fig.supylabel("query", fontsize=8)
    fig.savefig(HERE / "variants" / f"{v.name}.svg")
    plt.close(fig)
    lines = [f"- {n}: `{', '.join(f'{o}={str(x)[:60]}' for o, x in p.options.items())}`" for n, p in shown.items()]
    picture = f"![Which keys the rows of {v.name} attention see]({v.name}.svg)"
    return [picture, "Which keys a query sees under these options:", "\n".join(lines)]


GALLERY = """\
# Gallery of masks

Which keys a query sees under each operator that is softmax attention over some of the keys; for those that choose by
scores, on random data. The pictures are drawn from the definitions.
"""


def _gallery() -> str:
    drawn = [v for v in refattn.VARIANTS.values() if isinstance(v.shape, Lowered | Selected)]
    return GALLERY + "".join(f"\n## {{doc}}`{v.name}`\n\n![{v.name}]({v.name}.svg)\n" for v in drawn)


def _functions() -> str:
    """Return the reference of refattn.functions, a section a module."""
    found = pkgutil.walk_packages(refattn.functions.__path__, "refattn.functions.")
    names = [m.name for m in found if not m.ispkg and m.name != "refattn.functions.arguments"]
    parts = (f"## {n[18:]}\n\n```{{eval-rst}}\n.. automodule:: {n}\n   :members:\n```\n" for n in sorted(names))
    return "# Reference\n\n" + "\n".join(parts)


def _papers() -> str:
    """Return the table of the papers that the package builds on."""
    rows = [
        f"| {p.title} | {p.source} | {', '.join(f'`{x}`' for x in p.here)} | {', '.join(f'`{x}`' for x in p.checks)} "
        f"| {p.peer or '-'} | {p.not_here} |"
        for p in PAPERS
    ]
    head = "| paper | source | here | tests | compared with | not here |\n|---|---|---|---|---|---|\n"
    return f"# Papers\n\nThe papers that refattn builds on (`refattn.papers`).\n\n{head}" + "\n".join(rows) + "\n"


def _claims() -> str:
    parts = ["# Claims that run", CLAIMS_INTRO]
    for claim in CLAIMS.values():
        found = run(claim)
        lines = [
            f"## `{claim.name}`",
            f"{claim.statement}.",
            f"- checks: {claim.check.__doc__}",
            f"- control: {claim.control.__doc__}",
            f"- found: {found.what}: {found.measured:.3g}, bound {found.bound:.3g}; {found.control}, as it must be",
        ]
        lines += [f"- needs: {text}" for text in claim.hypotheses]
        lines += [f"- conditional on {claim.conditional_on}"] if claim.conditional_on else []
        parts += ["\n\n".join(lines[:2]), "\n".join([*lines[2:], f"- source: {claim.source}"])]
        if (drawn := figure(found)) is not None:
            drawn.savefig(HERE / "theory" / f"{claim.name}.svg")
            parts.append(f"![What `{claim.name}` found]({claim.name}.svg)")
    return "\n\n".join(parts) + "\n"


CLAIMS_INTRO = """\
Claims of the papers on attention that this package builds on, as code: `refattn theory list`, `refattn theory run NAME`
or `--all`, with `--json FILE` and `--plots FOLDER`. A claim holds where what is measured is at most its bound; its
control is something near it that is false, and must be found so. What a claim does not speak of it refuses by naming
the hypothesis. Nothing here is a proof: a check can only fail to find a counterexample.
"""


def _write_pages() -> None:
    (HERE / "theory").mkdir(exist_ok=True)
    (HERE / "theory" / "index.md").write_text(_claims())
    (HERE / "functions" / "reference.md").write_text(_functions())
    (HERE / "functions" / "papers.md").write_text(_papers())
    pages = HERE / "variants"
    pages.mkdir(exist_ok=True)
    for v in refattn.VARIANTS.values():
        (pages / f"{v.name}.md").write_text(_page(v))
    names = "\n".join(refattn.VARIANTS)
    (pages / "gallery.md").write_text(_gallery())
    rows = "".join(f"| {{doc}}`{v.name}` | {v.source} | {v.compared} |\n" for v in refattn.VARIANTS.values())
    table = f"| operator | source | compared with |\n|---|---|---|\n{rows}"
    (pages / "index.md").write_text(f"# Operators\n\n{table}\n```{{toctree}}\n:hidden:\n\n{names}\ngallery\n```\n")
    notebooks = HERE / "notebooks"
    shutil.rmtree(notebooks, ignore_errors=True)
    shutil.copytree(HERE.parent / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


_write_pages()
