"""Checkpoints that commit 46e844c wrote: they load, and the run goes on as that commit went on.

The file is a list of runs of five steps on plain torch (``HF_LOWMEM_OPTIM_BACKEND=reference``), with the optimizer's
``state_dict()``, the parameters, the seed of the gradients of three more steps, and the parameters after these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim.registry import OPTIMIZERS

FILE = Path(__file__).parents[1] / "data" / "checkpoints_46e844c.pt"
RUNS: list[dict[str, Any]] = torch.load(FILE, weights_only=True)
#: Products of matrices differ in their last digits from machine to machine.
LOW_RANK = ("ldadam", "lowrank_mfac")


#: Those of that commit.
METHODS = ("ldadam", "microadam", "sparse_mfac", "lowrank_mfac", "sparse_ggt")


def test_every_method_is_there_in_both_dtypes() -> None:
    found = {(run["name"].removesuffix("_layerwise"), run["dtype"]) for run in RUNS}
    assert found >= {(name, dtype) for name in METHODS for dtype in (torch.float32, torch.bfloat16)}
    assert FILE.stat().st_size < 300_000


@pytest.mark.parametrize("saved", RUNS, ids=lambda run: f"{run['name']}-{run['dtype']}-{run['hyper']}")
def test_an_old_checkpoint_goes_on(saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    params = [nn.Parameter(value.clone()) for value in saved["params"]]
    groups = [{"params": params[:3]}, {"params": params[3:]}]  # the saved learning rates come back
    # what that commit kept values in by default
    options = {"value_dtype": "bf16"} if saved["name"].startswith("microadam") else {}
    optimizer = OPTIMIZERS[saved["name"]].optimizer_class(groups, **options, **saved["hyper"])
    optimizer.load_state_dict(saved["optimizer"])
    for index, param in enumerate(params):
        expected, state = dict(saved["optimizer"]["state"][index]), optimizer.state[param]
        # what belongs to all parameters together was in the first group, and is in the state of the first parameter
        shared = saved["optimizer"]["param_groups"][0].get("shared", {}) if index == 0 else {}
        expected.update({f"shared_{key}": value for key, value in shared.items()})
        assert state.keys() == expected.keys() and state["step"] == 5
        assert all(torch.equal(value, expected[key]) for key, value in state.items() if isinstance(value, Tensor))
    generator = torch.Generator().manual_seed(saved["seed"])
    for _ in range(3):
        for param in params:
            param.grad = (0.1 * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()
    for param, before, after in zip(params, saved["params"], saved["later"], strict=True):
        assert not torch.equal(after, before)
        if not saved["name"].startswith(LOW_RANK):
            assert torch.equal(param, after)
            continue
        # a weight of bfloat16 may fall on the other side of a half
        spacing = torch.finfo(after.dtype).eps * after.abs().double() if after.dtype == torch.bfloat16 else 0.0
        assert ((param - after).abs().double() <= 1e-6 * after.abs().max() + spacing).all()
