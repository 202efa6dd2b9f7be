"""Pruning layer by layer: the sweep against elimination one column after the other, all kinds of layers, refusals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowmem_optim import iobs_layers_
from hf_lowmem_optim.pruning import layers as module
from hf_lowmem_optim.pruning import network as network_module
from hf_lowmem_optim.pruning.layer_kinds import matrices_of, rows_of_input
from hf_lowmem_optim.pruning.layers import prunable_layers
from hf_lowmem_optim.pruning.sweep import newton_point, solve_rows_, sweep_
from tests.reference import iobs
from tests.trainer.tiny_models import tiny_bert_classifier, tiny_gpt2, tiny_llama


def problem(out: int = 6, columns: int = 21, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(60, columns)) @ rng.normal(size=(columns, columns))
    return torch.tensor(rng.normal(size=(out, columns))), torch.tensor(X.T @ X / 60 + 0.05 * np.eye(columns))


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_the_sweep_is_elimination_column_by_column(block_size: int) -> None:
    W, H = problem()
    expected = iobs.sweep(W.numpy(), H.numpy(), 0.55, block_size)
    pruned = sweep_(W, H, 0.55, None, block_size)
    assert np.abs(W.numpy() - expected).max() < 1e-9
    assert torch.equal(pruned, W == 0) and int(pruned.sum()) == int(0.55 * 6 * 21)


def test_exact_rows_are_the_minimizers_of_their_supports() -> None:
    W, H = problem()
    target = W.clone()
    pruned = sweep_(W, H, 0.5, None, 8)
    swept = W.clone()
    solve_rows_(W, target, H, pruned)
    for row, mask in enumerate(pruned.numpy()):
        assert np.abs(W[row].numpy() - iobs.minimizer(target[row].numpy(), H.numpy(), mask)).max() < 1e-9

    def loss(x: torch.Tensor) -> float:
        return float(torch.einsum("oi,ij,oj", x - target, H, x - target))

    magnitude = torch.where(torch.tensor(iobs.lowest(target.abs().numpy().reshape(-1), 63)).view(6, 21), 0.0, target)
    assert loss(W) < loss(swept) < loss(magnitude)


def test_the_newton_point_is_the_minimizer_without_damping() -> None:
    rng = np.random.default_rng(1)
    X0, X, W0 = rng.normal(size=(50, 7)), rng.normal(size=(50, 7)), rng.normal(size=(4, 7))
    squares, crossed = torch.tensor(X.T @ X / 50), torch.tensor(X0.T @ X / 50)
    expected = np.linalg.lstsq(X, X0 @ W0.T, rcond=None)[0].T
    found = newton_point(torch.tensor(rng.normal(size=(4, 7))), squares, squares, torch.tensor(W0) @ crossed)
    assert np.abs(found.numpy() - expected).max() < 1e-9


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (3, 5, 6)),
    (Conv1D(4, 6), (3, 5, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2), (2, 4, 7, 6)),
    (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 5)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__)
def test_a_layer_is_the_product_of_its_rows_and_its_matrices(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices = matrices_of(layer, layer.weight.detach())
    products = [X.double() @ W.T for X, W in zip(rows_of_input(layer, x), matrices, strict=True)]
    y = layer(x) if not isinstance(layer, (nn.Linear, Conv1D)) else layer(x).movedim(-1, 1)
    y = y[None] if x.dim() == 3 and isinstance(layer, nn.Conv2d) else y
    expected = y.detach().movedim(1, -1).reshape(-1, y.shape[1]) - layer.bias.detach()
    assert torch.allclose(torch.cat(products, dim=1).float(), expected, atol=1e-5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(inplace=True), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 16))


def output_error(dense: nn.Module, pruned: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((pruned(x) - dense(x)).square().sum() / dense(x).square().sum())


def test_iterations_and_exact_rows_lower_the_error_on_other_data() -> None:
    """Below that of magnitude; the first iteration is SparseGPT. Of exact sparsity, and none in training mode."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(32, 32, generator=generator)
    data = [torch.randn(64, 32, generator=generator) @ mixing for _ in range(9)]
    dense = network()
    errors = {}
    for key, settings in {"one": {"iterations": 1}, "four": {"iterations": 4}, "exact": {"exact": True}}.items():
        pruned = copy.deepcopy(dense).train()
        iobs_layers_(pruned, data[:8], sparsity=0.6, **settings)
        errors[key] = output_error(dense, pruned, data[8])
        assert pruned.training and not pruned[0]._forward_pre_hooks
        for index in (0, 2, 4):
            weight = pruned[index].weight
            assert int((weight == 0).sum()) == int(0.6 * weight.numel())
            assert torch.equal(pruned[index].bias, dense[index].bias)
    magnitude = copy.deepcopy(dense)
    for index in (0, 2, 4):
        weight = magnitude[index].weight.data
        weight.view(-1)[weight.abs().view(-1).argsort()[: int(0.6 * weight.numel())]] = 0
    assert errors["exact"] < errors["four"] < errors["one"] < 0.7 * output_error(dense, magnitude, data[8])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert_classifier])
def test_transformers_are_pruned_but_for_embeddings_and_heads(make: Any) -> None:
    """Two of each four inputs, in every layer; heads and embeddings, tied or not, as they were."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    chosen = prunable_layers(model)
    batches = [{"input_ids": torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    iobs_layers_(model, batches, pattern=(2, 4), iterations=2)
    assert not {"lm_head", "classifier"} & chosen.keys()
    for name, value in model.state_dict().items():
        layer = chosen.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith("weight"):
            assert torch.equal(value, before[name]), name
        else:
            weight = value.T if isinstance(layer, Conv1D) else value
            assert bool(((weight.reshape(-1, 4) == 0).sum(1) == 2).all()), name
    assert torch.isfinite(model(**batches[0]).logits).all()


def test_layers_with_one_input_share_a_run_and_shared_weights_are_pruned_once(monkeypatch: Any) -> None:
    runs: list[str] = []
    original = module._moments
    monkeypatch.setattr(module, "_moments", lambda *given: (runs.append(given[1]), original(*given))[1])
    model = tiny_llama(num_hidden_layers=1)
    ids = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    iobs_layers_(model, [{"input_ids": ids}], iterations=1)
    assert [name.rpartition(".")[2] for name in runs] == ["q_proj", "o_proj", "gate_proj", "down_proj"]

    shared = nn.Linear(8, 8)
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    iobs_layers_(twice, [torch.randn(20, 8)], sparsity=0.5)
    assert int((shared.weight == 0).sum()) == 32


class SomeBlocks(nn.Module):
    """Hands its blocks what the one before gave, or something else."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.chained = chained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for block in self.blocks:
            y = block(y if self.chained else y + x)
        return y


@pytest.mark.parametrize(
    ("make", "fewer"),
    [
        *[(each, None) for each in (tiny_gpt2, tiny_bert_classifier, network)],
        (lambda: tiny_llama(num_hidden_layers=4), True),
        (lambda: SomeBlocks(chained=True), True),
        (lambda: SomeBlocks(chained=False), False),
    ],
)
def test_of_a_list_of_blocks_only_the_layer_s_own_runs(make: Any, fewer: bool | None, monkeypatch: Any) -> None:
    """Fewer calls of layers than through the whole network, and the same weights to the bit."""
    generator, dense = torch.Generator(), make()
    results, calls = list[dict[str, torch.Tensor]](), [0, 0]
    for whole in (0, 1):
        if whole:
            monkeypatch.setattr(network_module, "_find_blocks", lambda *_: [])
        model = copy.deepcopy(dense)
        size = 32 if isinstance(model, nn.Sequential) else 6
        batches = [torch.randn(40, size, generator=generator.manual_seed(i)) for i in (0, 1)]
        if hasattr(model, "config"):
            batches = [{"input_ids": torch.randint(1, 40, (2, 12), generator=generator.manual_seed(i))} for i in (0, 1)]

        def count(*_: Any, whole: int = whole) -> None:
            calls[whole] += 1

        for layer in prunable_layers(model).values():
            layer.register_forward_hook(count)
        iobs_layers_(model, batches, iterations=2)
        results.append(model.state_dict())
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    if fewer is not None:
        assert (calls[0] < 0.8 * calls[1]) is fewer


class Quantized(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(4, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Unused(), {}, "no batch reaches 'other'"),
        (Unused(), {"layers": ["table"]}, "'table' is an embedding"),
        (Unused(), {"layers": ["usedd"]}, "names no layer; did you mean 'used'"),
        (Unused(), {"layers": ["used"], "pattern": (2, 4)}, "last dimension of 'used', 6, is not divisible by the 4"),
        (nn.Sequential(Quantized()), {}, "'0' has quantized weights"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), {"layers": None}, "parametrization"),
        (nn.ReLU(), {}, "no linear or convolution layer"),
        (Unused(), {"layers": ["used"], "sparsity": -0.1}, "sparsity=-0.1"),
        (Unused(), {"layers": ["used"], "iterations": 0}, "iterations=0"),
        (Unused(), {"layers": ["used"], "batches": []}, "batches is empty"),
        (Unused(), {"layers": ["used"], "batches": [torch.full((3, 6), torch.nan)]}, "inputs of 'used' are not finite"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_refused(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        iobs_layers_(model, **{"batches": [torch.randn(5, 6)], **settings})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not each._forward_pre_hooks for each in model.modules())


def test_weights_that_are_not_finite_and_a_batch_in_place_of_batches_are_told() -> None:
    broken = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weights of '0' are not finite"):
        iobs_layers_(broken, [torch.randn(5, 6)])
    with pytest.raises(TypeError, match="layers=5 is a int; it must be a list of names"):
        prunable_layers(network(), 5)  # type: ignore[arg-type]
    for batch in (torch.randn(5, 6), {"input": torch.randn(5, 6)}):
        with pytest.raises(TypeError, match="give a list of batches"):
            iobs_layers_(nn.Sequential(nn.Linear(6, 6)), batch)


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.expert(x[:0])


def test_a_layer_that_gets_no_row_is_told() -> None:
    with pytest.raises(ValueError, match="'expert' gets no row of input"):
        iobs_layers_(Empty(), [torch.randn(5, 6)])
