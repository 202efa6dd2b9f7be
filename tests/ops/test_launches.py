"""What a step of a whole model launches: as much for many layers as for few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.engine import buckets
from hf_lowmem_optim.ops import gram, low_rank
from hf_lowmem_optim.optimizers import lowrank_mfac
from tests.ops.backends import EMULATED, INTERPRETED, QUIET, WAITING, Use
from tests.optimizers.cases import CASES, gradients, make_params, run

pytestmark = QUIET
triton = pytest.importorskip("triton")
if EMULATED or not INTERPRETED:
    pytest.skip("counts in the interpreter", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor  # noqa: E402

SPARSE: dict[str, Any] = {"window": 3, "block_size": 64, "density": 0.1}
#: Options, and the kernels of a step at most.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "microadam": ({**SPARSE, "min_compress_size": 100}, 6),
    "sparse_mfac": (SPARSE, 10),
    "sparse_ggt": (SPARSE, 10),
}


class Operations(TorchDispatchMode):
    """Counts torch's operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.largest = 0  # bytes of a result that is no argument's memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "prim":
            self.found[str(func)] += 1
        result = func(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.data_ptr() not in given]
        if not func.is_view:
            self.largest = max([self.largest, *[each.nbytes for each in made]])
        return result

    def waiting(self) -> Counter[str]:
        """Those of a kind that waits."""
        return Counter({name: n for name, n in self.found.items() if name.split(".")[1].startswith(WAITING)})


@contextmanager
def kernels() -> Iterator[list[str]]:
    """Note the name of every kernel that is launched, instead of running it."""
    found: list[str] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self.fn.__name__)
        if found[-1] == "_sum_kernel":  # what it writes decides how the system is solved
            args[2].fill_(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", call)
        yield found


def llama(layers: int, dtype: torch.dtype, unit: int = 8) -> list[nn.Parameter]:
    """The parameters of a tiny one: keys of fewer heads, norms, embedding and head; sizes are multiples of a unit."""
    layer = [(2, 2), (1, 2), (1, 2), (2, 2), (3, 2), (3, 2), (2, 3), (2,), (2,)]
    shapes = [[unit * size for size in shape] for shape in [(5, 2), *layer * layers, (2,), (5, 2)]]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def is_fused(launched: Sequence[str]) -> bool:
    """Whether a quantized error has no kernels of its own."""
    return not any("quantize" in name for name in launched)


def step(optimizer: Any, weights: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "scope"),
    [*[(name, {}) for name in METHODS], *[(name, {"scope": "tensor"}) for name in ("sparse_mfac", "sparse_ggt")]],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_launches_as_much_for_many_layers_as_for_few(
    name: str, scope: dict[str, str], dtype: torch.dtype, like_a_gpu: None
) -> None:
    options, most = METHODS[name]
    options = options | scope
    counts = []
    for layers in (2, 8, 32):
        weights = llama(layers, dtype)
        optimizer = OPTIMIZERS[name].optimizer_class(weights, **options)
        with kernels():
            step(optimizer, weights, 0)
            step(optimizer, weights, 1)
        with Operations() as operations, kernels() as launched:
            optimizer.step()
        assert 0 < len(launched) <= most
        counts.append((launched, operations.found))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    ("name", "options", "unit", "most"),
    [
        ("ldadam", {"rank": 16}, 64, 4),
        ("ldadam", {"rank": 16}, 70, 7),  # where blocks of the error go on in the next row
        ("lowrank_mfac", {"window": 2}, 64, 5),
        ("lowrank_mfac", {"window": 2}, 70, 5),
        ("lowrank_mfac", {"window": 2, "scope": "tensor"}, 64, 5),
    ],
)
def test_low_rank_methods_launch_so_much_a_shape(
    name: str, options: dict[str, Any], unit: int, most: int, like_a_gpu: None
) -> None:
    """Of matrices that the fused steps take, as many of a shape together as on a GPU."""
    counts = []
    for layers in (2, 8, 32):
        weights = llama(layers, torch.bfloat16, unit=unit)
        optimizer = OPTIMIZERS[name].optimizer_class(weights, **options)
        shapes = {weight.shape for weight in weights if weight.dim() == 2}
        with kernels():
            step(optimizer, weights, 0)
            step(optimizer, weights, 1)
        with Operations() as operations, kernels() as launched:
            optimizer.step()
        assert len(shapes) == 5 and 0 < len(launched) <= most * len(shapes)
        assert is_fused(launched)
        counts.append((launched, operations.found))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("rank", [200, 320, 512])
@pytest.mark.parametrize(("name", "most"), [("ldadam", 12), ("lowrank_mfac", 14)])
def test_large_ranks_launch_no_more(name: str, most: int, rank: int, use: Use) -> None:
    """Torch takes the first step, which is an SVD."""
    weight = nn.Parameter(torch.randn(1090, 1100).bfloat16())
    options = {"rank": rank, "error_feedback": "8bit"} | ({} if name == "ldadam" else {"window": 2})
    optimizer = OPTIMIZERS[name].optimizer_class([weight], **options)
    use("reference")
    with kernels():
        step(optimizer, [weight], 0)
    use("triton")
    with kernels() as launched:
        step(optimizer, [weight], 1)
    assert 0 < len(launched) <= most and is_fused(launched)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("microadam", {"window": 10, "density": 0.01, "weight_decay": 0.1}, 8.5),
        ("microadam", {"window": 10, "density": 0.01, "weight_decay": 0.1, "value_dtype": "4bit"}, 8.2),
        ("ldadam", {"rank": 1}, 15.5),  # of a side what 16 are of 2048
        ("sparse_mfac", {"window": 32, "density": 0.01}, 12.0),
    ],
)
def test_a_step_moves_fewer_bytes_than_adamw(name: str, options: dict[str, Any], most: float, use: Use) -> None:
    """In bytes of weights, gradients and state per parameter, each launch's own; AdamW's step of bfloat16 moves 14."""
    from tests.ops.interpreter.traffic import counted_launches

    use("reference")
    weights = [nn.Parameter(torch.randn(128, 512).bfloat16())]
    optimizer = OPTIMIZERS[name].optimizer_class(weights, **options)
    filled = options.get("window", 1)
    for seed in range(filled):
        step(optimizer, weights, seed)
    use("triton")
    with counted_launches() as launched:
        step(optimizer, weights, filled)
    (weight,), grad = weights, weights[0].grad
    assert grad is not None
    tensors = [weight, grad, *[part for part in optimizer.state[weight].values() if isinstance(part, Tensor)]]
    moved = sum(launch.needed(tensors) for launch in launched) / weight.numel()
    assert most / 2 < moved <= most


@pytest.mark.parametrize(
    ("name", "options", "columns"),
    [
        ("microadam", {"window": 3}, 1536),
        ("sparse_mfac", {"window": 3}, 1536),
        ("sparse_ggt", {"window": 3}, 1536),
        ("ldadam", {"rank": 16}, 1536),
        ("ldadam", {"rank": 16}, 1537),
        ("ldadam", {"rank": 16, "error_feedback": "none"}, 1536),
        ("lowrank_mfac", {"window": 3}, 1536),
        ("lowrank_mfac", {"window": 3}, 1537),
    ],
)
def test_a_fused_step_allocates_nothing_of_a_gradients_size(
    name: str, options: dict[str, Any], columns: int, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the scratch memory of windows: at most 32 MiB, whatever the model."""
    from hf_lowmem_optim.ops.triton import window_products

    use("triton")
    assert window_products._SCRATCH_BYTES == 1 << 25
    monkeypatch.setattr(window_products, "_SCRATCH_BYTES", 1 << 17)
    weights = [nn.Parameter(torch.randn(1024, columns).bfloat16())]
    optimizer = OPTIMIZERS[name].optimizer_class(weights, **options)
    with kernels():
        for seed in range(4):
            step(optimizer, weights, seed)
        with Operations() as operations:
            optimizer.step()
    assert 0 < operations.largest < weights[0].nbytes / 4


def expected_waits(name: str, systems: int = 1) -> dict[str, int]:
    """GGT's eigenvectors, of all systems that are solved together."""
    return {"aten._linalg_eigh.default": systems} if name.startswith("sparse_ggt") else {}


@pytest.fixture
def like_a_gpu(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU's tensors be put together as a GPU's, whose numbers nobody waits for."""
    use("triton")
    monkeypatch.setattr(low_rank, "_READABLE", ())
    monkeypatch.setattr(gram, "_READABLE", ())
    monkeypatch.setattr(lowrank_mfac, "_ALONE", ())
    monkeypatch.setattr(buckets, "_rounds_alike", lambda _: True)
    monkeypatch.setattr(buckets, "most_tensors", lambda *_: 1 << 30)


@pytest.mark.parametrize("name", [*METHODS, "ldadam", "lowrank_mfac"])
def test_corrections_take_two_launches_of_the_dense_rule(name: str, like_a_gpu: None) -> None:
    """One that joins and one that splits, of all its weights together; what a method's kernels update takes none."""
    options = METHODS[name][0] if name in METHODS else {"rank": 4}
    found = []
    for rounding, layers in (("nearest", 8), ("compensated", 2), ("compensated", 8)):
        weights = llama(layers, torch.bfloat16)
        optimizer = OPTIMIZERS[name].optimizer_class(weights, weight_rounding=rounding, **options)
        with kernels():
            step(optimizer, weights, 0)
        with kernels() as launched:
            optimizer.step()
        found.append(Counter(launched))
    plain, few, many = found
    # of a system that spans all parameters vectors are a part; of LowRankMFAC's they have no kernel of their own
    own = 0 if name.startswith("sparse") else 1
    assert few == many == plain + Counter({"_join_kernel": own, "_split_kernel": own})


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("dash")])
def test_a_later_step_waits_for_nothing(name: str, like_a_gpu: None) -> None:
    """Of all methods but Dash, with tensors of all kinds; ``test_gpu.py`` asks a GPU itself."""
    params = make_params()
    optimizer, steps = CASES[name].build(params.values()), list(gradients(4))
    with kernels():
        run(optimizer, params, iter(steps[:3]))
        with Operations() as operations:
            run(optimizer, params, iter(steps[3:]))
    assert operations.waiting() == expected_waits(name)


@pytest.mark.parametrize(
    ("name", "options", "shape", "count"),
    [
        ("microadam", {"window": 3}, (64, 128), 3),
        ("sparse_mfac", {"window": 3}, (64, 128), 5),
        ("sparse_ggt", {"window": 3}, (64, 128), 5),
        ("ldadam", {"rank": 4}, (32, 64), 4),
        ("ldadam", {"rank": 16}, (1088, 1088), 6),
        ("ldadam", {"rank": 16}, (1088, 1089), 7),
        ("ldadam", {"rank": 32}, (64, 128), 5),
        ("ldadam", {"rank": 128}, (1088, 1089), 9),
        ("lowrank_mfac", {"rank": 4, "window": 3}, (32, 64), 5),
        ("lowrank_mfac", {"rank": 32, "window": 3}, (256, 512), 6),
    ],
)
def test_launches_of_a_tensor_in_the_backward_pass(
    name: str, options: dict[str, Any], shape: tuple[int, int], count: int, like_a_gpu: None
) -> None:
    """And none of them is waited for."""
    weights = [nn.Parameter(torch.randn(shape).bfloat16()) for _ in range(3)]
    optimizer = OPTIMIZERS[f"{name}_layerwise"].optimizer_class(weights, **options)
    with kernels():
        for _ in range(2):
            sum((weight * weight).sum() for weight in weights).backward()
            optimizer.step()
        loss = sum((weight * weight).sum() for weight in weights)
        with Operations() as operations, kernels() as launched:
            loss.backward()
    assert all(weight.grad is None for weight in weights)
    assert len(launched) == count * len(weights), launched
    assert operations.waiting() == expected_waits(name, systems=3)
