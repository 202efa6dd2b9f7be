"""Every formula of another optimizer against that optimizer, to the byte, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import measure_state
from hf_lowmem_optim.memory.references import REFERENCES, ParameterFacts, plan_reference
from tests.optimizers.test_temporaries import peak_bytes

#: Above and under 4096 entries, divisible by block sizes and not, both orientations, vectors.
FACTS = {
    "embedding": ((100, 64), {"embedding": True}),
    "wide": ((144, 160), {"matrix": True}),
    "tall": ((160, 144), {"matrix": True}),
    "odd": ((67, 71), {}),
    "small": ((20, 24), {"matrix": True}),
    "vector": ((33,), {}),
}


def facts(dtype: torch.dtype) -> list[ParameterFacts]:
    return [ParameterFacts(shape, dtype, **kind) for shape, kind in FACTS.values()]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    given = [nn.Parameter(torch.randn(shape).to(dtype)) for shape, _ in FACTS.values()]
    for parameter in given:
        parameter.grad = torch.randn_like(parameter)
    return given


def adamw(fused: bool) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda given: torch.optim.AdamW(given, fused=fused, foreach=not fused)


def adamw_8bit(given: list[nn.Parameter]) -> torch.optim.Optimizer:
    optim = pytest.importorskip("bitsandbytes.optim")
    manager = optim.GlobalOptimManager.get_instance()
    # It remembers parameters by their id, also those of earlier tests.
    manager.initialize()
    # as the Trainer does for embeddings
    manager.override_config(given[0], "optim_bits", 32)
    manager.register_parameters(given)
    return optim.AdamW8bit(given)


def adamw_4bit(given: list[nn.Parameter]) -> torch.optim.Optimizer:
    optim = pytest.importorskip("torchao.optim")
    return optim.AdamW4bit(given)


def galore(given: list[nn.Parameter]) -> torch.optim.Optimizer:
    library = pytest.importorskip("galore_torch")
    matrices = [p for p, (_, kind) in zip(given, FACTS.values(), strict=True) if "matrix" in kind]
    rest = [p for p in given if not any(p is m for m in matrices)]
    settings = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return library.GaLoreAdamW([{"params": rest}, {"params": matrices, **settings}])


def adafactor(given: list[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(given, lr=1e-3, scale_parameter=False, relative_step=False)


BUILDERS: Mapping[str, Any] = {
    "adamw_fp32": adamw(fused=True),
    "adamw_torch_fused": adamw(fused=True),
    "adamw_torch": adamw(fused=False),
    "adamw_8bit": adamw_8bit,
    "adamw_4bit": adamw_4bit,
    "galore_adamw": galore,
    "adafactor": adafactor,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_the_formula_is_what_the_class_keeps(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "adamw_fp32" and dtype != torch.float32:
        pytest.skip("it stands for float32 weights")
    # torchao compiles its update, which takes half a minute and changes no size.
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function if function else lambda f: f)
    given = parameters(dtype)
    optimizer = BUILDERS[name](given)
    reference = REFERENCES[name]
    optimizer.step()
    if reference.temporaries is not None:
        planned = reference.temporaries(facts(dtype))
        # the foreach path also allocates two scalars a tensor
        assert planned <= peak_bytes(lambda: optimizer.step()) <= 1.01 * planned + 16 * len(given)
    planned_state = plan_reference(reference, [facts(dtype)])
    measured = measure_state(optimizer)
    assert measured.component_bytes == planned_state.component_bytes
    assert measured.dtype_bytes == planned_state.dtype_bytes
    assert measured.num_parameters == planned_state.num_parameters
