"""What the processes of the tests do: each function is called with its rank, the number of processes, and a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_lowmem_optim import LDAdam
from hf_lowmem_optim.engine import adamw
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import CASES, MIN_QUANTIZED, SHAPES, VARIANTS, Case, gradients, make_params

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SHARDABLE = {n: c for n, c in {**CASES, **VARIANTS}.items() if not (c.layerwise or c.takes_gradients)}
#: Half-precision weights, rounded at random: the draws depend on an entry's place in the whole.
SHARDABLE["ldadam rounding"] = replace(
    CASES["ldadam"], hyper={**CASES["ldadam"].hyper, "weight_rounding": "stochastic"}, other={}
)
SHARDABLE["lowrank_mfac each its own"] = replace(
    CASES["lowrank_mfac"], hyper={**CASES["lowrank_mfac"].hyper, "scope": "tensor"}, other={}
)
BEFORE, AFTER = 5, 4
#: Steps in which two tensors have no gradient.
ABSENT = (2, 6)


def available() -> list[str]:
    """Return the cases that this environment can run."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return [name for name in SHARDABLE if SHARDABLE[name].hyper.get("dense_state") != "8bit"]
    return list(SHARDABLE)


class Model(nn.Module):
    """Has the parameters of the tests under their names."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name, nn.Parameter(param))


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "rounding" in name else torch.float32


def placed(value: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """Shard a tensor that is the same on all processes; a scalar is on all of them."""
    return distribute_tensor(value, mesh, placements if value.dim() else [Replicate()] * mesh.ndim)


def build(
    case: Case, dtype: torch.dtype, mesh: DeviceMesh | None, placements: Sequence[Any] = (Shard(0),)
) -> tuple[Model, LowMemoryOptimizer]:
    """Build the model and its optimizer: sharded, or plain without a mesh."""
    adamw._MIN_QUANTIZED_ENTRIES = MIN_QUANTIZED
    values = {key: param.detach() for key, param in make_params(dtype).items()}
    if mesh is not None:
        values = {key: placed(value, mesh, placements) for key, value in values.items()}
    model = Model(values)
    return model, case.build(model.named_parameters())


def train(
    model: Model, optimizer: LowMemoryOptimizer, steps: Iterator[tuple[int, dict[str, Tensor]]]
) -> None:
    for step, grads in steps:
        for key, param in model.named_parameters():
            if step in ABSENT and key in ("wide", "vector"):
                param.grad = None
            elif isinstance(param, DTensor):
                param.grad = placed(grads[key], param.device_mesh, param.placements)
            else:
                param.grad = grads[key].clone()
        optimizer.step()


def steps_of(dtype: torch.dtype, first: int, last: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    return iter(list(enumerate(gradients(last, dtype)))[first:])


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_same_weights(model: Model, wanted: Mapping[str, Tensor], optimizer: LowMemoryOptimizer, what: str) -> None:
    """Compressed tensors to the bit; AdamW's kernel rounds the last entries of a tensor in another way."""
    group = optimizer.param_groups[0]
    for key, param in model.named_parameters():
        value = whole(param.detach())
        if optimizer.method.compresses(param.shape, group):
            assert torch.equal(value, wanted[key]), f"{what}: {key} differs by {(value - wanted[key]).abs().max()}"
        else:
            torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6, msg=lambda m: f"{what}: {key}: {m}")


def assert_same_state(model: Model, optimizer: LowMemoryOptimizer, plain: Model, other: LowMemoryOptimizer) -> None:
    """Global shapes, dtypes and bits of compressed tensors are those of one process, int16 as pairs of bytes."""
    for (key, param), (_, alone) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        state, expected = optimizer.state[param], other.state[alone]
        assert state.keys() == expected.keys(), key
        for name, want in expected.items():
            value = whole(state[name])
            if not isinstance(want, Tensor):
                assert value == want, (key, name)
                continue
            want = want.view(torch.uint8) if want.dtype == torch.int16 else want
            assert isinstance(state[name], DTensor) != name.startswith("shared_"), (key, name)
            assert (value.shape, value.dtype) == (want.shape, want.dtype), (key, name)
            if optimizer.method.compresses(param.shape, optimizer.param_groups[0]):
                torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)


def save(rank: int, world: int, folder: Path) -> list[str]:
    """Train each optimizer, sharded and plain, compare, and save: parts, and the whole in one file."""
    mesh = init_device_mesh("cpu", (world,))
    for name in available():
        case, dtype = SHARDABLE[name], dtype_of(name)
        model, optimizer = build(case, dtype, mesh)
        plain, alone = build(case, dtype, None)
        # what wrappers do to a fresh optimizer
        get_optimizer_state_dict(model, optimizer)
        for each in ((model, optimizer), (plain, alone)):
            train(*each, steps_of(dtype, 0, BEFORE))
        assert_same_weights(model, dict(plain.named_parameters()), alone, name)
        assert_same_state(model, optimizer, plain, alone)
        parts = {"optimizer": get_optimizer_state_dict(model, optimizer), "model": get_model_state_dict(model)}
        dcp.save(parts, checkpoint_id=folder / name / "parts")
        full = get_optimizer_state_dict(model, optimizer, options=FULL)
        if rank == 0:
            # one process alone: that would hang if anything were exchanged
            optimizer.load_state_dict(optimizer.state_dict())
            torch.save(full, folder / name / "full.pt")
            torch.save(alone.state_dict(), folder / name / "plain.pt")
        for each in ((model, optimizer), (plain, alone)):
            train(*each, steps_of(dtype, BEFORE, BEFORE + AFTER))
        assert_same_weights(model, dict(plain.named_parameters()), alone, name)
        if rank == 0:
            torch.save(plain.state_dict(), folder / name / "wanted.pt")
    return available()


def resume(rank: int, world: int, folder: Path) -> list[str]:
    """Go on from parts, from the whole, and from what a plain process saved; another number of processes may do it."""
    mesh = init_device_mesh("cpu", (world,))
    for name in available():
        case, dtype = SHARDABLE[name], dtype_of(name)
        wanted = torch.load(folder / name / "wanted.pt", weights_only=True)
        for source in ("parts", "full", "plain"):
            model, optimizer = build(case, dtype, mesh)
            saved: dict[str, Any] = {"model": get_model_state_dict(model)}
            if source == "parts":
                saved["optimizer"] = get_optimizer_state_dict(model, optimizer)
            dcp.load(saved, checkpoint_id=folder / name / "parts")
            set_model_state_dict(model, saved["model"])
            if source == "parts":
                set_optimizer_state_dict(model, optimizer, saved["optimizer"])
            elif source == "full":
                full = torch.load(folder / name / "full.pt", weights_only=True) if rank == 0 else {}
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_optimizer_state_dict(model, optimizer, full, options=options)
            else:
                optimizer.load_state_dict(torch.load(folder / name / "plain.pt", weights_only=True))
            train(model, optimizer, steps_of(dtype, BEFORE, BEFORE + AFTER))
            assert_same_weights(model, wanted, optimizer, f"{name} from {source}, {world} processes")
    return available()


def resume_plain(rank: int, world: int, folder: Path) -> list[str]:
    """Go on in one process without a mesh, from the whole that several processes saved."""
    for name in available():
        case, dtype = SHARDABLE[name], dtype_of(name)
        model, optimizer = build(case, dtype, None)
        saved = {"model": get_model_state_dict(model)}
        dcp.load(saved, checkpoint_id=folder / name / "parts")
        set_model_state_dict(model, saved["model"])
        full = torch.load(folder / name / "full.pt", weights_only=True)
        set_optimizer_state_dict(model, optimizer, full, options=FULL)
        train(model, optimizer, steps_of(dtype, BEFORE, BEFORE + AFTER))
        assert_same_weights(model, torch.load(folder / name / "wanted.pt", weights_only=True), optimizer, name)
    return available()


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
