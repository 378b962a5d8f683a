"""Deformable R-FCN beside the plain one: inference and one training step of a whole network.

    python -m benchmarks.networks [--threads 2] [--quick] [--parts R-50] [--profile]

ResNet-50 and -101, configs/VOC-Detection, one picture of 600 x 1000 pixels. Weights are random:
batch norms are fitted to the picture, and the layers that predict offsets so that offsets have a
standard deviation of 2 cells (convolutions) and of 1 (bins, times gamma = 0.1 of the box). A
training step is forward, losses, backward and SGD's update, at a rate of 0, so that every
repetition computes the same; four steps are made to warm up. ``--profile`` only profiles a
training step of the deformable ResNet-50. ``--quick`` leaves ResNet-101 out, for a picture of 96 x
160 pixels.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.parts import Row, Settings, Step
from benchmarks.common.problem import Absent
from benchmarks.common.script import get_parser, output_folder, run_steps, settings_of
from benchmarks.common.timing import in_turn, timing_row

DEPTHS = {"R-50": "R_50", "R-101": "R_101"}
PARTS = (*DEPTHS, "profile")
NETWORKS = {"deformable": "rfcn_{}_dconv3_dpool", "plain": "rfcn_{}"}
HEIGHT, WIDTH, OBJECTS = 600, 1000, 8
ROUNDS = 7
TRAINING_WARM_UP = 4
NO_LIMIT = 3600.0  # seconds; slow as these calls are, they take part in all rounds
CONVOLUTIONS = {
    "aten::mkldnn_convolution",
    "aten::convolution_backward",
    "aten::_slow_conv2d_forward",
    "aten::_slow_conv2d_backward",
}
TOP = 15


class Network:
    """A network with random weights and something to run it on."""

    def __init__(self, config: str, quick: bool) -> None:
        try:
            from detectron2.modeling import build_model
            from detectron2.structures import Boxes, Instances

            from d2_deform import model_zoo
            from d2_deform.analysis import fit_batch_norms, prepare_input, random_picture
            from d2_deform.solver import build_optimizer
        except ImportError as error:
            raise Absent(f"Detectron2 is not installed ({error})") from error
        self.config = f"VOC-Detection/{config}.yaml"
        cfg = model_zoo.get_config(self.config)
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
        cfg.SOLVER.BASE_LR = 0.0
        if quick:
            cfg.INPUT.MIN_SIZE_TEST = 96
        torch.manual_seed(0)
        self.model = build_model(cfg).eval()
        self.optimizer = build_optimizer(cfg, self.model)
        self.input = prepare_input(cfg, random_picture(HEIGHT, WIDTH))
        fit_batch_norms(self.model, [self.input])
        fit_offsets(self.model, [self.input])

        height, width = self.input["image"].shape[1:]
        corners = torch.rand(OBJECTS, 2) * torch.tensor([width, height]) / 2
        sides = torch.tensor([width, height]) * (0.1 + 0.4 * torch.rand(OBJECTS, 2))
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        objects.gt_classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (OBJECTS,))
        self.example = {**self.input, "instances": objects}

    def infer(self) -> Any:
        self.model.eval()
        with torch.no_grad():
            return self.model([self.input])

    def train(self) -> None:
        from detectron2.utils.events import EventStorage

        self.model.train()
        with EventStorage():
            losses = self.model([self.example])
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()


def fit_offsets(model: nn.Module, inputs: list[dict[str, Any]]) -> None:
    """Gives the layers that predict offsets random weights, so that offsets are as learnt ones are.

    As they come, these layers predict zeros, which are whole cells and the regular grid.
    """
    from d2_deform.layers.zero_init import ZeroConv2d, ZeroLinear

    def fit(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bins = isinstance(layer, ZeroLinear) or layer.kernel_size == (1, 1)
        assert isinstance(layer.weight, nn.Parameter)
        nn.init.normal_(layer.weight)
        factor = (1.0 if bins else 2.0) / layer.forward(*args).std()
        layer.weight.mul_(factor)
        return layer.forward(*args)

    layers = (m for m in model.modules() if isinstance(m, (ZeroConv2d, ZeroLinear)))
    handles = [layer.register_forward_hook(fit) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()


def steps(settings: Settings, parts: Sequence[str]) -> list[Step]:
    """A step for each depth and one for the profile."""
    costs = {"R-50": 1.5, "R-101": 2.3, "profile": 0.3}
    runs: dict[str, Callable[[], Iterator[Row]]] = {
        name: partial(compare, depth, settings) for name, depth in DEPTHS.items()
    }
    runs["profile"] = partial(profile, settings)
    return [Step(part, "R-FCN", costs[part], runs[part]) for part in parts]


def compare(depth: str, settings: Settings) -> Iterator[Row]:
    """Inference and training step, plain and deformable in turn."""
    try:
        networks = {
            name: Network(config.format(depth), settings.quick) for name, config in NETWORKS.items()
        }
    except Absent as reason:
        yield {"case": "R-FCN", "absent": {"case": str(reason)}}
        return
    description = " and ".join(network.config for network in networks.values())
    # The first training steps take pages from the system that the allocator keeps.
    for case, function, warm_up in (
        ("inference", Network.infer, 1),
        ("training step", Network.train, 1 if settings.quick else TRAINING_WARM_UP),
    ):
        calls = {name: partial(function, network) for name, network in networks.items()}
        times = in_turn(calls, settings.rounds, warm_up, seconds=NO_LIMIT)
        yield {"case": case, "description": description, **timing_row(times)}


def profile(settings: Settings) -> Iterator[Row]:
    """Where the time of a training step goes, by operations' own time on the calling thread."""
    try:
        network = Network(NETWORKS["deformable"].format("R_50"), settings.quick)
    except Absent as reason:
        yield {"case": "training step", "absent": {"case": str(reason)}}
        return
    network.train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        network.train()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)

    def share(of: Callable[[str], bool]) -> float:
        return sum(event.self_cpu_time_total for event in events if of(event.key)) / total

    ours = share(lambda name: "d2_deform" in name)
    convolutions = share(lambda name: name in CONVOLUTIONS)
    top = sorted(events, key=lambda event: -event.self_cpu_time_total)[:TOP]
    yield {
        "case": "training step",
        "description": network.config,
        "shares": {
            "our operators": ours,
            "convolutions": convolutions,
            "the rest": 1 - ours - convolutions,
        },
        "top": [
            {
                "name": readable(event.key),
                "share": event.self_cpu_time_total / total,
                "ms": event.self_cpu_time_total / 1e3,
                "calls": event.count,
            }
            for event in top
        ],
    }


def readable(name: str) -> str:
    """Our forward passes appear under the autograd function that torch.library makes for them."""
    made = re.fullmatch(r"GeneratedBackwardFor_d2_deform_(\w+)_default", name)
    return f"d2_deform::{made[1]}" if made else name


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = get_parser(__doc__ or "", PARTS)
    parser.add_argument("--profile", action="store_true", help="the same as --parts profile")
    args = parser.parse_args(argv)
    settings = settings_of(args, rounds=ROUNDS)
    parts = ["profile"] if args.profile else args.parts
    if args.quick:
        parts = [part for part in parts if part != "R-101"]
    run_steps("networks", steps(settings, parts), settings, output_folder(args), args.json)


if __name__ == "__main__":
    main()
