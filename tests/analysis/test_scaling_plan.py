"""The paper plan of scaling, by numbers worked out by hand."""

import pytest

from d2_deform.analysis.scaling_plan import Cluster, all_reduce_seconds, scaling_efficiency

FAST = Cluster(network=10e9, gpus_per_machine=8, inside=100e9, latency=0.0)
SLOW_START = Cluster(network=10e9, gpus_per_machine=8, inside=100e9, latency=1e-5)


@pytest.mark.parametrize(
    "num_gpus, cluster, expected",
    [
        (1, SLOW_START, 0.0),
        (8, FAST, 1.75e-3),  # 2 * 7/8 * 100 MB at 100 GB/s
        (8, SLOW_START, 1.75e-3 + 2 * 3 * 4 * 1e-5),  # 100 MB are four buckets
        (16, FAST, 18.75e-3),  # 2 * 15/16 * 100 MB at 10 GB/s
        (16, SLOW_START, 18.75e-3 + 2 * 4 * 4 * 1e-5),
    ],
)
def test_all_reduce(num_gpus, cluster, expected):
    assert all_reduce_seconds(100e6, num_gpus, cluster) == pytest.approx(expected)


@pytest.mark.parametrize(
    "step, num_gpus, slowest, expected",
    [
        (0.06, 1, 1.2, 1.0),
        # All 18.75 ms fit behind the backward pass of 40 ms; the last bucket of 25 MiB does not.
        (0.06, 16, 1.0, 0.06 / (0.06 + 0.18750 * 25 * 2**20 / 1e9)),
        (0.06, 16, 1.2, 0.06 / (0.072 + 0.18750 * 25 * 2**20 / 1e9)),
        (0.015, 16, 1.0, 0.015 / (0.015 + 0.00875)),  # 10 ms behind the backward pass
    ],
)
def test_efficiency(step, num_gpus, slowest, expected):
    assert scaling_efficiency(step, 100e6, num_gpus, FAST, slowest) == pytest.approx(expected)


def test_a_network_faster_than_the_links_inside():
    cluster = Cluster(network=1e12, inside=100e9, latency=0.0)
    assert all_reduce_seconds(100e6, 16, cluster) == pytest.approx(1.875e-3)
