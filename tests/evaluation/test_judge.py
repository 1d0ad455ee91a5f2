"""Judges that read text, of any length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation import judge


@pytest.mark.parametrize("window", [2, 3, 8, 40])
@pytest.mark.parametrize("length", [2, 8, 9, 37])
def test_windows_add_up_to_the_whole_text(window: int, length: int) -> None:
    """Of a chain in which a token depends on the one before, any context is enough."""
    torch.manual_seed(0)
    first_V, cost_VV = torch.rand(10, dtype=torch.float64), torch.rand(10, 10, dtype=torch.float64)

    def nats(x_1T: Tensor) -> Tensor:
        assert x_1T.shape[1] <= window
        return first_V[x_1T[:, 0]] + cost_VV[x_1T[:, :-1], x_1T[:, 1:]].sum(1)

    text = "".join(str(int(x)) for x in torch.randint(10, (length,)))
    x_T = torch.tensor([int(c) for c in text])
    whole = float(first_V[x_T[0]] + cost_VV[x_T[:-1], x_T[1:]].sum()) / math.log(2)
    bits = judge.of_ids(nats, lambda text: [int(c) for c in text], "chain", window)
    assert float(bits([text])[0]) == pytest.approx(whole, abs=1e-9)


def test_a_text_of_one_token_is_refused() -> None:
    bits = judge.of_ids(lambda x_1T: x_1T.sum(1), lambda text: [int(c) for c in text], "chain", 8)
    with pytest.raises(InputError, match="the judge chain reads texts of two tokens or more"):
        bits(["1"])
