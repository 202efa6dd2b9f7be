"""One case per registered optimizer: hyper-parameters with which the tiny tensors of the tests are compressed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim.engine import buckets
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from hf_lowmem_optim.registry import OPTIMIZERS
from hf_lowmem_optim.spec import QuantFormat

#: Shapes that every test runs on: wide, tall, square, a convolution kernel, a stack, a vector, a scalar.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (12, 40),
    "tall": (40, 12),
    "square": (16, 16),
    "conv": (8, 3, 3, 3),
    "experts": (3, 16, 12),
    "vector": (10,),
    "scalar": (),
}

#: Values that are refused, by hyper-parameter.
Wrong = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """An optimizer and the settings that suit :data:`SHAPES`."""

    name: str
    hyper: dict[str, Any] = field(default_factory=dict)
    #: Another value of a hyper-parameter that shapes the state.
    other: dict[str, Any] = field(default_factory=dict)
    #: Wrong values of the optimizer's own hyper-parameters.
    wrong: Wrong = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return OPTIMIZERS[self.name].optimizer_class.method

    @property
    def coupled(self) -> bool:
        """Whether one tensor's update depends on the other tensors."""
        return self.method.coupled_update_ is not None and not self.layerwise

    @property
    def takes_gradients(self) -> bool:
        """Whether a step leaves no gradient where it compresses: its buffer keeps the error."""
        return self.hyper.get("error_feedback") == "grad"

    @property
    def layerwise(self) -> bool:
        return self.method.layerwise

    @property
    def dense_key(self) -> str:
        """The option that sends a group to AdamW with None."""
        key, off = self.method.switch
        assert off is None
        return key

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """Hyper-parameters on which all compressed groups must agree."""
        return self.method.shared_options

    def build(self, params: Any, **override: Any) -> LowMemoryOptimizer:
        return OPTIMIZERS[self.name].optimizer_class(params, **{**self.hyper, **override})


RATES = {"weight_decay": 0.1, "lr": 1e-2}
#: A window that wraps within the tests' steps.
PRECONDITIONED = {**RATES, "window": 4, "damping": 1e-3, "momentum": 0.5}
SPARSE = {"density": 0.1, "block_size": 64}
WRONG_EVERYWHERE: Wrong = {
    "lr": (-1e-3, "fast", float("nan")),
    "betas": ((0.9, 1.0), (-0.1, 0.9), 0.9, (0.9,)),
    "eps": (0.0,),
    "weight_decay": (-0.1,),
    "dense_state": ("bf16", 8),
    "weight_rounding": ("up",),
}
WRONG_PRECONDITIONED: Wrong = {
    "window": (0, 2.5),
    "damping": (0.0, -1e-5, "small"),
    "momentum": (1.0, -0.1),
    "error_feedback": ("param",),
    "scope": ("layer",),
}
WRONG_SPARSE: Wrong = {"density": (0.0, 1.5, "x", True), "block_size": (0, 40000, 100), "value_dtype": ("fp16",)}

CASES = {
    case.name: case
    for case in (
        Case(
            "ldadam",
            {**RATES, "rank": 4},
            {"rank": 5},
            {"rank": (0, -1, "x", True, 2.0), "rho": (1.0, -0.1), "state_dtype": ("fp8",), "error_feedback": ("fp23",)},
        ),
        Case(
            "lordo",
            {**RATES, "rank": 4, "sync_every": 3},
            {"sync_every": 4},
            {
                "rank": (0, -1, "x", True, 2.0),
                "sync_every": (0, 2.5),
                "omega": (1.5, -0.1),
                "mu": (0.0,),
                "clip_norm": (0.0, "1"),
                "error_feedback": ("grad",),
                "projection": ("qr",),
                "sync_dtype": ("fp16",),
            },
        ),
        Case("sparse_mfac", {**PRECONDITIONED, **SPARSE}, {"density": 0.2}, {**WRONG_PRECONDITIONED, **WRONG_SPARSE}),
        Case(
            "lowrank_mfac",
            {**PRECONDITIONED, "rank": 3},
            {"rank": 2},
            {**WRONG_PRECONDITIONED, "rank": (0, "x", True, 2.0)},
        ),
        Case("sparse_ggt", {**PRECONDITIONED, **SPARSE}, {"window": 5}, {**WRONG_PRECONDITIONED, **WRONG_SPARSE}),
        Case(
            "dct_adamw",
            {**RATES, "rank": 4, "update_interval": 3},
            {"dct_type": 2},
            {
                "rank": (0, -1, "x", True, 2.0),
                "update_interval": (0, 1.5),
                "ranking": ("linf",),
                "dct_type": (1, "3"),
                "transform": ("dft",),
                "basis": ("svd",),
                "state_dtype": ("fp8",),
                "error_feedback": ("grad",),
            },
        ),
        Case(
            "trion",
            {**RATES, "rank": 4, "dense_lr_ratio": 1.0},
            {"rank": 5},
            {
                "rank": (0, -1, "x", True, 2.0),
                "momentum": (1.0, -0.1),
                "scaling": ("adam",),
                "newton_schulz": ("svd",),
                "ns_dtype": ("fp16",),
                "dense_lr_ratio": (0.0, "x"),
            },
        ),
        Case(
            "microadam",
            {**RATES, "density": 0.2, "window": 3, "block_size": 32, "quant_block_size": 8, "min_compress_size": 100},
            {"window": 4},
            {
                "window": (0,),
                "density": (0.0, 1.5, "dense"),
                "block_size": (40000, 100),
                "quant_block_size": (7,),
                "bits": (5, "4"),
                "bias_correction": ("none",),
                "alpha": (1.0,),
                "min_compress_size": (0,),
                "stochastic_rounding": (1,),
                "value_dtype": ("fp16",),
            },
        ),
        Case(
            "dash",
            {**RATES, "block_size": 16, "precondition_frequency": 3, "momentum": 0.5},
            {"block_size": 12},
            {
                "block_size": (0, 2.5),
                "shampoo_beta": (1.5, -0.1),
                "solver": ("svd",),
                "iterations": (0,),
                "scaling": ("trace",),
                "damping": (-1.0,),
                "precondition_frequency": (0,),
                "start_step": (0,),
                "spread": (1,),
                "grafting": ("sgd",),
                "momentum": (1.0,),
                "statistics_dtype": ("bf16",),
                "root_dtype": ("2bit",),
                "moment_dtype": ("4bit",),
            },
        ),
    )
}


#: The layer-wise optimizers take what the normal ones take.
for normal in [name for name in CASES if f"{name}_layerwise" in OPTIMIZERS]:
    name = f"{normal}_layerwise"
    wrong = {**CASES[normal].wrong, "clip_tensor_norm": (0.0, "1", True)}
    if "scope" in OPTIMIZERS[name].optimizer_class.method.options.defaults():
        wrong["scope"] = ("layer", "model")
    CASES[name] = replace(CASES[normal], name=name, wrong=wrong)

#: Settings of an optimizer with which it works in another way.
CASES["ldadam error in gradient"] = replace(
    CASES["ldadam"], hyper={**CASES["ldadam"].hyper, "error_feedback": "grad"}, other={"error_feedback": "param"}
)
#: Values of windows as codes.
for name, stored in (("microadam", "4bit"), ("sparse_mfac", "8bit")):
    hyper = {**CASES[name].hyper, "value_dtype": stored}
    CASES[f"{name} {stored} values"] = replace(CASES[name], hyper=hyper, other={"value_dtype": "bf16"}, wrong={})
#: As it is published, and with a heavy ball.
PUBLISHED = dict.fromkeys(("statistics_dtype", "root_dtype", "moment_dtype"), "fp32") | {"grafting": "adam"}
CASES["dash as published"] = replace(
    CASES["dash"],
    hyper={**CASES["dash"].hyper, **PUBLISHED, "spread": False, "nesterov": True},
    other={"root_dtype": "bf16"},
)


#: The dense rule with other storage, in the optimizers for which :data:`SHAPES` has dense tensors. Quantization is to
#: begin at :data:`MIN_QUANTIZED` entries, so that the vector has codes and the scalar has not.
MIN_QUANTIZED = 8
VARIANTS = {
    f"{name} {storage}": replace(
        CASES[name], hyper={**CASES[name].hyper, "dense_state": storage}, other={"dense_state": "param"}, wrong={}
    )
    for name, storage in (("ldadam", "8bit"), ("ldadam_layerwise", "fp32"), ("microadam_layerwise", "8bit"))
}
#: Stacks of matrices taken apart, by methods for which that is another state.
for name in ("ldadam", "ldadam_layerwise", "ldadam error in gradient", "lowrank_mfac", "lordo"):
    VARIANTS[f"{name} stacked"] = replace(CASES[name], hyper={**CASES[name].hyper, "stacked": True}, wrong={})


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def make_params(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {k: nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for k, s in shapes.items()}


def gradients(
    num_steps: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    device: str = "cpu",
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> Iterator[dict[str, Tensor]]:
    """Gradients with a few strong directions that turn slowly, and noise."""
    generator = torch.Generator().manual_seed(seed)
    base = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    for _ in range(num_steps):
        for key, shape in shapes.items():
            base[key] = 0.9 * base[key] + 0.4 * torch.randn(shape, generator=generator)
        yield {k: (0.1 * v).to(device, dtype) for k, v in base.items()}


def run(optimizer: LowMemoryOptimizer, params: dict[str, nn.Parameter], steps: Iterator[dict[str, Tensor]]) -> None:
    for grads in steps:
        for key, param in params.items():
            param.grad = grads[key].clone()
        optimizer.step()


def stored_error(state: Mapping[str, Any], numel: int, fmt: QuantFormat) -> Tensor:
    """The values of a quantized error."""
    out = torch.empty(numel)
    dequantize_(out, Quantized(*(state[f"error_{part}"] for part in ("codes", "lo", "hi")), numel, fmt))
    return out


def sizes_of_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note from now on how many tensors each batch has."""
    found: list[int] = []
    original = buckets._batch

    def counted(updates: Any, *memo: Any, **options: Any) -> buckets.Batch:
        found.append(len(updates))
        return original(updates, *memo, **options)

    monkeypatch.setattr(buckets, "_batch", counted)
    return found


def odd_layout(value: Tensor) -> Tensor:
    """The same values, not contiguous where the shape allows it."""
    if value.dim() == 2:
        return value.t().contiguous().t()
    if value.dim() == 4:
        return value.to(memory_format=torch.channels_last)
    return value.repeat_interleave(2)[::2] if value.dim() == 1 else value


def through_a_file(value: Any) -> Any:
    """As the Trainer does: what is loaded lies on the CPU first."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def assert_resumes(
    case: Case,
    steps: list[dict[str, Tensor]],
    done: int,
    layout: Callable[[Tensor], Tensor] = lambda value: value,
    **hyper: Any,
) -> None:
    """Check that a run which is saved after some steps and resumed is the one that was not stopped, to the bit.

    Weights and state are laid out by ``layout`` before they are loaded.
    """
    dtype, device = steps[0]["wide"].dtype, steps[0]["wide"].device
    straight = make_params(dtype, device=str(device))
    optimizer = case.build(straight.values(), **hyper)
    run(optimizer, straight, iter(steps[:done]))
    values, saved = through_a_file(({k: v.data for k, v in straight.items()}, optimizer.state_dict()))
    for each in saved["state"].values():
        own = [key for key, value in each.items() if isinstance(value, Tensor) and not key.startswith("shared_")]
        each.update({key: layout(each[key]) for key in own})
    resumed = {k: nn.Parameter(layout(v.to(device))) for k, v in values.items()}
    second = case.build(resumed.values(), **hyper)
    second.load_state_dict(saved)
    for stepped, params in ((optimizer, straight), (second, resumed)):
        run(stepped, params, iter(steps[done:]))
    assert_equal(straight.values(), resumed.values())
    assert_same_state(optimizer, second)


def assert_equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    """Check that tensors are equal to the bit."""
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), index


def assert_same_state(left: LowMemoryOptimizer, right: LowMemoryOptimizer) -> None:
    """Every entry of the state equal: types, dtypes, bits."""
    packed = [each.state_dict() for each in (left, right)]
    first, second = (p["state"] for p in packed)
    assert first.keys() == second.keys() and len(first) > 1
    for index, saved in first.items():
        assert saved.keys() == second[index].keys()
        for key, value in saved.items():
            other = second[index][key]
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype, (index, key)
                torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
            else:
                assert value == other, (index, key)
