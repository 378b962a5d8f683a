"""What `import d2_deform` does, with Detectron2 and without it."""

import subprocess
import sys

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

import d2_deform

WITHOUT_DETECTRON2 = "import sys; sys.modules['detectron2'] = None; "


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_registers_its_parts():
    assert "build_deform_resnet_backbone" in BACKBONE_REGISTRY
    assert "RFCNROIHeads" in ROI_HEADS_REGISTRY
    assert "RFCN" in META_ARCH_REGISTRY
    assert callable(d2_deform.add_deform_config)


def test_without_detectron2_one_line_says_how_to_get_it():
    result = run(WITHOUT_DETECTRON2 + "import d2_deform")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert "Detectron2 is not installed" in line
    assert "pip install" in line


def test_without_detectron2_operators_and_layers_work():
    result = run(
        WITHOUT_DETECTRON2
        + "import torch, d2_deform.ops; from d2_deform import layers; "
        + "print(layers.DeformConv2d(2, 2, 3)(torch.rand(1, 2, 5, 5)).shape)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "torch.Size([1, 2, 3, 3])"


def test_without_detectron2_the_rest_gives_the_hint():
    for name in ("add_deform_config", "modeling"):
        result = run(WITHOUT_DETECTRON2 + f"from d2_deform import {name}")
        assert result.returncode != 0
        assert "ImportError: d2_deform: Detectron2 is not installed" in result.stderr
    assert run(WITHOUT_DETECTRON2 + "import d2_deform; hasattr(d2_deform, 'x')").returncode == 0


def test_operators_and_layers_never_import_detectron2():
    result = run(
        WITHOUT_DETECTRON2
        + "import d2_deform.ops, d2_deform.layers; "
        + "print([name for name in sys.modules if name.startswith('detectron2.')])"
    )
    assert result.stdout.strip() == "[]"
