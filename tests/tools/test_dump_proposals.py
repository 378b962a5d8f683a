"""The paper's regime of fixed proposals: train an RPN, write its proposals, train on them."""

import json
import pickle

import pytest
import torch
from conftest import CONFIG
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader
from detectron2.engine import default_argument_parser
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model

from d2_deform.data.proposals import check_proposal_files
from d2_deform.engine import ConfigError, load_config

NETWORK_OF_PROPOSALS = ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]


@pytest.fixture(scope="module")
def train_net(tool):
    return tool("train_net")


@pytest.fixture(scope="module")
def dump(tool):
    return tool("dump_proposals").main


def arguments(*words):
    words = ["--config-file", CONFIG, "--num-gpus", 0, *words]
    return default_argument_parser().parse_args([*map(str, words)])


def on_proposals(folder):
    file = f"('{folder}/voc_folder_train_proposals.pkl',)"
    return [
        *("MODEL.LOAD_PROPOSALS", True),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        *("DATASETS.PROPOSAL_FILES_TRAIN", file),
        *("DATASETS.PROPOSAL_FILES_TEST", file),
        *("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", 20),
    ]


@pytest.fixture
def random_rpn(train_net, tiny, tmp_path):
    """Weights of an RPN after no more than a step."""
    options = [*tiny, *NETWORK_OF_PROPOSALS, "OUTPUT_DIR", tmp_path / "rpn"]
    train_net.main(arguments(*options, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"))
    return str(tmp_path / "rpn" / "model_final.pth")


def test_rpn_then_proposals_then_rfcn(train_net, dump, tiny, tmp_path, capsys):
    rpn = [*tiny, *NETWORK_OF_PROPOSALS]
    train_net.main(arguments(*rpn, "OUTPUT_DIR", tmp_path / "rpn", "SOLVER.MAX_ITER", 20))
    with open(tmp_path / "rpn" / "metrics.json") as file:
        measured = json.loads(file.readlines()[-1])  # the trainer evaluates an RPN too
    assert 0 <= measured["box_proposals/R70"] <= measured["box_proposals/R50"] <= 100

    weights, proposals = str(tmp_path / "rpn" / "model_final.pth"), str(tmp_path / "proposals")
    words = ["--config-file", CONFIG, "--output", proposals, *rpn, "MODEL.WEIGHTS", weights]
    results = dump(words)
    printed = capsys.readouterr().out
    assert f"PROPOSAL_FILES_TEST: ('{proposals}/voc_folder_train_proposals.pkl',)" in printed
    assert "Total inference time" in printed and "proposals an image, recall" in printed
    for key, value in results["voc_folder_train"].items():
        assert value == pytest.approx(measured[f"box_proposals/{key}"])
    with open(f"{proposals}/voc_folder_train_proposals.pkl", "rb") as file:
        content = pickle.load(file)
    assert len(content["ids"]) == 8
    for boxes, logits in zip(content["boxes"], content["objectness_logits"], strict=True):
        assert 0 < len(boxes) == len(logits) <= 20  # RPN.POST_NMS_TOPK_TEST
        assert boxes.min() >= 0 and boxes.max() <= 64

    detector = [*tiny, *on_proposals(proposals), "OUTPUT_DIR", tmp_path / "rfcn"]
    check_proposal_files(load_config(CONFIG, [str(word) for word in detector], use_gpu=False))
    train_net.main(arguments(*detector, "SOLVER.MAX_ITER", 20))
    with open(tmp_path / "rfcn" / "metrics.json") as file:
        trained = json.loads(file.readlines()[-1])
    assert 0 <= trained["bbox/AP50"] <= 100
    checkpoint = torch.load(tmp_path / "rfcn" / "model_final.pth", weights_only=False)
    assert not [name for name in checkpoint["model"] if name.startswith("proposal_generator")]


def detections(options):
    """Of every picture of the test set, in its order."""
    cfg = load_config(CONFIG, [str(word) for word in options], use_gpu=False)
    check_proposal_files(cfg)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
    with inference_context(model), torch.no_grad():
        return [model(inputs)[0]["instances"] for inputs in loader]


def test_the_rpn_of_a_detector(train_net, dump, tiny, tmp_path):
    """A detector on the proposals of its own RPN finds what it finds without them."""
    train_net.main(
        arguments(*tiny, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    )
    # Proposals cross from the network's scale to the original image's and back.
    options = [*tiny, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "INPUT.MIN_SIZE_TEST"]
    options += ["96", "INPUT.MAX_SIZE_TEST", "96"]
    dump(["--config-file", CONFIG, "--output", str(tmp_path), *options])
    own, fixed = detections(options), detections([*options, *on_proposals(tmp_path)])
    assert len(own) == len(fixed) == 8
    for one, other in zip(own, fixed, strict=True):
        assert len(one) > 0
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-3, atol=1e-2
        )


def test_files_made_with_other_settings_stay(dump, tiny, random_rpn, tmp_path):
    words = ["--config-file", CONFIG, "--output", str(tmp_path / "out")]
    options = [*tiny, *NETWORK_OF_PROPOSALS, "MODEL.WEIGHTS", random_rpn]
    dump([*words, *options])
    dump([*words, *options, "DATALOADER.NUM_WORKERS", "1"])  # the same settings
    message = r"voc_folder_train_proposals\.pkl was made with other settings: "
    with pytest.raises(ConfigError, match=message + r"MODEL\.RPN\.NMS_THRESH was 0\.7, is 0\.5\."):
        dump([*words, *options, "MODEL.RPN.NMS_THRESH", "0.5"])
    checkpoint = torch.load(random_rpn, weights_only=False)
    checkpoint["model"]["proposal_generator.rpn_head.conv.bias"] += 1
    torch.save(checkpoint, random_rpn)
    with pytest.raises(ConfigError, match=message + r"MODEL\.WEIGHTS \(sha256\)"):
        dump([*words, *options])
    (tmp_path / "out" / "voc_folder_train_proposals.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(ConfigError, match=r"is no file of proposals;.*Move it away"):
        dump([*words, *options])


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.WEIGHTS", ""], r"MODEL\.WEIGHTS is empty"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], "so the network makes none"),
        (["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], r"DATASETS\.TEST are empty"),
        (["MODEL.RPN.CONV_DIMS", "[32]"], r"no proposal_generator\.rpn_head\.conv\.weight that"),
    ],
)
def test_flawed_commands(options, message, dump, tiny, random_rpn, tmp_path):
    words = ["--config-file", CONFIG, "--output", str(tmp_path / "out"), *tiny]
    with pytest.raises(ConfigError, match=message):
        dump([*words, "MODEL.WEIGHTS", random_rpn, *options])
    assert not (tmp_path / "out").exists()


def test_weights_without_an_rpn(dump, tiny, random_rpn, tmp_path):
    checkpoint = torch.load(random_rpn, weights_only=False)
    backbone = {k: v for k, v in checkpoint["model"].items() if k.startswith("backbone")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(ConfigError, match=r"backbone\.pth has no proposal_generator\."):
        dump(
            ["--config-file", CONFIG, "--output", str(tmp_path / "out"), *tiny]
            + ["MODEL.WEIGHTS", str(tmp_path / "backbone.pth")]
        )
