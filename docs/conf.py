"""Sphinx configuration; the pages of the operators are written from the table."""

import shutil
from pathlib import Path

import refattn
from refattn.check import FAMILIES, LAWS

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
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
intersphinx_mapping = {}
suppress_warnings = ["mystnb.unknown_mime_type"]

HERE = Path(__file__).parent


def _page(v: refattn.Variant) -> str:
    scale = "1/sqrt(d_k)" if v.default_scale == "rsqrt" else "1"
    own = [f"- `{n}` (default `{o.default!r}`): {o.meaning}" for n, o in v.options.items()] or ["- none"]
    parts = [
        f"# {v.name.capitalize()} attention",
        f"```text\n{v.formula}\n```",
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
        "## Source",
        v.source,
    ]
    return "\n\n".join(parts) + "\n"


def _write_pages() -> None:
    pages = HERE / "variants"
    pages.mkdir(exist_ok=True)
    for v in refattn.VARIANTS.values():
        (pages / f"{v.name}.md").write_text(_page(v))
    names = "\n".join(refattn.VARIANTS)
    (pages / "index.md").write_text(f"# Operators\n\n```{{toctree}}\n{names}\n```\n")
    notebooks = HERE / "notebooks"
    shutil.rmtree(notebooks, ignore_errors=True)
    shutil.copytree(HERE.parent / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


_write_pages()
