"""DeformRoIPool and DeformPSRoIPool as modules; the arithmetic is tested in tests/ops."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from d2_deform.layers import DeformPSRoIPool, DeformRoIPool
from d2_deform.ops import reference

ROIS = torch.tensor([[0, 8.0, 16, 80, 100], [1, 30, 10, 90, 40], [0, 0, 0, 127, 127]])
SCALE = 1 / 8
SIZE = 16


def roi_layer(**kwargs):
    return DeformRoIPool(output_size=(3, 2), spatial_scale=SCALE, sampling_ratio=2, **kwargs)


def ps_layer(**kwargs):
    return DeformPSRoIPool(
        output_size=3, group_size=3, spatial_scale=SCALE, sampling_ratio=2, **kwargs
    )


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_pool_starts_rigid(aligned):
    x = torch.rand(2, 4, SIZE, SIZE)
    rigid, deformable = roi_layer(aligned=aligned), roi_layer(aligned=aligned, in_channels=4)
    assert not list(rigid.parameters())
    assert rigid(x, ROIS).shape == (3, 4, 3, 2)
    assert torch.equal(deformable(x, ROIS), rigid(x, ROIS))


def test_roi_pool_offsets_are_x_then_y():
    """A bias on the first P x P outputs of the branch moves every bin along x."""
    layer = roi_layer(in_channels=1, gamma=0.5)
    nn.init.constant_(layer.offset_fc.bias[:6].data, 0.2)
    columns = torch.arange(float(SIZE)).expand(1, 1, SIZE, SIZE)
    rois = torch.tensor([[0, 24.0, 24, 64, 64]])
    shift = 0.5 * 0.2 * 5  # gamma * offset * RoI width in cells
    expected = roi_layer()(columns, rois) + shift
    torch.testing.assert_close(layer(columns, rois), expected)
    rows = columns.mT
    torch.testing.assert_close(layer(rows, rois), roi_layer()(rows, rois))


def test_roi_pool_equals_reference():
    layer = roi_layer(in_channels=4)
    nn.init.normal_(layer.offset_fc.weight, std=0.3)
    x = torch.rand(2, 4, SIZE, SIZE)
    pooled = reference.deform_roi_pool(x, ROIS, None, (3, 2), SCALE, 2)
    offset = layer.offset_fc(pooled.flatten(1)).reshape(3, 2, 3, 2)
    expected = reference.deform_roi_pool(x, ROIS, offset, (3, 2), SCALE, 2)
    torch.testing.assert_close(layer(x, ROIS), expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_ps_roi_pool_starts_rigid(aligned):
    scores, feature = torch.rand(2, 4 * 9, SIZE, SIZE), torch.rand(2, 5, SIZE, SIZE)
    rigid = ps_layer(aligned=aligned)
    deformable = ps_layer(aligned=aligned, in_channels=5, offset_groups=4)
    assert not list(rigid.parameters())
    assert rigid(scores, ROIS).shape == (3, 4, 3, 3)
    assert torch.equal(deformable(scores, ROIS, feature), rigid(scores, ROIS, feature))


def test_ps_roi_pool_equals_reference():
    layer = ps_layer(in_channels=5, offset_groups=2)
    nn.init.normal_(layer.offset_conv.weight, std=0.3)
    scores, feature = torch.rand(2, 4 * 9, SIZE, SIZE), torch.rand(2, 5, SIZE, SIZE)
    fields = conv2d(feature, layer.offset_conv.weight, layer.offset_conv.bias)
    assert fields.shape == (2, 2 * 2 * 9, SIZE, SIZE)
    offset = reference.deform_ps_roi_pool(fields, ROIS, None, 3, 3, SCALE, 2)
    assert offset.shape == (3, 4, 3, 3)
    torch.testing.assert_close(layer.predict_offset(feature, ROIS), offset)
    expected = reference.deform_ps_roi_pool(scores, ROIS, offset, 3, 3, SCALE, 2)
    torch.testing.assert_close(layer(scores, ROIS, feature), expected)


def test_every_parameter_learns():
    x, scores = torch.rand(2, 5, SIZE, SIZE), torch.rand(2, 4 * 9, SIZE, SIZE)
    for layer, inputs in (
        (roi_layer(in_channels=5), (x, ROIS)),
        (ps_layer(in_channels=5, offset_groups=4), (scores, ROIS, x)),
    ):
        layer(*inputs).square().sum().backward()
        assert all(parameter.grad.any() for parameter in layer.parameters())


def test_zero_rois():
    x, scores = torch.rand(2, 5, SIZE, SIZE), torch.rand(2, 4 * 9, SIZE, SIZE)
    rois = torch.zeros(0, 5)
    pooled = roi_layer(in_channels=5)(x, rois)
    assert pooled.shape == (0, 5, 3, 2)
    voted = ps_layer(in_channels=5, offset_groups=4)(scores, rois, x)
    assert voted.shape == (0, 4, 3, 3)
    (pooled.sum() + voted.sum()).backward()


def test_branches_draw_no_random_number():
    state = torch.get_rng_state()
    roi_layer(in_channels=5)
    ps_layer(in_channels=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_names_of_the_parameters():
    assert set(roi_layer(in_channels=5).state_dict()) == {"offset_fc.weight", "offset_fc.bias"}
    assert set(ps_layer(in_channels=5).state_dict()) == {"offset_conv.weight", "offset_conv.bias"}


def test_compiles_in_one_graph():
    layer = ps_layer(in_channels=5, offset_groups=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = torch.rand(2, 4 * 9, SIZE, SIZE), ROIS, torch.rand(2, 5, SIZE, SIZE)
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_repr():
    assert repr(roi_layer()) == (
        "DeformRoIPool(output_size=(3, 2), spatial_scale=0.125, sampling_ratio=2, gamma=0.1, "
        "aligned=True)"
    )
    assert repr(ps_layer(offset_groups=2)) == (
        "DeformPSRoIPool(output_size=(3, 3), group_size=3, spatial_scale=0.125, sampling_ratio=2, "
        "gamma=0.1, aligned=True, offset_groups=2)"
    )


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"feature: none given.*\(N, 5, H, W\)"):
        ps_layer(in_channels=5)(torch.rand(2, 4 * 9, SIZE, SIZE), ROIS)
    with pytest.raises(ValueError, match="the layer is rigid"):
        ps_layer().predict_offset(torch.rand(2, 5, SIZE, SIZE), ROIS)
    with pytest.raises(ValueError, match="offset_groups: 0 given"):
        ps_layer(offset_groups=0)


def test_roi_pool_offset_branch_may_have_hidden_layers():
    """The names of MMDetection's, and a start at zero as without them."""
    layer = roi_layer(in_channels=4, offset_fc_dims=(8, 5))
    names = [f"offset_fc.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(layer.state_dict()) == names
    assert [m.out_features for m in layer.offset_fc[::2]] == [8, 5, 12]
    x = torch.rand(2, 4, SIZE, SIZE)
    assert torch.equal(layer(x, ROIS), roi_layer()(x, ROIS))
