"""Weights rounded stochastically: what each step does is what it does to float32 weights, rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lowmem_optim.registry import OPTIMIZERS
from tests.optimizers.cases import CASES, SHAPES, gradients, make_params, run

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_gives_a_neighbour_of_the_float32_result(name: str, dtype: torch.dtype) -> None:
    """Also in the preconditioned optimizers, which have an update of their own."""
    results = []
    for rounding in ("nearest", "stochastic"):
        params, (grads,) = make_params(dtype), gradients(1, dtype)
        if rounding == "nearest":
            params = {k: nn.Parameter(p.float()) for k, p in params.items()}
            grads = {k: g.float() for k, g in grads.items()}
        settings = {"weight_rounding": rounding, "dense_state": "fp32", "lr": 1e-3}
        run(CASES[name].build(params.values(), **settings), params, iter([grads]))
        results.append(params)
    wide, narrow = results
    otherwise = 0
    for key in SHAPES:
        spacing = wide[key].abs().clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
        assert ((wide[key] - narrow[key].float()).abs() <= spacing).all(), key
        otherwise += int((narrow[key] != wide[key].to(dtype)).sum())
    assert otherwise > 10  # than to nearest


@pytest.mark.parametrize("storage", ["param", "fp32", "8bit"])
@pytest.mark.parametrize("name", ["ldadam", "microadam"])
@pytest.mark.parametrize("rule", ["compressed", "dense"])
def test_small_updates_add_up_in_the_mean(name: str, rule: str, storage: str) -> None:
    """Rounded to nearest, weights of 1 never move; stochastically they follow the float32 run."""
    if storage == "8bit":
        pytest.importorskip("bitsandbytes")
    results = {}
    for rounding, dtype in (("exact", torch.float32), ("nearest", torch.bfloat16), ("stochastic", torch.bfloat16)):
        weight = nn.Parameter(torch.ones(64, 128, dtype=dtype))
        settings = {"weight_rounding": "stochastic"} if rounding == "stochastic" else {}
        settings |= {CASES[name].dense_key: None} if rule == "dense" else {}
        optimizer = OPTIMIZERS[name].optimizer_class([weight], lr=1e-4, dense_state=storage, **settings)
        if name == "microadam" and rule == "compressed":
            optimizer.param_groups[0]["density"] = 1.0
            optimizer.param_groups[0]["block_size"] = 64
        for _ in range(40):
            # rank one, the same sign everywhere: both methods move every weight
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
        results[rounding] = weight.detach().float()
    assert torch.equal(results["nearest"], torch.ones(64, 128))
    lost = 1 - results["exact"].mean()
    assert lost > 1e-4
    # bfloat16 has a spacing of 2^-8 below 1: a sum of draws, each of that size at most
    deviation = (lost * 2**-8 / weight.numel()).sqrt()
    assert abs(results["stochastic"].mean() - results["exact"].mean()) < 5 * deviation


def test_equal_tensors_get_draws_of_their_own() -> None:
    pair = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = OPTIMIZERS["ldadam"].optimizer_class(pair, lr=1e-3, weight_rounding="stochastic")
    for weight in pair:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(*pair)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_refused_where_nothing_would_be_rounded(name: str) -> None:
    wide, narrow = nn.Parameter(torch.zeros(20, 20)), nn.Parameter(torch.zeros(20, 20, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="weight_rounding='stochastic' has no effect here"):
        CASES[name].build([wide], weight_rounding="stochastic")
    # a mixed model is what it is for
    optimizer = CASES[name].build([wide, narrow], weight_rounding="stochastic")
    with pytest.raises(ValueError, match="weight_rounding='stochastic' has no effect here"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "weight_rounding": "stochastic"})
    assert len(optimizer.param_groups) == 1
