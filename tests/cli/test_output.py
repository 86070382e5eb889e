"""What the command line prints with: colours, and help that names what there is."""

import io
import re

import pytest
from click.testing import CliRunner

from refattn.cli.output import console_of
from refattn.cli.theory import theory
from refattn.theory import CLAIMS


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("no_color", "colored"), [(None, True), ("1", False)])
def test_nothing_is_coloured_where_no_color_is_set(monkeypatch, no_color, colored):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if no_color is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    console_of(stream).print("[red]wrong[/]")
    assert ("\x1b[31m" in stream.getvalue()) == colored
    assert "wrong" in stream.getvalue()


def test_nothing_is_coloured_where_the_output_is_no_terminal(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.StringIO()
    console_of(stream).print("[red]wrong[/]")
    assert stream.getvalue() == "wrong\n"


def test_help_names_the_claims():
    found = CliRunner().invoke(theory, ["run", "--help"])
    assert found.exit_code == 0
    assert set(re.findall(r"[\w.-]+", found.output.split("Claims:")[1])) == set(CLAIMS)
