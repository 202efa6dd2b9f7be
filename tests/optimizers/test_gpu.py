"""What holds on a GPU besides the contract: the numbers of the CPU, matrices together as alone, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import LDAdam
from tests.optimizers.cases import (
    CASES,
    NEEDS_GPU,
    PUBLISHED,
    VARIANTS,
    Case,
    gradients,
    make_params,
    run,
    sizes_of_batches,
)

pytestmark = NEEDS_GPU
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of Dash what rounding moves little: the solver of a GPU on either device, well-conditioned statistics, no codes.
STEADY = {"solver": "newton_db", "damping": 1e-5, **PUBLISHED}


@pytest.mark.parametrize("name", [*CASES, *VARIANTS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_computes_what_a_cpu_computes(name: str, dtype: torch.dtype) -> None:
    case = {**CASES, **VARIANTS}[name]
    eight_bit = case.hyper.get("dense_state") == "8bit"
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    start, ends = make_params(dtype), {}
    for device in ("cpu", "cuda"):
        params = make_params(dtype, device=device)
        # a code of a quantized error may fall on the other side of a half
        hyper = {"error_feedback": "fp32"} if case.hyper.get("rank") and not case.takes_gradients else {}
        hyper |= STEADY if case.method.name.startswith("dash") else {}
        run(case.build(params.values(), **hyper), params, gradients(9, dtype, device=device))
        ends[device] = {key: param.detach().double().cpu() for key, param in params.items()}
    # one rounding of the weight more or less
    tolerance, spacing = 1e-3, torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    if eight_bit:
        # bitsandbytes' two kernels differ: in the last digits, and in how often they round a narrow weight
        tolerance, spacing = (3e-3 if dtype == torch.float32 else 2e-2), 4 * spacing
    for key, before in start.items():
        moved = (ends["cpu"][key] - before.detach().double()).abs().max()
        difference = (ends["cpu"][key] - ends["cuda"][key]).abs()
        assert moved > 0
        allowed = tolerance * moved + 2 * spacing * ends["cpu"][key].abs()
        assert (difference <= allowed).all(), (key, difference.max(), moved)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_matrices_of_one_shape_come_out_together_as_alone(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding; layer-wise mode, which updates each alone, is the normal mode to that."""
    sizes = sizes_of_batches(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for _ in range(5)]
    together, alone = ([nn.Parameter(start.cuda()) for start in starts] for _ in range(2))
    # without a quantized error, a code of which may fall on the other side of a half
    settings: dict[str, Any] = {"rank": 4, "lr": 1e-2, "error_feedback": "fp32"}
    one, each = LDAdam(together, **settings), [LDAdam([weight], **settings) for weight in alone]
    for _ in range(6):
        for left, right in zip(together, alone, strict=True):
            left.grad = torch.randn(shape, generator=generator).cuda()
            right.grad = left.grad.clone()
        for optimizer in (one, *each):
            optimizer.step()
    assert sizes == [*[5, 1, 1, 1, 1, 1] * 6]
    for left, right, start in zip(together, alone, starts, strict=True):
        assert (left - right).abs().max() <= 1e-3 * (left.cpu() - start).abs().max()


#: What asks the GPU in a later step, and so waits for it.
QUESTIONS = {
    "sparse_ggt": "eigenvectors: torch asks whether they were found",
    "dash": "packed statistics: which of them have no Cholesky factor",
}


def later_steps() -> Iterator[Any]:
    for name, case in CASES.items():
        why = QUESTIONS.get(name.removesuffix("_layerwise"))
        marks = [pytest.mark.xfail(reason=why, raises=RuntimeError, strict=True)] if why else []
        yield pytest.param(case, marks=marks, id=name)


@pytest.mark.parametrize("case", later_steps())
def test_a_later_step_does_not_wait_for_the_gpu(case: Case) -> None:
    """Whoever waits leaves the GPU idle until the next kernels are launched. Of LoRDO, a step without a sync."""
    params = make_params(device="cuda")
    optimizer = case.build(params.values(), **{key: 100 for key in ("sync_every",) if key in case.hyper})
    steps = list(gradients(6, device="cuda"))
    run(optimizer, params, iter(steps[:3]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(optimizer, params, iter(steps[3:]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_a_step_is_refused() -> None:
    param = nn.Parameter(torch.randn(64, 96, device="cuda"))
    optimizer, graph = LDAdam([param], rank=4), torch.cuda.CUDAGraph()
    param.grad = torch.randn_like(param)
    optimizer.step()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="LDAdam counts its steps on the host"), torch.cuda.graph(graph):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 1
