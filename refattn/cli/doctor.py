"""The command line: refattn doctor, what is here and what is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import click
from rich.console import Console
from rich.table import Table

from ..check.report.machine import machine, versions
from ..errors import install

__all__ = ["doctor"]

EXTRAS = {
    "torch": ("torch",),
    "jax": ("jax",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "keras": ("keras",),
    "fast": ("numba",),
    "cuda12 or cuda13": ("cupy",),
    "he": ("tenseal", "starlette", "uvicorn", "httpx", "zstandard"),
    "report": ("matplotlib",),
    "distributed": ("joblib", "distributed"),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, and the extras that are missing with the command that adds them."""
    found = {**machine(), **versions(), "cores": str(os.cpu_count()), **gpus()}
    missing = {
        e: m for e, modules in EXTRAS.items() if (m := [x for x in modules if importlib.util.find_spec(x) is None])
    }
    clash = sorted(
        d.metadata["Name"] for d in metadata.distributions() if (d.metadata["Name"] or "").startswith("cupy-cuda")
    )
    if as_json:
        click.echo(json.dumps({"found": found, "missing": missing, "cupy": clash}, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    table = Table("what", "found")
    for name, text in found.items():
        table.add_row(name, text)
    console.print(table)
    for extra, modules in missing.items():
        console.print(
            f"missing {', '.join(modules)}; {install(extra.split()[0])}"
            + (" (or cuda13, for CUDA 13)" if "cuda" in extra else ""),
            markup=False,
            soft_wrap=True,
        )
    if not missing:
        console.print("every extra is here")
    if len(clash) > 1:
        console.print(
            f"two CuPy wheels clash: {', '.join(clash)}; uninstall all but the one for your CUDA", markup=False
        )


def gpus() -> dict[str, str]:
    """Return the GPUs with their drivers and compute capabilities, and the CUDA version that the driver supports."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {"GPU": "none (no nvidia-smi)"}
    query = [command, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    if not lines:
        return {"GPU": done.stderr.strip() or done.stdout.strip() or "none"}
    found = "\n".join(f"{name}, driver {driver}, compute capability {able}" for name, driver, able in lines)
    return {"GPU": found, "CUDA": _cuda()}


def _cuda() -> str:
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return "no libcuda.so.1: the driver is not installed"
    return f"{number.value // 1000}.{number.value % 1000 // 10} (the driver's)"
