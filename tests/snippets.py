"""The Python of a page of the documentation, run as it stands there."""

import re


def run(page):
    """Run a page's blocks, from its first to its last."""
    space = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, page.name, "exec"), space)
