"""Golden files: whole calls with their exact answers and allowed errors, for kernel projects without Python."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..check.compare import compare
from ..check.inputs.families import cases
from ..check.report.report import Check
from ..check.runner import matches
from ..dtypes import FORMATS, no_format
from ..errors import InvalidInput, RefattnError, UnsupportedProblem
from ..files import sync, write_text
from ..problem import VARIANT
from ..variants import variant_of
from ..version import VERSION as INSTALLED
from .file import BITS, VERSION, answer_of, array_of, document_of, parse, problem_of, text_of

__all__ = ["check_results", "make", "verify"]

BAD = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RefattnError)
Step = Callable[[str], None]
Entry = dict[str, str]


def make(
    folder: str | Path,
    variant: str = VARIANT,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    only: str | None = None,
    text: bool = False,
    progress: Step | None = None,
    gradients: bool = False,
) -> list[str]:
    """Write a file for every input case of an operator, and manifest.json; the same arguments give the same bytes.

    Parameters
    ----------
    folder : path
        A new or empty folder.
    variant : str
        The operator.
    dtypes : sequence of str
        The formats.
    only : str
        Only the cases whose ``family/label[dtype]`` is this, or matches it as a shell pattern.
    text : bool
        Also write each file as flat text, one number a line.
    progress : callable
        Called with each case's name before its work.
    gradients : bool
        Also store a gradient arriving at out, and the exact gradients of the inputs, for the cases that have them.

    Returns
    -------
    list of str
        The names of the files, manifest.json last.

    Raises
    ------
    InvalidInput
        An unknown operator or format, a pattern that matches nothing, a folder that is not empty or cannot be made.
    """
    folder = Path(folder)
    variant_of(variant)
    unknown = [d for d in dtypes if d not in FORMATS]
    if unknown or not dtypes:
        raise no_format("dtypes", unknown[0] if unknown else "")
    chosen = [
        (c, d)
        for d in dict.fromkeys(dtypes)
        for c in cases(variant)
        if (not c.dtypes or d in c.dtypes) and matches(f"{c.name}[{d}]", only)
    ]
    if not chosen:
        raise InvalidInput(f"only: got {only!r}, expected a name such as 'gaussian/plain[{dtypes[0]}]' or a pattern")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        full = any(folder.iterdir())
    except OSError as e:
        raise InvalidInput(f"{folder}: got {e.strerror}, expected a folder that can be written") from e
    if full:
        raise InvalidInput(f"{folder}: got a folder with files in it, expected a new or empty one")
    files = []
    for case, dtype in chosen:
        if progress is not None:
            progress(f"{case.name}[{dtype}]")
        dout = case.arriving(dtype) if gradients and case.backward else None
        try:
            document = document_of(case.name, case.problem(dtype), dout)
        except UnsupportedProblem:  # this case has no gradient
            document = document_of(case.name, case.problem(dtype), None)
        contents = {"json": json.dumps(document, indent=0) + "\n"} | ({"txt": text_of(document)} if text else {})
        for ending, content in contents.items():
            name = f"{case.name.replace('/', '.')}.{dtype}.{ending}"
            write_text(folder / name, content)
            about = {"case": case.name, "dtype": dtype, "variant": variant}
            files.append({"name": name, "sha256": _digest(content.encode()), **about})
    arguments = {"variant": variant, "dtypes": list(dtypes), "only": only, "format": "text" if text else "json"}
    arguments |= {"gradients": "yes"} if gradients else {}
    manifest = {"golden": VERSION, "refattn": INSTALLED, "arguments": arguments, "files": files}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return [f["name"] for f in files] + ["manifest.json"]


def verify(folder: str | Path, progress: Step | None = None) -> list[Check]:
    """Recompute the answer of every golden file; a check a file, "passed" where it still holds.

    Raises
    ------
    InvalidInput
        The folder has no manifest.json of ours.
    """
    return _each(_manifest(folder), lambda entry: _holds(Path(folder), entry), progress)


def check_results(folder: str | Path, results: str | Path, progress: Step | None = None) -> list[Check]:
    """Judge a kernel's result files by the stored exact values and allowed errors; a check a case.

    Parameters
    ----------
    folder : path
        Golden files; each one's digest is checked before it judges.
    results : path
        A folder with files of the same names: ``{"out": [...], "lse": [...], "dq": [...]}``, hex or decimal numbers,
        flat or nested as the shape; all but out may be left out. Numbers are rounded to the format that the file names.
    progress : callable
        Called with each file's name before its work.

    Returns
    -------
    list of Check
        With the verdict "passed", "failed" or "not run" (no result file).

    Raises
    ------
    InvalidInput
        The folder has no manifest.json of ours, or there is no folder `results`.
    """
    entries = [e for e in _manifest(folder) if not e["name"].endswith(".txt")]
    if not Path(results).is_dir():
        raise InvalidInput(f"results: got {str(results)!r}, expected a folder with a file for each case")
    return _each(entries, lambda entry: _judged(Path(folder), entry, Path(results) / entry["name"]), progress)


def _each(entries: list[Entry], judge: Callable[[Entry], Check], progress: Step | None) -> list[Check]:
    done = []
    for entry in entries:
        if progress is not None:
            progress(entry["name"])
        try:
            done.append(judge(entry))
        except InvalidInput as e:
            done.append(Check(_name(entry), "failed", message=str(e)))
        except BAD as e:
            text = f"{entry['name']}: is not a golden file of refattn ({type(e).__name__}: {str(e)[:100]})"
            done.append(Check(_name(entry), "failed", message=text))
    return done


def _name(entry: Entry) -> str:
    return f"{entry['case']}[{entry['dtype']}]"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise InvalidInput(f"{path}: there is no such file") from e
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidInput(f"{path}: got a file that is not JSON, expected an object") from e


def _manifest(folder: str | Path) -> list[Entry]:
    path = Path(folder) / "manifest.json"
    manifest = _json(path)
    if not isinstance(manifest, dict) or manifest.get("golden") != VERSION:
        got = manifest.get("golden") if isinstance(manifest, dict) else type(manifest).__name__
        raise InvalidInput(f"{path}: got format {got!r}, expected {VERSION}; refattn golden make writes one")
    files, names = manifest.get("files"), ("name", "sha256", "case", "dtype", "variant")
    entries: list[Any] = files if isinstance(files, list) else [files]
    for entry in entries:
        good = isinstance(entry, dict) and all(isinstance(entry.get(n), str) for n in names)
        if not good or Path(entry["name"]).name != entry["name"]:
            raise InvalidInput(f"{path}: got the entry {str(entry)[:80]}, expected {', '.join(names)} of a file here")
    return entries


def _read(folder: Path, entry: Entry) -> Any:
    """Return what an entry's file holds, its digest checked."""
    path = folder / entry["name"]
    try:
        got = _digest(path.read_bytes())
    except OSError as e:
        raise InvalidInput(f"{path}: got {e.strerror}, expected a golden file") from e
    if got != entry["sha256"]:
        raise InvalidInput(f"{entry['name']}: got SHA-256 {got[:16]}..., expected {entry['sha256'][:16]}...")
    return _json(path) if path.suffix == ".json" else path.read_text()


def _holds(folder: Path, entry: Entry) -> Check:
    """Return the check of a file that still holds, or raise what does not."""
    stored, name = _read(folder, entry), entry["name"]
    passed = Check(_name(entry), "passed")
    if isinstance(stored, str):  # the text twin says what its JSON file says, which is checked by itself
        if stored != text_of(_json((folder / name).with_suffix(".json"))):
            raise InvalidInput(f"{name}: got another text, expected that of its JSON file")
        return passed
    about = {n: stored[n] for n in ("case", "dtype", "variant")}
    if about != {n: entry[n] for n in about}:
        raise InvalidInput(f"{name}: got {about}, expected what the manifest says")
    dout = array_of(stored["inputs"]["dout"]) if "dout" in stored["inputs"] else None
    fresh = document_of(stored["case"], problem_of(stored), dout)
    for part, new in fresh["exact"].items():
        old = stored["exact"][part]
        a, b = (array_of(x, "allowed") for x in (old, new))
        with np.errstate(invalid="ignore"):  # a step of the last bit, as exp may differ between machines
            near = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= b * 2.0 ** (1 - BITS))
        if near.all():
            new["allowed"] = old["allowed"]
    wrong = _difference(name, stored, fresh)
    if wrong:
        raise InvalidInput(wrong)
    return passed


def _difference(where: str, old: Any, new: Any) -> str:
    """Return the first place where two documents differ."""
    if type(old) is type(new) and isinstance(old, dict | list) and len(old) == len(new):
        keys = new if isinstance(new, dict) else range(len(new))
        if not isinstance(old, dict) or set(old) == set(new):
            return next((text for k in keys if (text := _difference(f"{where}: {k}", old[k], new[k]))), "")
    return "" if old == new else f"{where}: got {str(old)[:60]}, expected {str(new)[:60]}"


def _judged(folder: Path, entry: Entry, given: Path) -> Check:
    name = _name(entry)
    if not given.exists():
        return Check(name, "not run", message=f"{given}: there is no such file")
    document, result = _read(folder, entry), _json(given)
    exact = document["exact"]
    if not isinstance(result, dict) or "out" not in result or not set(result) <= set(exact):
        got = ", ".join(map(str, result)) if isinstance(result, dict) else type(result).__name__
        others = ", ".join(n for n in exact if n != "out")
        raise InvalidInput(
            f"{given.name}: got {got[:60] or 'nothing'}, expected an object with out and perhaps {others}"
        )
    answer = answer_of(problem_of(document), {n: array_of(x, "float64") for n, x in exact.items()})
    found = []
    for part in (n for n in exact if n in result):
        form, shape = FORMATS[exact[part]["type"]], tuple(exact[part]["shape"])
        x = _numbers(f"{given.name}: {part}", result[part], shape)
        found.append(compare(part, form.round_array(x), answer, array_of(exact[part], "allowed"), form.name))
    failed = [w for w in found if not w.passed]
    top = max(found, key=lambda w: (not w.passed, w.ratio))
    message = "; ".join(text for w in failed for text in w.symptoms)
    return Check(name, "failed" if failed else "passed", top, message)


def _numbers(name: str, x: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    given = np.array(x if isinstance(x, list) else None, dtype=object)
    size = math.prod(shape)
    if given.shape not in (shape, (size,)):
        raise InvalidInput(f"{name}: got shape {given.shape}, expected {shape} or {size} numbers")
    return np.array([parse(v, name) for v in given.ravel()], np.float64).reshape(shape)
