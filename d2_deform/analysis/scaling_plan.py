"""How data-parallel training should scale, worked out on paper: nothing here is measured."""

import math
from dataclasses import dataclass

__all__ = ["Cluster", "all_reduce_seconds", "scaling_efficiency"]

BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb
BACKWARD_SHARE = 2 / 3  # of a step: the backward pass computes two gradients a layer


@dataclass(frozen=True)
class Cluster:
    """What the GPUs of a cluster are joined by.

    Attributes:
        network: bytes per second of a machine's network, each way, all its adapters together.
        gpus_per_machine: processes on one machine.
        inside: bytes per second between the GPUs of one machine, each way.
        latency: seconds that one hop takes without data.
    """

    network: float
    gpus_per_machine: int = 8
    inside: float = 200e9
    latency: float = 20e-6


def all_reduce_seconds(num_bytes: float, num_gpus: int, cluster: Cluster) -> float:
    """Time in which all processes get the sum of their gradients.

    Every process sends and receives 2 (n - 1) / n times the gradients (Patarasuk and Yuan, 2009: no
    all-reduce needs fewer). Within one machine they pass between its GPUs; of several machines, the
    network of each is passed once, as NCCL orders its rings and trees. Each bucket of gradients
    takes 2 log2(n) hops besides, as in NCCL's double binary tree.

    Args:
        num_bytes: of all gradients of one process.
        num_gpus: n, all processes together, 1 or more.
        cluster: what they are joined by.
    """
    bandwidth = cluster.inside
    if num_gpus > cluster.gpus_per_machine:
        bandwidth = min(bandwidth, cluster.network)
    hops = 2 * math.log2(num_gpus) * math.ceil(num_bytes / BUCKET_BYTES)
    return 2 * (num_gpus - 1) / num_gpus * num_bytes / bandwidth + hops * cluster.latency


def scaling_efficiency(
    step: float, num_bytes: float, num_gpus: int, cluster: Cluster, slowest: float = 1.0
) -> float:
    """Pictures per second and GPU of n GPUs, as a share of those of one GPU.

    Gradients are summed while the backward pass goes on, all but the last bucket, which is ready
    only at its end; what does not fit behind it is waited for. The next step begins when the
    slowest process is done.

    Args:
        step: seconds of a step of one GPU alone.
        num_bytes: of all gradients.
        num_gpus: n, 1 or more.
        cluster: what the GPUs are joined by.
        slowest: time of the slowest process's step, as a multiple of the mean; 1 where all have
            pictures of one size.
    """
    if num_gpus == 1:
        return 1.0
    everything = all_reduce_seconds(num_bytes, num_gpus, cluster)
    last_bucket = all_reduce_seconds(min(num_bytes, BUCKET_BYTES), num_gpus, cluster)
    waited_for = max(last_bucket, everything - BACKWARD_SHARE * slowest * step)
    return step / (slowest * step + waited_for)
