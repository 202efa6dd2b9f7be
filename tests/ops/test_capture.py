"""A recorded step, replayed, is ``step()``: on a device that notes what it is given and repeats it, as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.engine import buckets, capture
from hf_lowmem_optim.engine.capture import CapturedStep
from hf_lowmem_optim.ops import gram, low_rank
from hf_lowmem_optim.ops.step_numbers import Formulas, argument, factor
from tests.ops.backends import EMULATED, INTERPRETED, QUIET, Use
from tests.ops.test_launches import WAITING
from tests.optimizers.cases import CASES

pytestmark = QUIET
triton = pytest.importorskip("triton")
if not (EMULATED or INTERPRETED):
    pytest.skip("records what the CPU does", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

#: What launches a kernel.
LAUNCH: tuple[type, str] = (JITFunction, "run") if EMULATED else (GridExecutor, "__call__")
#: Matrices of two shapes, of which one is tall and one is no multiple of a block; a convolution, vectors.
SHAPES = [(8, 32), (8, 32), (20, 7), (4, 3, 3, 3), (10,), (8,), (18, 19)]
SPARSE: dict[str, Any] = {"density": 0.1, "block_size": 64, "window": 2}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "microadam": ("microadam", {**SPARSE, "min_compress_size": 100}),
    "microadam alpha": ("microadam", {**SPARSE, "min_compress_size": 100, "alpha": 0.25, "value_dtype": "8bit"}),
    "microadam window": ("microadam", {**SPARSE, "min_compress_size": 100, "bias_correction": "window"}),
    "microadam looped": ("microadam", {**SPARSE, "min_compress_size": 100, "window": 17}),
    "sparse_mfac": ("sparse_mfac", SPARSE),
    "sparse_mfac momentum": ("sparse_mfac", {**SPARSE, "momentum": 0.5}),
    "sparse_mfac tensor": ("sparse_mfac", {**SPARSE, "scope": "tensor"}),
    "ldadam": ("ldadam", {"rank": 4}),
    "ldadam rank 17": ("ldadam", {"rank": 17, "error_feedback": "8bit"}),
    "ldadam none": ("ldadam", {"rank": 4, "error_feedback": "none", "dense_state": "fp32"}),
    "lowrank_mfac": ("lowrank_mfac", {"rank": 3, "window": 2}),
    "lowrank_mfac momentum": ("lowrank_mfac", {"rank": 3, "window": 2, "momentum": 0.5, "scope": "tensor"}),
}


class Recording(TorchDispatchMode):
    """Notes torch's operations and the launches of kernels instead of what they compute, to repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        assert not name.startswith(WAITING), f"{func} waits for the device"
        assert name != "lift_fresh", "numbers of the host, which a graph would read when they are gone"
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.actions.append(lambda: func(*args, **kwargs))
        elif not func.is_view and "empty" not in name:
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.actions.append(lambda: [a.copy_(b) for a, b in zip(made, tree_leaves(func(*args, **kwargs)))])
        return result

    def launch(self, original: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> None:
            self.actions.append(lambda: original(*args, **kwargs))

        return noted

    def replay(self) -> None:
        with torch.no_grad():
            for action in self.actions:
                action()


@pytest.fixture(autouse=True)
def device(use: Use, monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Have the CPU be taken for a GPU; returns the recordings that are made on it."""
    use("triton")
    monkeypatch.setattr(low_rank, "_READABLE", ())
    monkeypatch.setattr(gram, "_READABLE", ())
    monkeypatch.setattr(buckets, "_rounds_alike", lambda _: True)
    recordings: list[Recording] = []

    def graph_of(run: Callable[[], None], _: torch.device) -> Callable[[], None]:
        recording, (owner, name) = Recording(), LAUNCH
        before = [(part, part.clone()) for part in touched()]
        with pytest.MonkeyPatch.context() as patch, recording:
            patch.setattr(owner, name, recording.launch(getattr(owner, name)))
            run()
        with torch.no_grad():
            for part, was in before:  # recording computes nothing
                part.copy_(was)
        recordings.append(recording)
        return recording.replay

    monkeypatch.setattr(capture, "_graph_of", graph_of)
    return recordings


#: The optimizer at hand: what belongs to it is as it was after a recording.
CURRENT: list[Any] = []


def touched() -> Iterator[Tensor]:
    for state in CURRENT[-1].state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    yield from (param for group in CURRENT[-1].param_groups for param in group["params"])


class Twins:
    """An optimizer that takes its steps, and one that replays them."""

    def __init__(self, name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.params = [[nn.Parameter(value.to(dtype)) for value in values] for _ in range(2)]
        self.plain, self.recorded = (self.build(name, options, params) for params in self.params)
        CURRENT.append(self.recorded)
        self.step = CapturedStep(self.recorded)
        for param in self.params[1]:
            param.grad = torch.zeros_like(param)
        self.count = 0

    @staticmethod
    def build(name: str, options: dict[str, Any], params: list[nn.Parameter]) -> Any:
        """With a group that AdamW has."""
        cls = OPTIMIZERS[name].optimizer_class
        key, off = cls.method.switch
        groups = [{"params": params[1:]}, {"params": params[:1], key: off, "weight_decay": 0.25}]
        return cls(groups, lr=2**-6, weight_decay=0.125, **options)

    def take(self) -> None:
        """Take a step of both and compare them to the bit."""
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        for plain, recorded in zip(*self.params, strict=True):
            plain.grad = torch.randn(plain.shape, generator=generator).to(plain.dtype)
            assert recorded.grad is not None
            recorded.grad.copy_(plain.grad)
        for optimizer in (self.plain, self.recorded):
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] = 2.0 ** -(6 + number + self.count % 3)
        self.plain.step()
        self.step()
        for plain, recorded in zip(*self.params, strict=True):
            assert torch.equal(plain, recorded)
            mine, theirs = self.recorded.state[recorded], self.plain.state[plain]
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                same = torch.equal(mine[key], value) if isinstance(value, Tensor) else mine[key] == value
                assert same, (self.count, key)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_are_steps(name: str, dtype: torch.dtype, device: list[Recording]) -> None:
    twins = Twins(*SETTINGS[name], dtype)
    for _ in range(7):
        twins.take()
    assert twins.step.replays >= 3
