"""DeformTrainer: the schedule of its number of processes, and resuming."""

import pytest
import torch
from detectron2.utils import comm

from d2_deform.data.deformed_digits import DeformedDigitsSettings, write_deformed_digits
from d2_deform.engine import ConfigError, DeformTrainer, load_config
from d2_deform.modeling.test_time_augmentation import RCNNWithTTA

QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "voc"
    settings = DeformedDigitsSettings(image_size=64, min_height=0.3)
    write_deformed_digits(str(folder), "train", 4, settings=settings)
    return str(folder)


@pytest.fixture
def cfg(digits, tmp_path, request):
    cfg = load_config(
        str(request.config.rootpath / QUICKSTART),
        [
            *("DATASETS.VOC_FOLDER.ROOT", digits),
            *("DATASETS.TRAIN", "('voc_folder_train',)"),
            *("DATASETS.TEST", "()"),
            *("DATALOADER.NUM_WORKERS", "0"),
            *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", "4"),
            *("MODEL.RFCN.CONV_DIM", "8"),
            *("SOLVER.OPTIMIZER", "SGD"),
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
            *("OUTPUT_DIR", str(tmp_path)),
        ],
        use_gpu=False,
    )
    cfg.SOLVER.SCALE_WEIGHT_DECAY = True
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 4
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.002
    cfg.SOLVER.WEIGHT_DECAY = 0.001
    cfg.SOLVER.WARMUP_METHOD = "constant"
    cfg.SOLVER.WARMUP_FACTOR = 0.1
    cfg.SOLVER.WARMUP_ITERS = 1
    cfg.SOLVER.STEPS = (2,)
    cfg.SOLVER.MAX_ITER = 3
    return cfg


def test_a_schedule_for_four_processes_on_one(cfg):
    trainer = DeformTrainer(cfg)
    assert trainer.max_iter == 12
    assert {len(next(iter(trainer.data_loader))) for _ in range(2)} == {1}  # pictures
    rates, run_step = [], trainer.run_step

    def note_the_rate():
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        run_step()

    trainer.run_step = note_the_rate
    trainer.train()
    expected = [5e-5] * 4 + [5e-4] * 4 + [5e-5] * 4  # warm-up, full, a tenth
    assert rates == pytest.approx(expected)
    decays = {g["weight_decay"] for g in trainer.optimizer.param_groups}
    assert max(decays) == pytest.approx(0.004)


def test_a_run_of_other_processes_is_not_resumed(cfg):
    DeformTrainer(cfg).train()
    DeformTrainer(cfg).resume_or_load(resume=True)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0  # as it is: whoever sets this knows
    DeformTrainer(cfg).resume_or_load(resume=True)

    cfg.SOLVER.REFERENCE_WORLD_SIZE = 1
    state = DeformTrainer(cfg).state_dict()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 4
    trainer = DeformTrainer(cfg)
    with pytest.raises(ConfigError, match=r"had 8 process\(es\), this one has 1, .* resume with 8"):
        trainer.load_state_dict({**state, "reference_world_size": 8})


def test_mixed_precision_on_cpu(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    trainer = DeformTrainer(cfg)
    types = set()
    trainer.model.backbone.res5.register_forward_hook(lambda *given: types.add(given[-1].dtype))
    trainer.train()
    assert types == {torch.bfloat16}
    # What it leaves is not bound to the precision.
    cfg.SOLVER.AMP.ENABLED = False
    resumed = DeformTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == resumed.max_iter
    for own, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_every_process_evaluates_the_first_ones_running_statistics(cfg, monkeypatch):
    cfg.DATASETS.TEST = ()
    model = torch.nn.BatchNorm2d(2)
    shared = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda buffer, src: shared.append((id(buffer), src))
    )
    DeformTrainer.test(cfg, model)
    assert shared == [(id(buffer), 0) for buffer in model.buffers()] and len(shared) == 3


def test_test_time_augmentation_gets_pictures_in_their_own_size(cfg):
    cfg.DATASETS.TEST = ("voc_folder_train",)
    cfg.INPUT.MIN_SIZE_TEST = 96
    seen = []

    class Recorder(DeformTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            seen.append((cfg, model, evaluators))
            return {"bbox": {"AP": 1.0}}

    results = Recorder.test_with_TTA(cfg, Recorder.build_model(cfg))
    assert results == {"bbox_TTA": {"AP": 1.0}} and cfg.INPUT.MIN_SIZE_TEST == 96
    ((its_cfg, model, evaluators),) = seen
    assert type(model) is RCNNWithTTA and len(evaluators) == 1
    (picture,) = next(iter(DeformTrainer.build_test_loader(its_cfg, "voc_folder_train")))
    assert picture["image"].shape == (3, 64, 64)
