"""Crash every writer at each of its calls: python -m tests.crash [NAME ...]."""

import sys

from .crash import crash
from .shim import MODES
from .writers import ALL

if __name__ == "__main__":
    count, bad = 0, []
    for name in sys.argv[1:] or ALL:
        for mode in MODES:
            calls, found = crash(name, mode)
            count, bad = count + calls, bad + found
    print("\n".join([*bad[:20], f"{count} crashes of {len(sys.argv[1:] or ALL)} writers: {len(bad)} wrong"]))
    sys.exit(bool(bad))
