"""Every public function is given what it cannot use, and says what, and what it takes instead."""

import inspect
import re
import types

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from torch import nn

from d2_deform import data, engine, layers, model_zoo, ops, solver, visualization

PACKAGES = {
    "ops": ops,
    "layers": layers,
    "model_zoo": model_zoo,
    "data": data,
    "engine": engine,
    "solver": solver,
    "visualization": visualization,
}

# Public names with nothing in the table, and why
EXEMPT = {
    "ops.built_devices": "takes nothing",
    "ops.cpu_capability": "takes nothing",
    "model_zoo.list_configs": "takes nothing",
    "engine.ConfigError": "is an error",
    "engine.run_tool": "reads the command line: tests/engine/test_command_line.py",
    "engine.ClassificationTrainer": "is DeformTrainer with another mapper",
    "data.register_all_coco_sem_seg": "files are looked for when a data set is used",
    "data.register_all_voc_sem_seg": "files are looked for when a data set is used",
    "visualization.OffsetField": "is made by record_sampling",
    "visualization.SampledPrediction": "is made by predict_with_sampling",
    "visualization.SamplingRecord": "is made by record_sampling",
    "visualization.has_deformable_layer": "takes any model",
}

X = torch.zeros(1, 4, 8, 8)
ROI = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
WEIGHT = torch.zeros(4, 4, 3, 3)
OFFSET = torch.zeros(1, 18, 6, 6)


def conv(**changes):
    given = {"input": X, "offset": OFFSET, "weight": WEIGHT, **changes}
    return ops.deform_conv2d(**given)


def pool(**changes):
    return ops.deform_roi_pool(**{"input": X, "rois": ROI, "output_size": 2, **changes})


def ps_pool(**changes):
    given = {"input": X, "rois": ROI, "output_size": 2, "group_size": 2, **changes}
    return ops.deform_ps_roi_pool(**given)


def config(*opts):
    return engine.load_config(opts=["MODEL.WEIGHTS", "", *map(str, opts)], use_gpu=False)


def predictor(weights):
    cfg = config("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    cfg.MODEL.WEIGHTS = str(weights)
    return engine.build_predictor(cfg)


def written(path, content=b""):
    path.write_bytes(content)
    return str(path)


def voc_folder(folder, annotation="<annotation></annotation>"):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\n")
    (folder / "Annotations/a.xml").write_text(annotation)
    return str(folder)


class Network(nn.Module):
    """Takes what Detectron2's do."""

    def __init__(self, layer=nn.Conv2d):
        super().__init__()
        self.backbone = nn.Sequential(layer(3, 4, 3)).eval()
        self.eval()

    def forward(self, batch):
        return self.backbone(batch[0]["image"][None])


def no_prediction():
    """Of a network with one deformable layer that found nothing."""
    model = Network(layers.DeformConv2d)
    with visualization.record_sampling(model) as record:
        model([{"image": X[0, :3]}])
    return visualization.SampledPrediction(IMAGE, {}, record, (1.0, 1.0))


IMAGE = np.zeros((8, 8, 3), np.uint8)

# name of the function, the call, what its line must hold. `folder` is an empty one.
TABLE = [
    # ops
    ("ops.deform_conv2d", lambda folder: conv(input=X[0]), r"input: .*\(N, C, H, W\).*4, 8, 8"),
    ("ops.deform_conv2d", lambda folder: conv(offset=OFFSET[:, :7]), r"offset: .*7"),
    ("ops.deform_conv2d", lambda folder: conv(mask=OFFSET), r"mask: .*18"),
    ("ops.deform_conv2d", lambda folder: conv(weight=WEIGHT[:, :3]), r"weight: .*3"),
    ("ops.deform_conv2d", lambda folder: conv(bias=torch.zeros(5)), r"bias: .*5"),
    ("ops.deform_conv2d", lambda folder: conv(stride=0), r"stride: .*0"),
    ("ops.deform_conv2d", lambda folder: conv(padding=-1), r"padding: .*-1"),
    ("ops.deform_conv2d", lambda folder: conv(dilation=(1, 1, 1)), r"dilation: .*1, 1, 1"),
    ("ops.deform_conv2d", lambda folder: conv(input=X.int()), r"input: .*float64.*int32"),
    ("ops.deform_conv2d", lambda folder: conv(weight=WEIGHT.double()), r"weight: .*float64"),
    ("ops.deform_conv2d", lambda folder: conv(offset=OFFSET.to("meta")), r"offset: .*meta"),
    ("ops.deform_roi_pool", lambda folder: pool(input=X[0]), r"input: .*4, 8, 8"),
    ("ops.deform_roi_pool", lambda folder: pool(rois=ROI[:, 1:]), r"rois: .*1, 4"),
    ("ops.deform_roi_pool", lambda folder: pool(rois=ROI.long()), r"rois: .*int64"),
    ("ops.deform_roi_pool", lambda folder: pool(rois=ROI.to("meta")), r"rois: .*meta"),
    ("ops.deform_roi_pool", lambda folder: pool(offset=torch.zeros(1, 2, 3, 3)), r"offset: .*3, 3"),
    ("ops.deform_roi_pool", lambda folder: pool(output_size=0), r"output_size: .*0"),
    ("ops.deform_roi_pool", lambda folder: pool(sampling_ratio=0), r"sampling_ratio: .*0"),
    ("ops.deform_ps_roi_pool", lambda folder: ps_pool(input=X[:, :3]), r"input: .*3"),
    ("ops.deform_ps_roi_pool", lambda folder: ps_pool(group_size=0), r"group_size: .*0"),
    ("ops.deform_ps_roi_pool", lambda folder: ps_pool(rois=ROI[0]), r"rois: .*5"),
    # layers
    (
        "layers.OffsetConv2d",
        lambda folder: layers.OffsetConv2d(4, 3, deform_groups=0),
        r"deform_groups: 0",
    ),
    (
        "layers.DeformConv2d",
        lambda folder: layers.DeformConv2d(4, 4, 3, deform_groups=3),
        r"deform_groups.*3",
    ),
    ("layers.DeformConv2d", lambda folder: layers.DeformConv2d(4, 4, 3, groups=3), r"groups"),
    (
        "layers.DeformConv2d",
        lambda folder: layers.DeformConv2d(4, 4, 3, offset_branch=False)(X),
        r"offset",
    ),
    (
        "layers.ModulatedDeformConv2d",
        lambda folder: layers.ModulatedDeformConv2d(4, 4, 3, offset_branch=False)(X, OFFSET),
        r"mask",
    ),
    (
        "layers.DeformRoIPool",
        lambda folder: layers.DeformRoIPool(2, 1.0).predict_offset(X, ROI),
        r"rigid",
    ),
    (
        "layers.DeformRoIPool",
        lambda folder: layers.DeformRoIPool(0, 1.0)(X, ROI),
        r"output_size: .*0",
    ),
    (
        "layers.DeformPSRoIPool",
        lambda folder: layers.DeformPSRoIPool(2, 0, 1.0)(X, ROI),
        r"group_size: .*0",
    ),
    (
        "layers.DeformPSRoIPool",
        lambda folder: layers.DeformPSRoIPool(2, 2, 1.0, in_channels=4)(X, ROI),
        r"feature",
    ),
    (
        "layers.convert_to_deformable",
        lambda folder: layers.convert_to_deformable(Network(), last=5),
        r"last: 5 given",
    ),
    # model_zoo
    ("model_zoo.get_config_file", lambda folder: model_zoo.get_config_file("x.yaml"), r"x\.yaml"),
    ("model_zoo.get_config", lambda folder: model_zoo.get_config("x.yaml"), r"x\.yaml"),
    ("model_zoo.get", lambda folder: model_zoo.get("x.yaml"), r"x\.yaml"),
    (
        "model_zoo.get_checkpoint_url",
        lambda folder: model_zoo.get_checkpoint_url("x.yaml"),
        r"x\.yaml",
    ),
    # data
    (
        "data.DeformedDigitsSettings",
        lambda folder: data.DeformedDigitsSettings(image_size=0),
        r"image_size is 0; expected 32",
    ),
    (
        "data.write_deformed_digits",
        lambda folder: data.write_deformed_digits(str(folder), "middle", 1),
        r"split is 'middle'; expected one of train",
    ),
    (
        "data.write_deformed_digits",
        lambda folder: data.write_deformed_digits(str(folder), "train", -1),
        r"num_images is -1; expected 1 or more",
    ),
    (
        "data.write_deformed_digits",
        lambda folder: data.write_deformed_digits(written(folder / "a") + "/b", "train", 1),
        r"/a'",
    ),
    (
        "data.register_deformed_digits",
        lambda folder: data.register_deformed_digits("bad_arguments", "middle", 1),
        r"split is 'middle'",
    ),
    (
        "data.register_deformed_digits",
        lambda folder: data.register_deformed_digits("bad_arguments", "train", 1, warmth=3),
        r"warmth",
    ),
    (
        "data.load_voc_folder",
        lambda folder: data.load_voc_folder(str(folder), "train"),
        r"ImageSets/Main is missing; expected the PASCAL VOC layout",
    ),
    (
        "data.load_voc_folder",
        lambda folder: data.load_voc_folder(voc_folder(folder, "<anno"), "train"),
        r"a\.xml",
    ),
    (
        "data.register_voc_folder",
        lambda folder: data.register_voc_folder("bad_arguments", str(folder / "x"), "train"),
        r"x.*PASCAL VOC layout",
    ),
    (
        "data.register_voc_folder_from_config",
        lambda folder: config(
            *("DATASETS.VOC_FOLDER.ROOT", voc_folder(folder)),
            *("DATASETS.VOC_FOLDER.CLASSES_FILE", folder / "x.txt"),
        ),
        r"x\.txt",
    ),
    (
        "data.register_pascal_voc_no_difficult",
        lambda folder: data.register_pascal_voc_no_difficult(
            "bad_arguments", str(folder), "x", 1999
        ),
        r"year is 1999; expected 2007 or 2012",
    ),
    (
        "data.load_voc_sem_seg",
        lambda folder: data.load_voc_sem_seg(str(folder), "train"),
        r"train\.txt is missing; unpack PASCAL VOC 2012",
    ),
    (
        "data.load_coco_sem_seg",
        lambda folder: data.load_coco_sem_seg(str(folder / "x.json"), str(folder)),
        r"x\.json is missing",
    ),
    (
        "data.load_coco_sem_seg",
        lambda folder: data.load_coco_sem_seg(written(folder / "x.json", b"{"), str(folder)),
        r"x\.json is no JSON in COCO's format",
    ),
    (
        "data.register_coco_sem_seg",
        lambda folder: data.register_coco_sem_seg("bad_arguments", "x.json", "x", by="colour"),
        r"by is 'colour'; expected 'name'",
    ),
    # engine
    ("engine.load_config", lambda folder: config("MODEL.DEFORM.NUM_LAYER", 3), r"NUM_LAYERS\?"),
    (
        "engine.setup",
        lambda folder: engine.setup(
            types.SimpleNamespace(
                config_file="",
                opts=["OUTPUT_DIR", written(folder / "a") + "/b", "MODEL.WEIGHTS", ""],
                num_gpus=0,
                resume=False,
                eval_only=True,
            )
        ),
        r"OUTPUT_DIR: .*a/b cannot be written to",
    ),
    ("engine.build_predictor", lambda folder: predictor(""), r"MODEL\.WEIGHTS is empty"),
    (
        "engine.build_predictor",
        lambda folder: predictor(folder / "x.pth"),
        r"MODEL\.WEIGHTS: .*x\.pth",
    ),
    (
        "engine.build_predictor",
        lambda folder: predictor(written(folder / "x.pth", b"garbage")),
        r"x\.pth cannot be read as weights",
    ),
    (
        "engine.load_backbone_weights",
        lambda folder: engine.load_backbone_weights(Network(), written(folder / "x.pth")),
        r"x\.pth cannot be read as weights",
    ),
    ("engine.OffsetMonitor", lambda folder: engine.OffsetMonitor(0), r"period: 0 given"),
    ("engine.find_pictures", lambda folder: engine.find_pictures([str(folder)]), r"no picture"),
    (
        "engine.find_pictures",
        lambda folder: engine.find_pictures([str(folder / "x.jpg")]),
        r"x\.jpg",
    ),
    (
        "engine.read_picture",
        lambda folder: engine.read_picture(written(folder / "x.jpg", b"no picture")),
        r"x\.jpg",
    ),
    (
        "engine.write_new_file",
        lambda folder: engine.write_new_file(written(folder / "x"), b"other"),
        r"x.*exist",
    ),
    (
        "engine.write_new_file",
        lambda folder: engine.write_new_file(written(folder / "a") + "/b", b""),
        r"a/b",
    ),
    (
        "engine.write_backbone",
        lambda folder: engine.write_backbone(
            nn.ModuleDict({"backbone": nn.Linear(1, 1)}), str(folder / "x" / "y")
        ),
        r"x/y",
    ),
    (
        "engine.write_backbone",
        lambda folder: engine.write_backbone(nn.ReLU(), str(folder / "y")),
        r"backbone",
    ),
    (
        "engine.scale_to_world_size",
        lambda folder: engine.scale_to_world_size(
            config("SOLVER.REFERENCE_WORLD_SIZE", 3, "SOLVER.IMS_PER_BATCH", 16), 2
        ),
        r"IMS_PER_BATCH.*16.*REFERENCE_WORLD_SIZE.*3",
    ),
    (
        "engine.DeformTrainer",
        lambda folder: engine.DeformTrainer.build_evaluator(config(), "bad_arguments"),
        r"No evaluator for data set 'bad_arguments'",
    ),
    (
        "engine.dump_proposals",
        lambda folder: engine.dump_proposals(config(), str(folder)),
        r"DATASETS.TRAIN and DATASETS.TEST are empty",
    ),
    # solver
    (
        "solver.LearningRateFactors",
        lambda folder: solver.LearningRateFactors(offset=-1.0),
        r"offset: -1",
    ),
    (
        "solver.build_optimizer",
        lambda folder: solver.build_optimizer(config("SOLVER.OPTIMIZER", "adam"), Network()),
        r"SOLVER.OPTIMIZER is 'adam'; expected one of SGD, ADAMW",
    ),
    # visualization
    (
        "visualization.trace_sampling_locations",
        lambda folder: visualization.trace_sampling_locations(Network(), X[0, :3], (4, 4)),
        r"deformable",
    ),
    (
        "visualization.trace_sampling_locations",
        lambda folder: visualization.trace_sampling_locations(
            Network(layers.DeformConv2d), X[0, :3], (4, 4), layers=0
        ),
        r"layers: 0",
    ),
    (
        "visualization.draw_sampling_points",
        lambda folder: visualization.draw_sampling_points(IMAGE[0], np.zeros((1, 2)), (4, 4)),
        r"image: .*8, 3",
    ),
    (
        "visualization.draw_part_bins",
        lambda folder: visualization.draw_part_bins(IMAGE, torch.zeros(1, 5), torch.zeros(1, 4, 4)),
        r"boxes: .*1, 5",
    ),
    (
        "visualization.part_bins",
        lambda folder: visualization.part_bins(Network(), X[0, :3], torch.zeros(1, 4), [0]),
        r"pooling",
    ),
    (
        "visualization.record_sampling",
        lambda folder: visualization.record_sampling(nn.ReLU()).__enter__(),
        r"training mode; call model.eval\(\)",
    ),
    *(
        (
            f"visualization.{name}",
            lambda folder, name=name: getattr(visualization, name)(None, IMAGE[0]),
            r"image: uint8 \(8, 3\) given, accepted: uint8 \(H, W, 3\)",
        )
        for name in ("predict_with_sampling", "predict_with_figure", "draw_prediction_figure")
    ),
    (
        "visualization.draw_offset_figure",
        lambda folder: visualization.draw_offset_figure(no_prediction(), layers=0),
        r"layers: 0",
    ),
    (
        "visualization.build_explorer_page",
        lambda folder: visualization.build_explorer_page({}),
        r"predictions: 0 given",
    ),
]


def public_functions():
    for package, module in PACKAGES.items():
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield f"{package}.{name}"


def test_no_function_is_forgotten():
    named = {name for name, *_ in TABLE}
    assert set(public_functions()) == named | EXEMPT.keys()
    assert not named & EXEMPT.keys()


@pytest.mark.parametrize(
    "name, call, says", TABLE, ids=[f"{row[0]}-{i}" for i, row in enumerate(TABLE)]
)
def test_the_line_names_what_was_given(name, call, says, tmp_path):
    with pytest.raises(
        (ValueError, RuntimeError, TypeError, OSError, NotImplementedError)
    ) as error:
        call(tmp_path)
    assert re.search(says, str(error.value), re.DOTALL), error.value
    assert "bad_arguments" not in DatasetCatalog  # nothing is left behind
