"""What a report or a benchmark says of where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["machine", "versions"]


def machine() -> dict[str, str]:
    """Return what machine this is, its GPU, and the commit of the source tree where there is one."""
    gpu = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    commit = os.environ.get("REFATTN_COMMIT") or _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **({"gpu": gpu} if gpu else {}),
        **({"commit": commit} if commit else {}),
    }


def _said(*command: str) -> str:
    """Return what a command prints, "" where it is not here or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


PACKAGES = (
    "refattn", "numpy", "mpmath", "python-flint", "ml-dtypes", "torch", "fa3-fwd", "jax", "onnxruntime", "openvino",
    "keras", "triton", "cupy-cuda12x", "cupy-cuda13x", "tenseal", "zstandard",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, those installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
