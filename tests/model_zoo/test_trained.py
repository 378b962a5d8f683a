"""The weights that come with the package: their files, and that they are trained."""

from pathlib import Path

import cv2
import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from d2_deform import model_zoo
from d2_deform.data.deformed_digits import write_deformed_digits
from d2_deform.data.deformed_digits_drawing import CLASS_NAMES
from d2_deform.data.voc_folder import load_voc_folder
from d2_deform.engine.weights import load_weights
from d2_deform.model_zoo.trained import WEIGHTS, find_trained, pack_trained

PAGE = Path(__file__).parents[2] / "docs" / "model_zoo.md"
PUBLISHED = [name for name in model_zoo.list_configs() if find_trained(name)]


def test_every_file_belongs_to_a_config_and_is_on_the_page():
    files = {path for path in WEIGHTS.rglob("*") if path.is_file()}
    assert files == {find_trained(name) for name in PUBLISHED}
    assert len(PUBLISHED) == 4
    assert sum(path.stat().st_size for path in files) < 10e6
    page = PAGE.read_text()
    assert all(path.relative_to(WEIGHTS).as_posix() in page for path in files)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_fit_their_network_wholly(name):
    cfg = model_zoo.get_config(name, trained=True)
    assert cfg.MODEL.WEIGHTS == model_zoo.get_checkpoint_url(name)
    model = model_zoo.get(name, device="cpu")
    load_weights(model, cfg.MODEL.WEIGHTS)  # says what is missing or left over
    trained = model_zoo.get(name, trained=True, device="cpu")
    assert all(p.dtype == torch.float32 for p in trained.parameters())
    for (key, one), other in zip(
        trained.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


def test_the_quick_starts_network_names_digits(tmp_path):
    write_deformed_digits(str(tmp_path / "digits"), "test", 6, seed=5)
    model = model_zoo.get("quickstart.yaml", trained=True, device="cpu").eval()
    found = digits = 0
    for record in load_voc_folder(str(tmp_path / "digits"), "test", CLASS_NAMES):
        picture = torch.as_tensor(cv2.imread(record["file_name"]).transpose(2, 0, 1))
        with torch.no_grad():
            (output,) = model([{"image": picture}])
        seen = output["instances"][output["instances"].scores > 0.5]
        truth = Boxes(torch.tensor([a["bbox"] for a in record["annotations"]]))
        named = torch.tensor([a["category_id"] for a in record["annotations"]])
        right = (pairwise_iou(truth, seen.pred_boxes) > 0.5) & (named[:, None] == seen.pred_classes)
        found += int(right.any(dim=1).sum())
        digits += len(named)
    assert digits >= 6
    assert found >= 0.6 * digits, f"{found} of {digits}"


def test_packs_matrices_as_half_and_leaves_the_rest(tmp_path):
    weights = {
        "conv.weight": torch.full((2, 3, 1, 1), 1 / 3, requires_grad=True),
        "norm.running_var": torch.tensor([1e6, 1e-9]),
        "norm.num_batches_tracked": torch.tensor(2400),
    }
    path, content = pack_trained(weights, "Folder/net.yaml", tmp_path)
    assert (path, content) == pack_trained(weights, "Folder/net.yaml", tmp_path)
    path.parent.mkdir()
    path.write_bytes(content)
    assert find_trained("Folder/net.yaml", tmp_path) == path
    assert find_trained("Folder/net_two.yaml", tmp_path) is None
    packed = torch.load(path, weights_only=True)["model"]
    assert packed["conv.weight"].dtype == torch.float16
    assert torch.equal(packed["norm.running_var"], weights["norm.running_var"])
    assert torch.equal(packed["norm.num_batches_tracked"], weights["norm.num_batches_tracked"])

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=r"net_.*\.pth is damaged.*md5"):
        find_trained("Folder/net.yaml", tmp_path)
