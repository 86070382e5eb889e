"""Mutation tests of refattn/theory: every edit of an operator or a claim must make a claim fail.

`python -m tests.theory.mutants` edits a sign, a factor, an exponent, an index, an axis or a constant, one at a
time, in any function that a check runs. Inputs (seeds, sizes, given numbers), words and plots are left alone. Each
edited module runs in a process of its own, with the claims of all modules that import it. An edit is found where one of
them raises, does not hold, has a control that holds, or takes too long. Those that are not found are listed with the
reasons in `survivors.toml`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import multiprocessing
import resource
import signal
import sys
import time
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import click

import refattn.theory

ROOM = Path(refattn.theory.__file__).parent
PACKAGE = "refattn.theory"
SECONDS, BYTES = 8, 6 << 30
SLOW = "takes too long"
INSTRUMENTS = ("fields", "counting", "tracing", "io_loops")
# functions that only make inputs, and calls whose arguments are seeds and sizes
INPUTS = frozenset(tomllib.loads(Path(__file__).with_name("survivors.toml").read_text())["inputs"])
DRAWN = frozenset(
    {
        "Q",
        "zeros",
        "rationals",
        "orthogonal",
        "default_rng",
        "standard_normal",
        "choice",
        "integers",
        "random",
        "uniform",
    }
)
SHOWN = frozenset({"detail", "curves", "curve", "constants", "ratios", "shares", "densities", "last", "at"})
SIZES = frozenset({"n", "d", "m", "rounds", "layers", "size", "seed"})
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
}


@dataclass(frozen=True)
class Edit:
    """One edit: of which module and function, what it was and became, and the node's number in the module's tree."""

    module: str
    function: str
    line: int
    was: str
    became: str
    node: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}: {self.was} -> {self.became}"

    def tree(self) -> ast.Module:
        made = source(self.module)
        _turn(list(ast.walk(made))[self.node])
        return made


def source(module: str) -> ast.Module:
    return ast.parse((ROOM / f"{module}.py").read_text())


def imports() -> dict[str, set[str]]:
    """Return which modules of the room each imports."""
    found = {}
    for path in ROOM.glob("*.py"):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1]
        found[path.stem] = {n.module for n in nodes if n.module}
    found.pop("__init__")
    return found


def dependents(module: str) -> list[str]:
    """Return the modules that an edited one changes, itself first, each after those that it imports."""
    of, order = imports(), [module]
    while more := sorted(m for m, used in of.items() if m not in order and used & set(order)):
        order.append(next(m for m in more if not (of[m] & (set(more) - {m}))))
    return order


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


def checked() -> dict[str, set[str]]:
    """Return for each module the functions and classes that some check runs, directly or not."""
    parts = {}
    for module in imports():
        for node in source(module).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                parts[module, node.name] = _names(node)
    by_name: dict[str, set[tuple[str, str]]] = {}
    for key in parts:
        by_name.setdefault(key[1], set()).add(key)
    of, seen, todo = imports(), set(), []
    for module in imports():
        for claim in getattr(importlib.import_module(f"{PACKAGE}.{module}"), "CLAIMS", []):
            todo.append((module, claim.check.__name__))
    while todo:
        key = todo.pop()
        if key in seen or key not in parts:
            continue
        seen.add(key)
        for name in parts[key]:
            todo += [k for k in by_name.get(name, ()) if k[0] == key[0] or k[0] in of[key[0]]]
    return {m: {name for of_module, name in seen if of_module == m} for m in of}


def judged_too(node: ast.Call) -> list[ast.keyword]:
    return [k for k in node.keywords if k.arg == "unequal"]


class Sites(ast.NodeVisitor):
    """Collects the places of a function that may be edited, as paths of fields from the module's tree."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str]] = []

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        owner = getattr(node.func, "value", None)
        if name in DRAWN or (isinstance(owner, ast.Name) and owner.id in SHOWN):
            return
        if name in ("Evidence", "judged"):  # that a bound given as a number is 0 or 1 is tested apart
            for argument in [*node.args[: 2 if name == "Evidence" else 1], *(k.value for k in judged_too(node))]:
                if not isinstance(argument, ast.Constant):
                    self.visit(argument)
        elif name != "needs":
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        if not isinstance(node.iter, ast.Tuple):  # sizes
            self.visit(node.iter)
        for part in node.body:
            self.visit(part)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for part in [*node.ifs, *([] if isinstance(node.iter, ast.Tuple) else [node.iter])]:
            self.visit(part)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in SIZES:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if not names & SHOWN:
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None and getattr(node.target, "id", "") not in SHOWN:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in node.body:
            if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)):
                self.visit(part)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_BinOp(self, node: ast.BinOp) -> None:
        nothing = isinstance(node.left, ast.Constant) and node.left.value == 0  # 0 * x, zeros of x's kind: as is 0 / x
        if type(node.op) in SWAPS and not nothing and not isinstance(node.left, (ast.JoinedStr, ast.List)):
            self.found.append((node, "operator"))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub):
            self.found.append((node, "sign"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) in (int, float):
            self.found.append((node, "constant"))


def _turn(node: ast.AST) -> None:
    """Edit a node in place."""
    if isinstance(node, ast.BinOp):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Constant):
        node.value = node.value + 1 if isinstance(node.value, int) else 2 * node.value + (node.value == 0)


def edits() -> list[Edit]:
    """Return all edits of functions that checks run."""
    found, run_by = [], checked()
    for module in sorted(imports()):
        tree = source(module)
        numbers = {id(node): i for i, node in enumerate(ast.walk(tree))}
        for part in tree.body:
            name = getattr(part, "name", "")
            if module in ("claim", "plots") or name not in run_by[module] or f"{module}.{name}" in INPUTS:
                continue
            sites = Sites()
            sites.visit(part)
            for node, _ in sites.found:
                after = copy.deepcopy(node)
                _turn(after)
                texts = ast.unparse(node), ast.unparse(after)
                found.append(Edit(module, name, node.lineno, *texts, numbers[id(node)]))
    return found


def _claims_of(edit: Edit) -> list[refattn.theory.Claim]:
    """Return the claims of the edited module and of those that import it, made anew."""
    claims = []
    for module in dependents(edit.module):
        name = f"{PACKAGE}.{module}"
        made = types.ModuleType(name)
        made.__file__, made.__package__ = str(ROOM / f"{module}.py"), PACKAGE
        sys.modules[name] = made
        tree = edit.tree() if module == edit.module else source(module)
        exec(compile(tree, made.__file__, "exec"), made.__dict__)
        claims += getattr(made, "CLAIMS", [])
    return claims


def found_by(edit: Edit) -> str:
    """Return which claim an edit makes fail and how, or "" where none does."""
    try:
        claims = _claims_of(edit)
    except Exception as e:
        return f"import: {type(e).__name__}"
    for claim in claims:
        try:
            result = refattn.theory.run(claim)
        except BaseException as e:
            return f"{claim.name}: {type(e).__name__}"
        if result.violated:
            return f"{claim.name}: says {result.violated}"
        if not result.holds:
            return f"{claim.name}: does not hold"
        if not result.control_failed:
            return f"{claim.name}: its control holds"
    return ""


def _work(edit: Edit, to: object) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    # of its own time, so that a busy machine finds no more than an idle one
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stderr(nowhere):
        to.send(found_by(edit))


def verdict(edit: Edit) -> str:
    """Return `found_by` from a process of its own, which may take some seconds and some memory."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(edit, there))
    worker.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        worker.join()
        return SLOW if worker.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) else "dies"
    finally:
        worker.kill()
        worker.join()


def reasons() -> dict[str, str]:
    """Return why edits that no claim finds are not found, by name: they are equivalent, or loosen a bound."""
    return tomllib.loads(Path(__file__).with_name("survivors.toml").read_text())["reasons"]


@click.command()
@click.option("--module", help="Only of one module.")
@click.option("--every", default=1, help="Only each so many-th edit.")
def main(module: str | None, every: int) -> None:
    """Print the edits that no claim finds, and the score."""
    chosen = [e for e in edits() if module in (None, e.module)][::every]
    start, known, missed, equivalent, slow = time.perf_counter(), reasons(), 0, 0, 0
    for edit in chosen:
        if by := verdict(edit):
            slow += by == SLOW
            continue
        reason = known.get(edit.name, "NOT FOUND")
        equivalent += reason.startswith("equivalent")
        missed += not reason.startswith("equivalent")
        print(f"{edit.module}.py:{edit.line} {edit.name}: {reason}", flush=True)
    counted = len(chosen) - equivalent
    print(
        f"{len(chosen)} edits, {equivalent} of them equivalent; of the other {counted} {counted - missed} make a claim"
        f" fail ({(counted - missed) / max(counted, 1):.1%}), {slow} of these by taking more than {SECONDS} s,"
        f" in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
