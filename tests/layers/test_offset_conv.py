"""OffsetConv2d: what it predicts and how it starts."""

import pytest
import torch

from d2_deform.layers import OffsetConv2d


@pytest.mark.parametrize("modulated, channels", [(False, 2 * 4 * 6), (True, 3 * 4 * 6)])
def test_channels_and_zero_start(modulated, channels):
    conv = OffsetConv2d(8, (3, 2), stride=(2, 1), padding=1, deform_groups=4, modulated=modulated)
    assert conv.out_channels == channels
    raw = conv(torch.rand(2, 8, 7, 6))
    assert raw.shape == (2, channels, 4, 7)
    assert not raw.any()


def test_split_of_plain_offsets():
    raw = torch.rand(2, 18, 5, 5)
    offset, mask = OffsetConv2d(8, 3).split(raw)
    assert torch.equal(offset, raw)
    assert mask is None


def test_split_of_modulated_offsets():
    raw = torch.rand(2, 54, 5, 5)
    offset, mask = OffsetConv2d(8, 3, deform_groups=2, modulated=True).split(raw)
    assert torch.equal(offset, raw[:, :36])
    assert torch.equal(mask, raw[:, 36:].sigmoid())


def test_draws_no_random_number():
    state = torch.get_rng_state()
    OffsetConv2d(8, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_repr():
    text = repr(OffsetConv2d(8, 3, modulated=True))
    assert text == (
        "OffsetConv2d(8, 27, kernel_size=(3, 3), stride=(1, 1), deform_groups=1, modulated=True)"
    )


def test_wrong_groups():
    with pytest.raises(ValueError, match="deform_groups: 0 given"):
        OffsetConv2d(8, 3, deform_groups=0)
