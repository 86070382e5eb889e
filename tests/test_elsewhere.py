"""Another library's name of an option is answered with the name that Problem has for it."""

from dataclasses import fields

import numpy as np
import pytest

from refattn import Problem, softmax_attention
from refattn.elsewhere import ELSEWHERE

X = np.zeros((1, 1, 2, 2), np.float32)
OURS = {f.name for f in fields(Problem)}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_name(name):
    assert name not in OURS
    word = ELSEWHERE[name].split()[0].split("=")[0].rstrip(";:")
    assert word in OURS | {"nothing"}
    with pytest.raises(TypeError, match=f"^{name}: Problem takes {word}"):
        Problem(X, X, X, **{name: None})


def test_an_unknown_name_is_pythons_to_refuse():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nobody'"):
        Problem(X, X, X, nobody=1)


def test_functions_answer_so_too():
    with pytest.raises(TypeError, match=r"^is_causal: softmax_attention takes causal="):
        softmax_attention(X, X, X, is_causal=True)
    assert softmax_attention(X, X, X, causal="bottom_right").shape == X.shape
