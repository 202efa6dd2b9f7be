"""What the processes of the tests do: each function is called with its rank, the number of processes, and a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_lowmem_optim import IOBSPruner, SparseMFAC


def replicas(rank: int, world: int, folder: Path) -> list[Tensor]:
    """Prune under DDP, with other data in each process; return the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    parallel = DistributedDataParallel(model)
    optimizer = SparseMFAC(model.parameters(), lr=1e-2, window=8, density=0.5, damping=1e-2)
    pruner = IOBSPruner(optimizer, sparsity=0.7, begin=2, end=8, every=3, saliency="obs")
    for step in range(9):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        (parallel(x) - torch.sin(3 * x[:, :8])).square().mean().backward()
        optimizer.step()
        pruner.step()
    return [p.detach() for p in model.parameters()]


def sharded(rank: int, world: int, folder: Path) -> None:
    """Refuse what is in shards."""
    mesh = init_device_mesh("cpu", (world,))
    param = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))
    with pytest.raises(NotImplementedError, match="is sharded"):
        IOBSPruner(torch.optim.AdamW([param]), correction=False)
