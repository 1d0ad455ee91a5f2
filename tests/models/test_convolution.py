"""The short convolution: shifts against gathered neighbours, and no tap reads a position that attention does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlm.models.config import TransformerConfig
from dlm.models.convolution import ShortConvolution, neighbours, offsets
from dlm.models.pattern import reading
from dlm.models.transformer import Transformer


def network(attention: str = "full", block_length: int = 0, taps: int = 5) -> Transformer:
    torch.manual_seed(0)
    c = TransformerConfig(vocab_size=11, window=16, layers=2, heads=2, width=16, attention=attention, block_length=block_length, conv=taps)
    made = Transformer(c)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.eval()


def text(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(1))


PATTERNS = [("full", 0), ("causal", 0), ("block_causal", 4)]


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_it_is_the_convolution_of_torch(attention: str, taps: int) -> None:
    c = TransformerConfig(vocab_size=3, heads=1, width=4, attention=attention, conv=taps)
    conv, x_BTD = ShortConvolution(c), torch.randn(2, 9, 4)
    torch.nn.init.normal_(conv.weight)
    left = -offsets(attention, taps)[0]
    padded = torch.nn.functional.pad(x_BTD.mT, (left, taps - 1 - left))
    expected = x_BTD + torch.nn.functional.conv1d(padded, conv.weight.T[:, None], groups=4).mT
    torch.testing.assert_close(conv(x_BTD, None, x_BTD), expected)
    pos_BT = torch.arange(9)[None].expand(2, -1)
    torch.testing.assert_close(conv(x_BTD, neighbours(offsets(attention, taps), pos_BT, pos_BT, None), x_BTD), expected)


def test_a_fresh_network_is_one_without() -> None:
    torch.manual_seed(0)
    plain = Transformer(TransformerConfig(vocab_size=11, window=16, layers=2, heads=2, width=16))
    torch.manual_seed(0)
    convolved = Transformer(TransformerConfig(vocab_size=11, window=16, layers=2, heads=2, width=16, conv=5))
    assert torch.equal(plain(text()), convolved(text()))


@pytest.mark.parametrize(("attention", "block_length"), PATTERNS)
@pytest.mark.parametrize("left", [0, 3])
def test_padding_changes_nothing(attention: str, block_length: int, left: int) -> None:
    model, x_BT = network(attention, block_length), text()
    valid_BT = torch.zeros(2, 21, dtype=torch.bool)
    valid_BT[:, left : left + 16] = True
    padded_BT = torch.zeros(2, 21, dtype=torch.long)
    padded_BT[:, left : left + 16] = x_BT
    torch.testing.assert_close(model(padded_BT, valid_BT=valid_BT)[:, left : left + 16], model(x_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("attention", "block_length", "seen"), [("causal", 0, 9), ("block_causal", 4, 8)])
def test_no_tap_reads_the_future(attention: str, block_length: int, seen: int) -> None:
    model, x_BT = network(attention, block_length), text()
    other_BT = x_BT.clone()
    other_BT[:, seen:] = (x_BT[:, seen:] + 1) % 10
    assert torch.equal(model(other_BT)[:, :seen], model(x_BT)[:, :seen])
    assert not torch.equal(model(other_BT), model(x_BT))


def test_a_full_network_read_causally_reads_no_future() -> None:
    model, x_BT = reading(network(), "causal"), text()
    other_BT = x_BT.clone()
    other_BT[:, 9:] = (x_BT[:, 9:] + 1) % 10
    torch.testing.assert_close(model(other_BT)[:, :9], model(x_BT)[:, :9])


def test_noisy_blocks_read_the_clean_blocks_before_them() -> None:
    model, clean_BT, noisy_BT = network("block_causal", 4), text(), text().flip(1)
    beside = model(torch.cat([noisy_BT, clean_BT], 1), pattern="clean")
    for first in range(0, 16, 4):
        alone = model(torch.cat([clean_BT[:, :first], noisy_BT[:, first : first + 4]], 1))[:, first:]
        torch.testing.assert_close(beside[:, first : first + 4], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_reads_the_same_neighbours() -> None:
    model, x_BT = network("block_causal", 4).requires_grad_(False), text()
    expected = model(x_BT)
    model.config = model.config.with_(backend="flex")
    torch.testing.assert_close(model(x_BT), expected, atol=1e-4, rtol=1e-4)


def test_an_even_centre_is_refused() -> None:
    with pytest.raises(ValueError, match="odd number of taps"):
        TransformerConfig(vocab_size=3, conv=4)
    assert TransformerConfig(vocab_size=3, conv=4, attention="causal").conv == 4
