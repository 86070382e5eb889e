"""The pages that are written from tables: operators, their gallery, claims, papers, the reference of functions."""

import pkgutil
import shutil
from pathlib import Path

import _pictures

import refattn
import refattn.functions
from refattn.check import FAMILIES, LAWS
from refattn.check.inputs.families import cases
from refattn.check.kernels import EXAMPLE, KERNELS
from refattn.papers import PAPERS
from refattn.theory import CLAIMS, run
from refattn.theory.plots import figure

HERE = Path(__file__).parent


def _variant(v: refattn.Variant) -> str:
    scale = "1/sqrt(d_k)" if v.default_scale == "rsqrt" else "1"
    own = [f"- `{n}` (default `{o.default!r}`): {o.meaning}" for n, o in v.options.items()] or ["- none"]
    parts = [
        f"# {v.name.capitalize()} attention",
        f"```text\n{v.formula}\n```",
        *_seen(v),
        f"Error unit: `{v.unit}`. `scale=None` is {scale}.",
        f"Options of `Problem` that it has: {', '.join(f'`{u}`' for u in sorted(v.uses)) or 'none'}.",
        "## Its own options",
        "\n".join(own),
        *_released(v),
        "## Contract",
        "\n".join(f"- {c}" for c in v.contract),
        "## Laws",
        "\n".join(f"- `{n}`: {LAWS[n].statement}" for n in v.laws),
        "## Input families",
        families(v),
        "## Planted bugs that its checks catch",
        ", ".join(f"`{b}`" for b in v.bugs) + ".",
        *_mistakes(v),
        "## Kernels judged for it",
        _kernels(v),
        "## Source",
        v.source,
        f"Compared with: {v.compared}.",
    ]
    return "\n\n".join(parts) + "\n"


def families(v: refattn.Variant) -> str:
    """Return the input families of which an operator has cases: of those that it names it may take none."""
    have = {c.family for c in cases(v.name)}
    return "\n".join(f"- `{n}`: {text}" for n, text in FAMILIES.items() if n in have)


def _mistakes(v: refattn.Variant) -> list[str]:
    if not v.wrong:
        return []
    lines = [f"- `{n}`: {text}" for n, (text, _) in v.wrong.items()]
    return ["## What implementers get wrong, each caught by its own cases", "\n".join(lines)]


def _released(v: refattn.Variant) -> list[str]:
    if "mode" not in v.options:
        return []
    mode = v.options["mode"]
    return ["## Paper and release", f"They differ. `mode` is {mode.meaning}. The default is `{mode.default!r}`."]


def _kernels(v: refattn.Variant) -> str:
    """Return the kernels that refattn knows by name for an operator, without the one that is wrong on purpose."""
    entries = [e for e in KERNELS.values() if v.name in e.variants and e.name != EXAMPLE]
    lines = []
    for where, gpu in (("without a GPU", False), ("on an NVIDIA GPU", True)):
        if names := [f"`{e.name}`" for e in entries if e.gpu == gpu]:
            lines.append(f"- {where}: {', '.join(names)}")
    yours = f"`refattn check FILE.py:NAME --variant {v.name}` judges yours."
    if not lines:
        return f"refattn knows none by name. {yours}"
    return "\n".join(lines) + f"\n\n`refattn check NAME --variant {v.name}` judges one, {yours}"


def _seen(v: refattn.Variant) -> list[str]:
    shown = _pictures.of_variant(v)
    if not shown:
        return []
    lines = [f"- {n}: `{', '.join(f'{o}={str(x)[:60]}' for o, x in p.options.items())}`" for n, p in shown.items()]
    picture = f"![Which keys the rows of {v.name} attention see]({v.name}.svg)"
    return [picture, "Which keys a query sees under these options:", "\n".join(lines)]


GALLERY = """\
# Gallery

Rows are queries, columns are keys. All pictures are drawn from the definitions, on random data.

## Operators

What each key's value counts for, over the largest in its row: blue counts, red counts against. Each picture is of a
small case of the operator's own.

{operators}

## Masks of softmax attention

Which keys a query sees ({{class}}`refattn.Problem`, {{doc}}`../contract`).

{masks}

## Operators over some of the keys

Which keys a query sees, under options of the operator's own.

{seen}
"""


def _pictured(pictures: dict[str, str]) -> str:
    """Return pictures side by side, by their captions."""
    parts = (
        f":::{{figure}} {file}\n:alt: {text.split('](')[0].strip('[')}\n\n{text}\n:::"
        for text, file in pictures.items()
    )
    return "::::{container} pictures\n" + "\n".join(parts) + "\n::::"


def _gallery() -> str:
    for v in refattn.VARIANTS.values():
        _pictures.of_weights(v)
    drawn = [v for v in refattn.VARIANTS.values() if (HERE / "variants" / f"{v.name}.svg").exists()]
    return GALLERY.format(
        operators=_pictured({f"[{n}]({n}.md)": f"weights-{n}.svg" for n in refattn.VARIANTS}),
        masks=_pictured(_pictures.of_masks()),
        seen="\n\n".join(f"### [{v.name}]({v.name}.md)\n\n![{v.name}]({v.name}.svg)" for v in drawn),
    )


def _variants(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for v in refattn.VARIANTS.values():
        (folder / f"{v.name}.md").write_text(_variant(v))
    (folder / "gallery.md").write_text(_gallery())
    names = "\n".join(refattn.VARIANTS)
    rows = "".join(f"| {{doc}}`{v.name}` | {v.source} | {v.compared} |\n" for v in refattn.VARIANTS.values())
    table = f"| operator | source | compared with |\n|---|---|---|\n{rows}"
    (folder / "index.md").write_text(f"# Operators\n\n{table}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def _functions(folder: Path) -> None:
    """Write the reference of refattn.functions, a page a module."""
    found = pkgutil.walk_packages(refattn.functions.__path__, "refattn.functions.")
    names = sorted(m.name for m in found if not m.ispkg and m.name != "refattn.functions.arguments")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for n in names:
        page = f"# {n[18:]}\n\n```{{eval-rst}}\n.. automodule:: {n}\n   :members:\n```\n"
        (folder / f"{n[18:]}.md").write_text(page)
    listed = "\n".join(f"reference/{n[18:]}" for n in names)
    text = f"# Reference\n\nThe modules of `refattn.functions`.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    folder.with_suffix(".md").write_text(text)


def _papers() -> str:
    """Return the table of the papers that the package builds on."""
    rows = [
        f"| {p.title} | {p.source} | {', '.join(f'`{x}`' for x in p.here)} | {', '.join(f'`{x}`' for x in p.checks)} "
        f"| {p.peer or 'none'} | {p.not_here} |"
        for p in PAPERS
    ]
    head = "| paper | source | here | tests | compared with | not here |\n|---|---|---|---|---|---|\n"
    return f"# Papers\n\nThe papers that refattn builds on (`refattn.papers`).\n\n{head}" + "\n".join(rows) + "\n"


CLAIMS_INTRO = """\
Claims of the papers on attention that this package builds on, as code: `refattn theory list`, `refattn theory run NAME`
or `--all`, with `--json FILE` and `--plots FOLDER`. A claim holds where what is measured is at most its bound; its
control is something near it that is false, and must be found so. What a claim does not speak of it refuses by naming
the hypothesis. Nothing here is a proof: a check can only fail to find a counterexample.
"""


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


def write() -> None:
    """Write them all, and copy the notebooks beside them."""
    _pictures.landing()
    _variants(HERE / "variants")
    _pictures.of_fields()
    _pictures.of_terms()
    _pictures.of_training()
    _functions(HERE / "functions" / "reference")
    (HERE / "functions" / "papers.md").write_text(_papers())
    (HERE / "theory").mkdir(exist_ok=True)
    (HERE / "theory" / "index.md").write_text(_claims())
    notebooks = HERE / "notebooks"
    shutil.rmtree(notebooks, ignore_errors=True)
    shutil.copytree(HERE.parent / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
