"""Sphinx configuration. With REFATTN_DOCS_NOTEBOOKS=0 notebooks are shown as they are kept, and not executed."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _pages

import refattn

project = "refattn"
copyright = "2026, the refattn authors"
version = release = refattn.__version__
extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
]
html_theme = "furo"
html_title = "refattn"
html_static_path = ["_static"]
html_css_files = ["refattn.css"]
exclude_patterns = ["_build"]
autodoc_typehints = "none"  # docstrings say shapes, where annotations can only say Any
toc_object_entries = False  # every page would carry every name: a fifth of the build
nb_execution_mode = "off" if os.environ.get("REFATTN_DOCS_NOTEBOOKS") == "0" else "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
suppress_warnings = ["mystnb.unknown_mime_type"]

_pages.write()
