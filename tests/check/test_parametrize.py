"""parametrize_with_checks, as another project's pytest would run it."""

import pytest

from refattn import InvalidInput, parametrize_with_checks
from refattn.check.kernels.tiled import tiled

HEAD = """
import numpy as np
from refattn import Capabilities, parametrize_with_checks
from refattn.check.kernels.tiled import tiled

def leaky(problem):
    out, lse = tiled(problem)
    with np.errstate(invalid="ignore"):
        return out + 0 * problem.value.sum(2, keepdims=True)
"""


def outcome(pytester, body):
    pytester.makepyfile(HEAD + body)
    return pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")


def test_one_item_for_each_check(pytester):
    result = outcome(
        pytester,
        "@parametrize_with_checks(tiled, only='gaussian/*', capabilities=Capabilities(lse=True))\n"
        "def test_kernel(check):\n    check()\n",
    )
    result.assert_outcomes(passed=27, skipped=8)  # it does not say that it knows weights, offsets and the like


def test_failures_say_everything_and_unsupported_is_skipped(pytester):
    able = "strict=True, capabilities=Capabilities(features={'allowed', 'lengths_differ'})"
    body = f"@parametrize_with_checks(leaky, only='poison/*', {able})\ndef test_kernel(check):\n    check()\n"
    result = outcome(pytester, body)
    # it is wrong outside its capabilities, and does not say so
    result.stdout.fnmatch_lines(
        [
            "*MismatchError: leaky fails poison/value-behind-mask*",
            "*out at batch 0, head 0, row 0, column 5: got nan*",
            "*repeat it: REFATTN_SEED=* pytest 'test_failures_say_everything*::test_kernel*",
            "*not in its capabilities: causal_bottom_right; it must raise there, and gave a wrong answer: *",
        ]
    )


def test_expected_failures_are_strict(pytester):
    leaks = ("value-behind-mask", "inf-behind-mask", "behind-lengths", "value-seen-by-some")
    names = "{" + "".join(f"'poison/{x}[float32]': '#12', " for x in leaks) + "%s}"
    body = (
        "@parametrize_with_checks(leaky, only='poison/*', expected_failures=%s)\ndef test_kernel(check):\n    check()\n"
    )
    outcome(pytester, body % (names % "")).assert_outcomes(xfailed=4, passed=9)
    result = outcome(pytester, body % (names % "'poison/key-behind-mask[float32]': 'thought so'"))
    result.assert_outcomes(xfailed=4, failed=1, passed=8)
    result.stdout.fnmatch_lines(["*XPASS(strict)*thought so*"])


def test_expected_failures_must_be_checks_with_a_reason():
    with pytest.raises(InvalidInput, match=r"expected_failures: 'gaussian/plane\[float32\]' is no check"):
        parametrize_with_checks(tiled, expected_failures={"gaussian/plane[float32]": "#1"})
    with pytest.raises(InvalidInput, match="needs a reason"):
        parametrize_with_checks(tiled, expected_failures={"gaussian/plain[float32]": " "})


def test_a_run_that_does_not_ask_for_refattn_does_not_load_it(pytester):
    pytester.makepyfile(
        "import sys\ndef test_light():\n    assert not any(m.split('.')[0] == 'refattn' for m in sys.modules)\n"
    )
    pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider").assert_outcomes(passed=1)
