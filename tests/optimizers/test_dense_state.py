"""Storage of the dense rule's moments: against bitsandbytes' AdamW, and against torch's on float32 copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BertConfig, BertModel

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, plan_optimizer, plan_state
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import CASES, NEEDS_GPU, assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: More than one slice and no whole number of blocks; a short block; the least that is quantized; less; a scalar.
SHAPES = [(300, 333), (4097,), (64, 64), (63, 65), ()]
HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(num_steps: int, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        yield [(0.1 * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def dense(name: str, params: list[nn.Parameter], **hyper: Any) -> LowMemoryOptimizer:
    return CASES[name].build([{"params": params, CASES[name].dense_key: None, **HYPER, **hyper}])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_8_bit_is_bitsandbytes_to_the_bit(name: str, dtype: torch.dtype) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = weights(dtype), weights(dtype)
    optimizer, reference = dense(name, ours, dense_state="8bit"), optim.AdamW8bit(theirs, **HYPER)
    for grads in gradients(4, dtype):
        for group, each in ((ours, optimizer), (theirs, reference)):
            for param, grad in zip(group, grads, strict=True):
                param.grad = grad.clone()
            each.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        state, expected = dict(optimizer.state[mine]), reference.state[other]
        assert state.pop("step") == expected["step"] == 4
        names = ("state1", "absmax1", "state2", "absmax2") if len(state) == 4 else ("state1", "state2")
        assert (len(state) == 4) == (mine.numel() >= 4096)
        for found, key in zip(state.values(), names, strict=True):
            assert torch.equal(found.view(-1), expected[key].view(-1)), key
    assert plan_optimizer(optimizer).total_bytes == sum(
        sum(v.nbytes for k, v in state.items() if torch.is_tensor(v) and "qmap" not in k)
        for state in reference.state.values()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp32_is_torch_adamw_on_a_float32_copy_rounded_once(name: str, dtype: torch.dtype) -> None:
    ours = weights(dtype)
    copies = [nn.Parameter(param.detach().float()) for param in ours]
    optimizer, reference = dense(name, ours, dense_state="fp32"), torch.optim.AdamW(copies, fused=True, **HYPER)
    for grads in gradients(4, dtype):
        for param, copy, grad in zip(ours, copies, grads, strict=True):
            copy.data.copy_(param.data)
            param.grad, copy.grad = grad.clone(), grad.float()
        optimizer.step()
        reference.step()
        for param, copy in zip(ours, copies, strict=True):
            assert torch.equal(param, copy.to(dtype))
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[param][key], reference.state[copy][key])


def test_every_group_has_its_own() -> None:
    pytest.importorskip("bitsandbytes")
    params = weights(torch.bfloat16)
    kinds = ["8bit", "fp32", "param"]
    groups = [{"params": [param], "dense_state": kind} for param, kind in zip(params, kinds, strict=False)]
    optimizer = OPTIMIZERS["ldadam"].optimizer_class(groups, rank=None)
    for param, grad in zip(params, next(gradients(1, torch.bfloat16)), strict=True):
        param.grad = grad
    optimizer.step()
    found = [{v.dtype for v in optimizer.state[p].values() if torch.is_tensor(v)} for p in params[:3]]
    assert found == [{torch.uint8, torch.float32}, {torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_bitsandbytes_it_is_refused_when_built_but_can_be_planned(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    remedy = r"pip install 'hf-lowmem-optim\[bitsandbytes\]'"
    with pytest.raises(ImportError, match=remedy):
        dense(name, [nn.Parameter(torch.zeros(5000))], dense_state="8bit")
    optimizer = dense(name, [nn.Parameter(torch.zeros(5000))])
    with pytest.raises(ImportError, match=remedy):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(10))], "dense_state": "8bit"})
    planned = dense(name, [nn.Parameter(torch.zeros(5120, device="meta"))], dense_state="8bit")
    assert len(optimizer.param_groups) == 1
    assert plan_optimizer(planned).component_bytes == {"dense": 2 * 5120, "dense statistics": 2 * 4 * 20}
    report = plan_state(name, {"w": ((64, 80), torch.bfloat16)}, dense_state="8bit", **{CASES[name].dense_key: None})
    assert report.total_bytes == 2 * 5120 + 2 * 4 * 20


def test_a_bitsandbytes_without_the_operation_for_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.raises(ImportError, match="on the CPU needs a bitsandbytes"):
        dense("ldadam", [nn.Parameter(torch.zeros(5000))], dense_state="8bit")


@pytest.mark.parametrize("name", ["ldadam", "microadam"])
def test_minilm_takes_less_than_1_6_bytes_per_parameter(name: str) -> None:
    """The shapes of ``benchmarks/shapes.py``, where embeddings are most of the state."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    with torch.device("meta"):
        model = BertModel(BertConfig(**sizes))
    narrow, wide = (plan_optimizer(OptimizerFactory(name, dense_state=kind)(model)) for kind in ("8bit", "param"))
    assert narrow.total_bytes < 1.6 * narrow.num_parameters < 4 * wide.num_parameters < wide.total_bytes


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two processes of which this is one."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_compensated_weights_are_refused_sharded_before_anything_moves(mesh: DeviceMesh) -> None:
    whole = torch.ones(8, 4, dtype=torch.bfloat16)
    weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = OPTIMIZERS["ldadam"].optimizer_class([weight], rank=None, weight_rounding="compensated")
    weight.grad = torch.ones_like(weight)
    with pytest.raises(NotImplementedError, match="there is no weight_rounding='compensated'; give its group weight"):
        optimizer.step()
    assert torch.equal(weight.to_local(), whole[:4]) and not optimizer.state


@pytest.mark.parametrize("setting", [{"rank": 4}, {"rank": None, "weight_rounding": "stochastic"}], ids=str)
def test_what_no_process_can_gather_is_refused_before_anything_moves(setting: dict[str, Any]) -> None:
    """Parts along two dimensions of a mesh that leaves processes out; each rule entry by entry has no such limit."""
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh, whole = DeviceMesh("cpu", torch.arange(4).view(2, 2)), torch.ones(16, 12, dtype=torch.bfloat16)
        weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), Shard(1)]))
        optimizer = OPTIMIZERS["ldadam"].optimizer_class([weight], **setting)
        weight.grad = torch.ones_like(weight)
        with pytest.raises(NotImplementedError, match=r"several dimensions of a mesh .* Give its group rank=None, "):
            optimizer.step()
        assert torch.equal(weight.to_local(), whole[:8, :6]) and not optimizer.state
        OPTIMIZERS["ldadam"].optimizer_class([weight], lr=0.1, rank=None, dense_state="fp32").step()
        assert not torch.equal(weight.to_local(), whole[:8, :6])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["ldadam", "sparse_mfac"])
def test_a_sharded_dense_parameter_has_sharded_state(name: str, mesh: DeviceMesh) -> None:
    """Each process updates its part, as one that has nothing but that part."""
    whole = torch.ones(8, 4)
    weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    part = nn.Parameter(whole[:4].clone())
    optimizer, alone = (dense(name, [param]) for param in (weight, part))
    for grad in (torch.arange(32.0).view(8, 4), torch.ones(8, 4)):
        weight.grad, part.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad[:4].clone()
        for each in (optimizer, alone):
            each.step()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[weight][key]
        assert isinstance(moment, DTensor)
        assert torch.equal(moment.to_local(), alone.state[part][key])
    assert torch.equal(weight.to_local(), part)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=NEEDS_GPU, id=str(dtype)) for dtype in DTYPES])
def test_8_bit_is_bitsandbytes_on_a_gpu_and_on_a_stream_of_ones_own(dtype: torch.dtype) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), None):
        params = [nn.Parameter(param.detach().cuda()) for param in weights(dtype)]
        optimizer = optim.AdamW8bit(params, **HYPER) if stream is None else dense("ldadam", params, dense_state="8bit")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for grads in gradients(4, dtype):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.cuda()
                optimizer.step()
        torch.cuda.synchronize()
        results.append(params)
    for other in results[1:]:
        assert_equal(results[0], other)
