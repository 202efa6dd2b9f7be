"""What holds on a GPU, for every registered optimizer: the same numbers as on the CPU, exact resume, no waiting."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.optimizers.cases import CASES, SHAPES, VARIANTS, Case, assert_same_state, gradients, make_params, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*CASES, *VARIANTS])
def case(request: pytest.FixtureRequest) -> Case:
    chosen = {**CASES, **VARIANTS}[request.param]
    if chosen.hyper.get("dense_state") == "8bit":
        pytest.importorskip("bitsandbytes")
    return chosen


def on(device: torch.device | str, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {key: nn.Parameter(param.detach().to(device, copy=True)) for key, param in params.items()}


def gradients_on(device: torch.device | str, num_steps: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    for grads in gradients(num_steps, dtype):
        yield {key: grad.to(device) for key, grad in grads.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_computes_what_a_cpu_computes(case: Case, dtype: torch.dtype) -> None:
    start = make_params(dtype)
    ends = {}
    for device in ("cpu", "cuda"):
        params = on(device, start)
        # a code of a quantized error may fall on the other side of a half
        hyper = {"error_feedback": "fp32"} if case.hyper.get("rank") and not case.takes_gradients else {}
        run(case.build(params.values(), **hyper), params, gradients_on(device, 9, dtype))
        ends[device] = {key: param.detach().double().cpu() for key, param in params.items()}
    # one rounding of the weight more or less
    tolerance, spacing = 1e-3, torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    if case.hyper.get("dense_state") == "8bit":
        # bitsandbytes' two kernels differ: in the last digits, and in how often they round a narrow weight
        tolerance, spacing = (3e-3 if dtype == torch.float32 else 2e-2), 4 * spacing
    for key, before in start.items():
        moved = (ends["cpu"][key] - before.detach().double()).abs().max()
        difference = (ends["cpu"][key] - ends["cuda"][key]).abs()
        assert moved > 0
        allowed = tolerance * moved + 2 * spacing * ends["cpu"][key].abs()
        assert (difference <= allowed).all(), (key, difference.max(), moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    straight = on(GPU, make_params(dtype))
    optimizer = case.build(straight.values())
    steps = list(gradients_on(GPU, 13, dtype))
    run(optimizer, straight, iter(steps[:6]))
    file = io.BytesIO()
    torch.save({"model": {k: v.data for k, v in straight.items()}, "optimizer": optimizer.state_dict()}, file)
    run(optimizer, straight, iter(steps[6:]))

    file.seek(0)
    # as the Trainer does: what is loaded lies on the CPU first
    saved = torch.load(file, weights_only=True, map_location="cpu")
    resumed = {k: nn.Parameter(v.to(GPU)) for k, v in saved["model"].items()}
    second = case.build(resumed.values())
    second.load_state_dict(saved["optimizer"])
    run(second, resumed, iter(steps[6:]))
    for key in SHAPES:
        assert torch.equal(straight[key], resumed[key]), key
    assert_same_state(optimizer, second)


def test_a_later_step_does_not_wait_for_the_gpu(case: Case) -> None:
    """Whoever waits leaves the GPU idle until the next kernels are launched."""
    if case.coupled or case.hyper.get("dense_state") == "8bit":
        pytest.skip("the weights of the window's rows decide which way to solve; bitsandbytes waits")
    params = on(GPU, make_params())
    optimizer = case.build(params.values())
    steps = list(gradients_on(GPU, 6, torch.float32))
    run(optimizer, params, iter(steps[:3]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(optimizer, params, iter(steps[3:]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_not_finite_gradients_show_in_the_parameter(case: Case) -> None:
    for bad in (float("nan"), float("inf")):
        for first in (0, 3):
            params = on(GPU, make_params())
            optimizer = case.build(params.values())
            run(optimizer, params, gradients_on(GPU, first, torch.float32))
            grads = next(gradients_on(GPU, 1, torch.float32))
            for grad in grads.values():
                grad.view(-1)[0] = bad
            run(optimizer, params, iter([grads]))
            assert all(not torch.isfinite(p).all() for p in params.values())
