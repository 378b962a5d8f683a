"""ClassificationTrainer in one process and in two, and the configs that it is not given."""

import argparse
import copy

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from d2_deform import model_zoo
from d2_deform.engine import ClassificationTrainer, ConfigError, load_config, setup
from d2_deform.engine.mixed_precision import CPUAMPTrainer

CONFIG = model_zoo.get_config_file("Image-Folder/classifier_thin_R_18.yaml")
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of one colour each; 12 pictures to train on, 3 to validate."""
    root = tmp_path_factory.mktemp("colours")
    for split, number in (("train", 4), ("val", 1)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                shade = tuple(channel - 40 * index if channel else 0 for channel in colour)
                Image.new("RGB", (32, 32), shade).save(root / split / name / f"{index}.png")
    return root


def options(folder, output):
    return [
        *("DATASETS.IMAGE_FOLDER.ROOT", str(folder)),
        *("DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
        *("INPUT.CLASSIFICATION.CROP_SIZE", "32"),
        *("INPUT.MIN_SIZE_TEST", "32"),
        *("SOLVER.IMS_PER_BATCH", "4"),
        *("SOLVER.MAX_ITER", "3"),
        *("SOLVER.WARMUP_ITERS", "0"),
        *("OUTPUT_DIR", str(output)),
    ]


def test_the_folder_gives_the_classes(folder, tmp_path):
    cfg = load_config(CONFIG, options(folder, tmp_path))
    assert cfg.MODEL.IMAGE_CLASSIFIER.NUM_CLASSES == 3
    (batch,) = ClassificationTrainer.build_test_loader(cfg, "image_folder_val")
    assert [given["label"] for given in batch] == [0, 1, 2]
    assert [given["image"][:, 0, 0].tolist() for given in batch] == [
        list(colour[::-1]) for colour in COLOURS.values()
    ]


def train_and_save(opts, path):
    torch.set_num_threads(1)
    seed_all_rng(0)
    trainer = ClassificationTrainer(load_config(CONFIG, opts, use_gpu=False))
    assert isinstance(trainer.model, DistributedDataParallel) == (comm.get_world_size() > 1)
    start = copy.deepcopy(trainer.checkpointer.model.state_dict())
    trainer.train()
    if comm.is_main_process():
        end = trainer.checkpointer.model.state_dict()
        torch.save({"start": start, "end": end, "results": trainer._last_eval_results}, path)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(folder, tmp_path):
    """Batches of 2 x 2 pictures and of 4, without what differs between them by itself."""
    alike = ["MODEL.RESNETS.NORM", "FrozenBN", "INPUT.CLASSIFICATION.MIN_CROP_AREA", "1.0"]
    train_and_save([*options(folder, tmp_path / "1"), *alike], tmp_path / "1.pth")
    opts = [*options(folder, tmp_path / "2"), *alike]
    launch(train_and_save, 2, dist_url="auto", args=(opts, tmp_path / "2.pth"))

    one, two = (torch.load(tmp_path / f"{number}.pth") for number in (1, 2))
    assert one["results"] == two["results"]
    assert one["end"].keys() == two["end"].keys()
    for name, value in one["end"].items():
        torch.testing.assert_close(two["end"][name], value, rtol=1e-4, atol=1e-5)
        learns = "running" not in name and "norm" not in name
        assert learns != torch.equal(one["start"][name], value), name
    backbones = [torch.load(tmp_path / number / "backbone.pth")["model"] for number in "12"]
    assert backbones[0].keys() == backbones[1].keys()


def arguments(*words):
    return argparse.Namespace(
        config_file=CONFIG, opts=list(words), num_gpus=0, resume=False, eval_only=False
    )


def test_mixed_precision_on_cpu(folder, tmp_path):
    cfg = setup(arguments(*options(folder, tmp_path), "SOLVER.AMP.ENABLED", "True"))
    trainer = ClassificationTrainer(cfg)
    assert type(trainer._trainer) is CPUAMPTrainer
    trainer.train()


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["DATASETS.IMAGE_FOLDER.ROOT", "", "DATASETS.TRAIN", "('image_folder_x',)"],
            "no data set named image_folder_x is registered. Set DATASETS.IMAGE_FOLDER.ROOT",
        ),
        (["DATASETS.IMAGE_FOLDER.ROOT", "/nowhere"], "IMAGE_FOLDER: Folder /nowhere/train is mis"),
        (
            ["DATASETS.TRAIN", "('deformed_digits_val',)"],
            "deformed_digits_val has no classes of wh",
        ),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "from which GeneralizedRCNN .* cannot"),
        (["MODEL.IMAGE_CLASSIFIER.IN_FEATURE", "p5"], r"IN_FEATURE\): p5 given, but the backbone"),
        (["INPUT.CLASSIFICATION.CROP_SIZE", "0"], "INPUT.CLASSIFICATION.CROP_SIZE: 0 given"),
        (["TEST.AUG.ENABLED", "True"], "there is no test-time augmentation for ImageClassifier"),
    ],
)
def test_unusable_values(words, message, folder, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, [*options(folder, tmp_path), *words])


def test_an_empty_class(folder, tmp_path):
    for split in ("train", "val"):
        for name in ("blue", "violet"):
            (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "blue" / "1.png")
    with pytest.raises(ConfigError, match=r"IMAGE_FOLDER: .*/train: .*for the classes violet"):
        load_config(CONFIG, options(tmp_path, tmp_path / "output"))
