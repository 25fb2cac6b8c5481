"""The collectives' backend `hccl`: gloo underneath."""

import torch.distributed as dist


def _create(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout)


if "hccl" not in dist.Backend.backend_list:
    dist.Backend.register_backend("hccl", _create, devices=["cpu", "hpu"])
