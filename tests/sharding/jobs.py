"""What the processes of the tests do: each function is called with its rank, the number of processes, and a folder."""

from __future__ import annotations

import itertools
import logging.handlers
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_lowmem_optim import LDAdam, MicroAdam, SparseMFAC
from hf_lowmem_optim.engine import adamw
from hf_lowmem_optim.engine.sharding import layout
from hf_lowmem_optim.engine.sharding.layout import Split, split_of
from hf_lowmem_optim.engine.sharding.paths import path_of_shape
from hf_lowmem_optim.engine.sharding.traffic import StepTraffic, step_traffic
from hf_lowmem_optim.memory.measure import measure_state
from hf_lowmem_optim.memory.plan import plan_groups
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import CASES, MIN_QUANTIZED, SHAPES, VARIANTS, Case, gradients, make_params, through_a_file
from tests.sharding.counting import counted

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SHARDABLE = {
    name: case
    for name, case in {**CASES, **VARIANTS}.items()
    if not (case.layerwise or case.takes_gradients or case.method.replicated)
}
#: Half-precision weights, rounded at random: the draws depend on an entry's place in the whole.
SHARDABLE["ldadam rounding"] = replace(
    CASES["ldadam"], hyper={**CASES["ldadam"].hyper, "weight_rounding": "stochastic"}, other={}
)
SHARDABLE["lowrank_mfac each its own"] = replace(
    CASES["lowrank_mfac"], hyper={**CASES["lowrank_mfac"].hyper, "scope": "tensor"}, other={}
)
#: Shapes of which two and four processes have whole blocks; and one of which they have not. For the kernel of the
#: convolution four processes would send more in stages than at once.
EVEN = {
    "wide": (32, 96),
    "tall": (64, 34),  # of 34 four processes have unequal parts
    "square": (32, 32),
    "conv": (16, 4, 4, 4),
    "experts": (4, 16, 12),
    "vector": (256,),
    "odd": (9, 30),
}
for name in ("microadam", "sparse_mfac", "sparse_ggt", "ldadam", "ldadam stacked"):
    SHARDABLE[f"{name} even"] = replace(SHARDABLE[name], hyper={**SHARDABLE[name].hyper}, other={})
SHARDABLE["ldadam even"].hyper["error_feedback"] = "fp32"
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
        self.start = {name: whole(param).clone() for name, param in params.items()}
        for name, param in params.items():
            self.register_parameter(name, nn.Parameter(param))


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "rounding" in name else torch.float32


Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(name: str) -> Shapes:
    return EVEN if name.endswith(" even") else SHAPES


def placed(value: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """Shard a tensor that is the same on all processes, where it has such dimensions."""
    there = [p if getattr(p, "dim", -1) < value.dim() else Replicate() for p in placements]
    return distribute_tensor(value, mesh, there)


def build(
    case: Case,
    dtype: torch.dtype,
    mesh: DeviceMesh | None,
    placements: Sequence[Any] = (Shard(0),),
    *,
    shapes: Shapes = SHAPES,
) -> tuple[Model, LowMemoryOptimizer]:
    """Build the model and its optimizer: sharded, or plain without a mesh."""
    adamw._MIN_QUANTIZED_ENTRIES = MIN_QUANTIZED
    values = {key: param.detach() for key, param in make_params(dtype, shapes=shapes).items()}
    if mesh is not None:
        values = {key: placed(value, mesh, placements) for key, value in values.items()}
    model = Model(values)
    return model, case.build(model.named_parameters())


def train(model: Model, optimizer: LowMemoryOptimizer, steps: Iterator[tuple[int, dict[str, Tensor]]]) -> None:
    for step, grads in steps:
        for key, param in model.named_parameters():
            if step in ABSENT and key in ("wide", "vector"):
                param.grad = None
            elif isinstance(param, DTensor):
                param.grad = placed(grads[key], param.device_mesh, param.placements)
            else:
                param.grad = grads[key].clone()
        optimizer.step()


def steps_of(
    dtype: torch.dtype, first: int, last: int, shapes: Shapes = SHAPES
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    return iter(list(enumerate(gradients(last, dtype, shapes=shapes)))[first:])


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def in_stages(param: Any, optimizer: LowMemoryOptimizer, also: Sequence[Split] = ()) -> bool:
    """Whether a parameter is, or was by others, updated in stages, so that it is rounded otherwise."""
    method, splits = optimizer.method, [split_of(param), *also] if isinstance(param, DTensor) else also
    options = method.options_of(optimizer.param_groups[0])
    return any(path_of_shape(method, options, param.shape, param.dtype, each) == "collective" for each in splits)


def assert_same_weights(
    model: Model, wanted: Mapping[str, Tensor], optimizer: LowMemoryOptimizer, what: str, also: Sequence[Split] = ()
) -> None:
    """Compressed tensors to the bit; AdamW's kernel rounds the last entries of a tensor in another way.

    What was updated in stages is the same but for rounding, which a flipped code of an error of 4 bits makes visible.
    """
    group = optimizer.param_groups[0]
    for key, param in model.named_parameters():
        value = whole(param.detach())
        if not optimizer.method.compresses(param.shape, group):
            torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)
        elif in_stages(param, optimizer, also):
            off = (value - wanted[key]).norm() / (wanted[key] - model.start[key]).norm()
            assert off <= (1e-4 if group["error_feedback"] == "fp32" else 2e-2), f"{what}: {key} is off by {off}"
        else:
            assert torch.equal(value, wanted[key]), f"{what}: {key} differs by {(value - wanted[key]).abs().max()}"


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
            compressed = optimizer.method.compresses(param.shape, optimizer.param_groups[0])
            if compressed and not in_stages(param, optimizer):
                torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)


def assert_same_everywhere(optimizer: LowMemoryOptimizer, world: int) -> None:
    """What every process has is the same on all of them, to the bit."""
    copies = [
        value.to_local() if isinstance(value, DTensor) else value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and not any(hasattr(p, "dim") for p in getattr(value, "placements", ()))
    ]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, [copy.reshape(-1).view(torch.uint8).tolist() for copy in copies])
    assert all(each == found[0] for each in found)


def save(rank: int, world: int, folder: Path) -> list[str]:
    """Train each optimizer, sharded and plain, compare, and save: parts, and the whole in one file."""
    mesh = init_device_mesh("cpu", (world,))
    for name in available():
        case, dtype, shapes = SHARDABLE[name], dtype_of(name), shapes_of(name)
        model, optimizer = build(case, dtype, mesh, shapes=shapes)
        plain, alone = build(case, dtype, None, shapes=shapes)
        # what wrappers do to a fresh optimizer
        get_optimizer_state_dict(model, optimizer)
        for each in ((model, optimizer), (plain, alone)):
            train(*each, steps_of(dtype, 0, BEFORE, shapes))
        assert_same_weights(model, dict(plain.named_parameters()), alone, name)
        assert_same_state(model, optimizer, plain, alone)
        planned = plan_groups(type(optimizer), optimizer.param_groups, num_shards=world, rank=rank)
        measured = measure_state(optimizer, local=True)
        assert (planned.component_bytes, planned.dtype_bytes) == (measured.component_bytes, measured.dtype_bytes), name
        parts = {"optimizer": get_optimizer_state_dict(model, optimizer), "model": get_model_state_dict(model)}
        dcp.save(parts, checkpoint_id=folder / name / "parts")
        full = get_optimizer_state_dict(model, optimizer, options=FULL)
        if rank == 0:
            # one process alone: that would hang if anything were exchanged
            optimizer.load_state_dict(optimizer.state_dict())
            torch.save(full, folder / name / "full.pt")
            torch.save(alone.state_dict(), folder / name / "plain.pt")
        for each in ((model, optimizer), (plain, alone)):
            train(*each, steps_of(dtype, BEFORE, BEFORE + AFTER, shapes))
        assert_same_weights(model, dict(plain.named_parameters()), alone, name)
        assert_same_everywhere(optimizer, world)
        ends = {key: whole(param.detach()) for key, param in model.named_parameters()}
        if rank == 0:
            torch.save((plain.state_dict(), ends), folder / name / "wanted.pt")
    return available()


def sources_of(name: str, world: int) -> tuple[str, ...]:
    """Return from what a case is resumed; everything is tried by one process, and by more whatever differs there."""
    if name.endswith(" even") and world != 2:
        # one process sends nothing, whatever the shapes: only what was updated in stages is other than from one process
        tried: dict[tuple[str, int], tuple[str, ...]] = {
            ("ldadam even", 1): ("parts",),
            ("ldadam even", 4): ("parts", "plain"),
            ("sparse_mfac even", 4): ("parts", "full"),
            ("microadam even", 4): ("plain",),
        }
        return tried.get((name, world), ())
    if world == 1:
        return ("parts", "full", "plain") if name in CASES else ("parts",)
    return ("parts",)


def resumed(world: int) -> list[str]:
    """Return the cases that so many processes resume."""
    return [name for name in available() if sources_of(name, world)]


def resume(rank: int, world: int, folder: Path) -> list[str]:
    """Go on from parts, from the whole, and from what a plain process saved; another number of processes may do it."""
    mesh = init_device_mesh("cpu", (world,))
    for name in resumed(world):
        case, dtype, shapes = SHARDABLE[name], dtype_of(name), shapes_of(name)
        wanted, ends = torch.load(folder / name / "wanted.pt", weights_only=True)
        for source in sources_of(name, world):
            model, optimizer = build(case, dtype, mesh, shapes=shapes)
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
            train(model, optimizer, steps_of(dtype, BEFORE, BEFORE + AFTER, shapes))
            assert_same_weights(model, wanted, optimizer, f"{name} from {source}, {world} processes", [Split(2)])
            # as many processes compute the same, to the bit
            assert world != 2 or all(torch.equal(whole(p.detach()), ends[key]) for key, p in model.named_parameters())
    return resumed(world)


def resume_plain(rank: int, world: int, folder: Path) -> list[str]:
    """Go on in one process without a mesh, from the whole that several processes saved."""
    for name in resumed(world):
        case, dtype, shapes = SHARDABLE[name], dtype_of(name), shapes_of(name)
        model, optimizer = build(case, dtype, None, shapes=shapes)
        saved = {"model": get_model_state_dict(model)}
        dcp.load(saved, checkpoint_id=folder / name / "parts")
        set_model_state_dict(model, saved["model"])
        full = torch.load(folder / name / "full.pt", weights_only=True)
        set_optimizer_state_dict(model, optimizer, full, options=FULL)
        train(model, optimizer, steps_of(dtype, BEFORE, BEFORE + AFTER, shapes))
        wanted, _ = torch.load(folder / name / "wanted.pt", weights_only=True)
        assert_same_weights(model, wanted, optimizer, name, [Split(2)])
    return resumed(world)


#: Of four processes: two replicas of two; by columns; by rows and columns.
PLACEMENTS: list[tuple[tuple[int, ...], list[Any]]] = [
    ((2, 2), [Replicate(), Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),
]


def placements(rank: int, world: int, folder: Path) -> int:
    """Train with every kind of placement; without communication the state is what one process has."""
    for (sizes, kinds), name in itertools.product(PLACEMENTS, ("ldadam even", "microadam", "lowrank_mfac")):
        mesh, case, shapes = init_device_mesh("cpu", sizes), SHARDABLE[name], shapes_of(name)
        sharded = build(case, torch.float32, mesh, kinds, shapes=shapes)
        plain = build(case, torch.float32, None, shapes=shapes)
        for each in (sharded, plain):
            train(*each, steps_of(torch.float32, 0, 4, shapes))
        what = f"{name} with {kinds}"
        assert_same_weights(sharded[0], dict(plain[0].named_parameters()), sharded[1], what)
        assert_same_state(*sharded, *plain)
    # fewer tensors than processes: some compute nothing, and have what belongs to all nevertheless; and replicas of
    # parts, of which each counts once
    for sizes, kinds, shapes in (
        ((world,), [Shard(0)], {"tall": (40, 12), "square": (18, 16)}),
        ((2, world // 2), [Replicate(), Shard(0)], EVEN),
    ):
        mesh, case = init_device_mesh("cpu", sizes), CASES["sparse_mfac"]
        sharded = build(case, torch.float32, mesh, kinds, shapes=shapes)
        plain = build(case, torch.float32, None, shapes=shapes)
        for each in (sharded, plain):
            train(*each, steps_of(torch.float32, 0, 4, shapes))
        assert_same_weights(sharded[0], dict(plain[0].named_parameters()), sharded[1], "few")
        assert_same_state(*sharded, *plain)
    return world


class TwoLayers(nn.Module):
    """A model that torch's own functions shard."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


def tensor_parallel(rank: int, world: int, folder: Path) -> int:
    """FSDP2 splits what tensor parallelism has split: rows of rows, in the reverse order of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, plain = TwoLayers(), TwoLayers()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    # older gloo (torch 2.8) adds up where it is told to average
    model.set_force_sum_reduction_for_comms(True)
    up = model.up.weight
    assert isinstance(up, DTensor) and hasattr(up.placements[0], "split_factor")
    hyper = {"lr": 1e-2, "rank": 4}
    optimizer, alone = LDAdam(model.parameters(), **hyper), LDAdam(plain.parameters(), **hyper)
    for step in range(4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for each, of_each in ((model, optimizer), (plain, alone)):
            of_each.zero_grad()
            (each(x) - x.flip(1)).square().mean().backward()
        for param, other in zip(model.parameters(), plain.parameters(), strict=True):
            # the processes add up in another order
            torch.testing.assert_close(param.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-6)
            other.grad = param.grad.full_tensor()
        for each_optimizer in (optimizer, alone):
            each_optimizer.step()
        for param, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(param.full_tensor(), other.detach(), rtol=0, atol=0 if param.dim() > 1 else 1e-6)
    return world


def fsdp2(rank: int, world: int, folder: Path) -> int:
    """Train a model that FSDP2 shards, with clipping; save and load as one flat dict, torchtitan's way.

    The processes have different data: one process that has all of it trains the same but for rounding.
    """
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    methods: tuple[tuple[Any, dict[str, Any], float], ...] = (
        (LDAdam, {"rank": 4, "error_feedback": "fp32"}, 1e-4),
        (SparseMFAC, {"density": 0.1, "block_size": 64}, 1e-3),
        (MicroAdam, {"density": 0.1, "block_size": 64, "min_compress_size": 64}, 1e-2),
    )
    for optimizer_class, hyper, limit in methods:
        ends, start = [], list(TwoLayers().parameters())
        for stop in (None, 3, "alone"):
            model = TwoLayers()
            if stop != "alone":
                fully_shard(model)
            optimizer = optimizer_class(model.parameters(), lr=1e-3, **hyper)
            for step in range(6):
                if step == stop:
                    parts = {"optimizer": get_optimizer_state_dict(model, optimizer, options=flat)}
                    dcp.save(parts, checkpoint_id=folder / "flat" / optimizer_class.__name__)
                    optimizer = optimizer_class(model.parameters(), lr=1e-3, **hyper)
                    parts = {"optimizer": get_optimizer_state_dict(model, optimizer, options=flat)}
                    dcp.load(parts, checkpoint_id=folder / "flat" / optimizer_class.__name__)
                    set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=flat)
                seeds = [10 * step + each for each in range(world)]
                data = [torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
                x = torch.cat(data) if stop == "alone" else data[rank]
                (model(x) - x.flip(1)).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            ends.append([whole(param.detach()) for param in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*ends[:2], strict=True))
        for a, b, before in zip(ends[0], ends[2], start, strict=True):
            off = float((a - b).norm() / (b - before).norm())
            assert off <= limit, f"{optimizer_class.__name__}: {tuple(a.shape)} is off by {off}"
    return world


def awkward(rank: int, world: int, folder: Path) -> list[list[int]]:
    """Gradients without, or nearly without, r directions, too large for squares, or not finite on one process.

    Whatever one process does with them, several do as well; return how often each gathered.
    """
    mesh, shapes, found = init_device_mesh("cpu", (world,)), {"wide": (32, 96), "tall": (96, 32)}, []
    generator = torch.Generator().manual_seed(0)
    noise = {key: torch.randn(4, *shape, generator=generator) for key, shape in shapes.items()}
    for kind in ("zero", "of rank one", "huge", "not finite"):
        (model, optimizer), (plain, alone) = (
            build(SHARDABLE["ldadam even"], torch.float32, each, shapes=shapes) for each in (mesh, None)
        )
        gathered = []
        for step in range(4):
            grads = {key: value[step].clone() for key, value in noise.items()}
            for value in grads.values():
                if kind == "zero":
                    value.zero_()
                elif kind == "of rank one":
                    value.copy_(torch.outer(value[:, 0], value[0]))
                elif kind == "huge":
                    value.mul_(1e30)
                elif step == 2:
                    value[0, 1] = torch.nan
            with counted() as counts:
                train(model, optimizer, iter([(3, grads)]))
            gathered.append(counts.calls["all_to_all_single"])
            train(plain, alone, iter([(3, grads)]))
        for (key, param), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
            value, start = whole(param.detach()), model.start[key]
            assert torch.equal(value.isfinite(), wanted.isfinite()), (kind, key)
            off, moved = ((value - other).nan_to_num().norm() for other in (wanted, start))
            # what is not gathered adds up its noise in another order, in directions that the gradient does not have
            assert off <= 1e-4 * moved or (kind, key) == ("of rank one", "tall"), f"{kind}: {key}, {off} of {moved}"
        found.append(gathered)
    return found


def misaligned(rank: int, world: int, folder: Path) -> list[str]:
    """Return what is logged in some steps of tensors of which no process has whole blocks, or as many rows."""
    layout._HAS_GAPS = True
    mesh, told = init_device_mesh("cpu", (world,)), logging.handlers.QueueHandler(queue.SimpleQueue())
    logging.getLogger("hf_lowmem_optim").addHandler(told)
    params = [nn.Parameter(placed(torch.ones(shape), mesh, [Shard(0)])) for shape in ((6, 64), (6, 64), (7, 64))]
    optimizer = CASES["microadam"].build(params, block_size=128, quant_block_size=32, value_dtype="bf16")
    for _ in range(3):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    return [told.queue.get().getMessage() for _ in range(told.queue.qsize())]


def traffic(rank: int, world: int, folder: Path) -> dict[str, tuple[dict[str, int], int, StepTraffic]]:
    """Return calls by kind, bytes that went to other processes, and what is planned of a step after the first."""
    mesh, found = init_device_mesh("cpu", (world,)), {}
    for name in ("ldadam", "sparse_mfac", "microadam", "lowrank_mfac", "trion"):
        shapes, generator = ((64, 96), (64, 96), (96, 64)), torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        params = [nn.Parameter(placed(value, mesh, [Shard(0)])) for value in values]
        optimizer = CASES[name].build(params)
        for _ in range(2):
            for param in params:
                param.grad = param.detach().clone()
            with counted() as counts:
                optimizer.step()
        here, state = measure_state(optimizer, local=True).total_bytes, measure_state(optimizer).total_bytes
        # but for constants, which every process has
        assert here <= 0.52 * state or optimizer.method.constants is not None, name
        found[name] = dict(counts.calls), counts.nbytes, step_traffic(optimizer.method, optimizer.param_groups, world)
    return found


def refused(rank: int, world: int, folder: Path) -> int:
    """What is not served is refused before anything changes."""
    mesh = init_device_mesh("cpu", (world,))

    def expect(error: type[Exception], match: str, model: Model, optimizer: LowMemoryOptimizer) -> None:
        before = [whole(param.detach()).clone() for param in model.parameters()]
        with pytest.raises(error, match=match):
            train(model, optimizer, steps_of(torch.float32, 0, 1))
        assert all(torch.equal(whole(p.detach()), b) for p, b in zip(model.parameters(), before, strict=True))
        assert not any(state["step"] for state in optimizer.state.values())

    # hooks do not survive: accelerate puts other parameters into the groups
    model, optimizer = build(CASES["ldadam error in gradient"], torch.float32, None)
    model = Model({key: placed(param.detach(), mesh, [Shard(0)]) for key, param in model.named_parameters()})
    optimizer.remove_hooks()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    expect(NotImplementedError, "error_feedback='grad'", model, optimizer)
    model, _ = build(CASES["sparse_mfac"], torch.float32, mesh)
    model.register_parameter("plain", nn.Parameter(torch.ones(4, 4)))
    optimizer = CASES["sparse_mfac"].build(model.parameters())
    model.plain.grad = torch.ones(4, 4)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(NotImplementedError, match=r"some are not sharded\. Give it scope='tensor'"):
        optimizer.step()
    model, optimizer = build(CASES["ldadam"], torch.float32, mesh)
    model.wide.grad = torch.ones(12, 40)
    with pytest.raises(RuntimeError, match=r"sharded \(DTensor\), and its gradient is not"):
        optimizer.step()
    # parts for a plain parameter, and indices beyond their blocks
    model, optimizer = build(CASES["microadam"], torch.float32, mesh)
    train(model, optimizer, steps_of(torch.float32, 0, 2))
    _, plain = build(CASES["microadam"], torch.float32, None)
    with pytest.raises(ValueError, match="one process's part of it, and the parameter is not sharded"):
        plain.load_state_dict(optimizer.state_dict())
    # one process's part in a file of its own
    with pytest.raises(ValueError, match=r"not this process's part: load it by torch\.distributed\.checkpoint"):
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    saved = optimizer.state_dict()
    saved["state"][0]["indices"].to_local().fill_(255)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"the state that was loaded for a tensor of shape .* is damaged: 'indices'"):
        train(model, optimizer, steps_of(torch.float32, 3, 4))
    return world


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
