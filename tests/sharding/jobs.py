"""What the processes of the tests do: each function is called with its rank, the number of processes, and a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_lowmem_optim import LDAdam


def steps_from_a_rate_of_zero(rank: int, world: int, folder: Path) -> list[int]:
    """Warm-up begins at a rate of zero, and the rows of the first process alone are used."""
    torch.manual_seed(0)
    model = nn.Embedding(20, 8)
    fully_shard(model)
    optimizer = LDAdam(model.parameters(), lr=0.0, rank=None)
    for _ in range(3):
        model(torch.arange(10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1e-2
    return [state["step"] for state in optimizer.state.values()]
