"""Known failures in a file: they do not count, new ones do, and those that pass must go."""

import tomllib

import pytest
from click.testing import CliRunner

from refattn.check.report.report import Check, Report
from refattn.cli.baseline import Baseline
from refattn.cli.main import main

KERNEL = """
from refattn import Capabilities
from refattn.check.kernels.tiled import tiled

def attention(p):
    out, lse = tiled(p)
    return (out * 1.01 if p.causal else out), lse

attention.capabilities = Capabilities(lse=True)

def right(p):
    return tiled(p)

right.capabilities = attention.capabilities
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(KERNEL)

    def run(*more, name="mine.py:attention"):
        result = CliRunner().invoke(main, ["check", name, "--no-explain", "--only", "gaussian/*", *more])
        return result.exit_code, result.output

    return run


def test_known_failures_do_not_count(check, tmp_path):
    assert check()[0] == 1
    code, _ = check("--baseline", "known.toml", "--update-baseline")
    assert code == 0
    text = (tmp_path / "known.toml").read_text()
    assert '"gaussian/causal-square[float32]" = "wrong"' in text
    assert text.splitlines()[1].startswith("seed = ")
    code, output = check("--baseline", "known.toml")
    assert code == 0
    assert "failures of known.toml not counted" in output
    lines = [x for x in text.splitlines() if "causal-square" not in x]
    (tmp_path / "known.toml").write_text("\n".join(lines))
    code, output = check("--baseline", "known.toml")
    assert code == 1
    assert "gaussian/causal-square[float32]" in output
    assert "gaussian/causal-top-left[float32]" not in output


def test_what_was_known_at_an_edge_does_not_hide_what_is_wrong(tmp_path):
    path = tmp_path / "known.toml"
    edge = Check("empty/rows-allowed[float32]", "edge", "lse", edges=("empty-lse",))
    Baseline(str(path), new=True).write([Report("k", "softmax", (edge,))])
    file = Baseline(str(path), new=False)
    assert file.without_known(Report("k", "softmax", (edge,)))[0].checks[0].verdict == "known"
    for verdict, edges in (("failed", ()), ("edge", ("empty-row",))):
        other = Check(edge.name, verdict, "another", edges=edges)
        assert file.without_known(Report("k", "softmax", (other,)))[0].checks[0].verdict == verdict


def test_what_passes_must_leave_the_file(check, tmp_path):
    (tmp_path / "known.toml").write_text('seed = 1\n["mine.py:right"]\n"gaussian/plain[float32]" = "wrong"\n')
    code, output = check("--baseline", "known.toml", name="mine.py:right")
    assert code == 1
    assert "error: gaussian/plain[float32] is in the baseline and passes; --update-baseline takes it out" in output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read known.toml (No such file or directory); --update-baseline writes it"),
        ("seed = ", "is no TOML file"),
        ("[a]\n", "needs a seed, an integer of at least 0, and a table for each kernel"),
        ("seed = true\n", "needs a seed, an integer of at least 0"),
        ("seed = -1\n", "needs a seed, an integer of at least 0"),
        ("seed = 1\na = 2\n", "needs a seed, an integer of at least 0, and a table for each kernel"),
    ],
)
def test_bad_files_are_named(check, tmp_path, text, says):
    if text is not None:
        (tmp_path / "known.toml").write_text(text)
    code, output = check("--baseline", "known.toml")
    assert code == 2
    assert says in output


def test_update_needs_a_file(check):
    code, output = check("--update-baseline")
    assert code == 2
    assert "name the file with --baseline" in output


def test_what_did_not_run_stays_in_the_baseline(tmp_path):
    path = tmp_path / "known.toml"
    path.write_text(
        'seed = 1\n["k"]\n"a[float32]" = "wrong"\n"b[float32]" = "wrong"\n"calls/1[float32]" = "wrong"\n'
        '["other"]\n"a[float32]" = "overflow"\n'
    )
    checks = (Check("a[float32]", "passed"), Check("c[float32]", "failed"))
    Baseline(str(path), new=True).write([Report("k", "softmax", checks, seed=1)])
    found = tomllib.loads(path.read_text())
    assert found["k"] == {"b[float32]": "wrong", "calls/1[float32]": "wrong", "c[float32]": "wrong"}
    assert found["other"] == {"a[float32]": "overflow"}
    Baseline(str(path), new=True).write([])  # interrupted before the first kernel was done
    assert tomllib.loads(path.read_text()) == found
    twice = [Report("k", "softmax", checks, seed=2)] * 2  # another seed draws other calls
    Baseline(str(path), new=True).write(twice)
    assert tomllib.loads(path.read_text())["k"] == {"b[float32]": "wrong", "c[float32]": "wrong"}
