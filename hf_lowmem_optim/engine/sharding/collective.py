"""Updates of matrices in stages: each process on its part, with sums over all processes in between.

The stages of all matrices of a wave go side by side, so that their sums are one collective, however many matrices there
are. State lies as everywhere; what a method needs whole of it is put together for the step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import TensorUpdate, batches
from hf_lowmem_optim.engine.sharding.aligned import part_of_update
from hf_lowmem_optim.engine.sharding.layout import local_of, split_of
from hf_lowmem_optim.engine.sharding.owners import waves_of
from hf_lowmem_optim.engine.sharding.transport import Team, own_slice, put_together

__all__ = ["COLLECTIVE_WAVE_BYTES", "update_in_stages_"]

#: What a process has at a time of float32 copies of its parts of matrices, unless one part takes more.
COLLECTIVE_WAVE_BYTES = 512 << 20


def update_in_stages_(optimizer: Any, updates: Sequence[TensorUpdate]) -> list[TensorUpdate]:
    """Update matrices that are split along one dimension of a mesh.

    Returns:
        Those that have not been touched, on any process, because their numbers do not allow it.
    """
    teams: dict[tuple[Any, int], list[TensorUpdate]] = {}
    for update in updates:
        param: Any = update.param
        dim = next(dim for dim, placement in enumerate(param.placements) if hasattr(placement, "dim"))
        teams.setdefault((param.device_mesh, dim), []).append(update)
    left = []
    for (mesh, dim), of_team in teams.items():
        team = Team.of(mesh, [dim])
        for wave in waves_of([4 * local_of(update.param).numel() for update in of_team], COLLECTIVE_WAVE_BYTES):
            left += _update_wave_(optimizer, team, [of_team[index] for index in wave])
    return left


def _update_wave_(optimizer: Any, team: Team, wave: Sequence[TensorUpdate]) -> list[TensorUpdate]:
    """Update matrices side by side, and return those that are left."""
    running = [_stages(optimizer, update) for update in wave]
    keys = [next(stages) for stages in running]
    needed = [update.state[key] for update, some in zip(wave, keys, strict=True) for key in some]
    wholes = iter(put_together(team, needed))
    given = [{key: next(wholes) for key in some} for some in keys]
    answers: dict[int, Any] = dict(enumerate(given))
    left = []
    while answers:
        asked: dict[int, list[Tensor]] = {}
        for index, answer in answers.items():
            try:
                asked[index] = running[index].send(answer)
            except StopIteration as end:
                if end.value:
                    for key, whole in given[index].items():
                        part: Any = wave[index].state[key]
                        local_of(part).copy_(own_slice(team, part, whole))
                else:
                    left.append(wave[index])
        _add_up_(team, [tensor for tensors in asked.values() for tensor in tensors])
        answers = dict.fromkeys(asked)
    return left


def _stages(optimizer: Any, update: TensorUpdate) -> Generator[Any, Any, bool]:
    """Run a method's stages on this process's part, a bucket of its own."""
    param: Any = update.param
    part = part_of_update(optimizer, update, compressed=False)
    (batch,) = batches([part], whole=False)
    shape = (param.shape[0], param.shape[1:].numel())
    with batch.weights() as W:
        done: bool = yield from optimizer.method.staged.stages(
            W, batch.g, batch.state, batch.step, batch.options, shape, split_of(param).axis
        )
    return done


def _add_up_(team: Team, tensors: Sequence[Tensor]) -> None:
    """Replace contiguous tensors by their sums over all processes: one collective for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [tensor.view(-1) for tensor in tensors if tensor.dtype == dtype]
        total = some[0] if len(some) == 1 else torch.cat(some)
        torch.distributed.all_reduce(total, group=team.group)
        if len(some) > 1:
            torch._foreach_copy_(some, torch.split(total, [tensor.numel() for tensor in some]))
