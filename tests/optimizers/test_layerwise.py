"""Layer-wise mode: the normal mode's result to the bit, with one gradient at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_lowmem_optim import OPTIMIZERS, LDAdam, get_entry
from hf_lowmem_optim.engine.backward import Layerwise
from hf_lowmem_optim.registry import LDAdamLayerwise
from tests.optimizers.cases import CASES, Case, assert_equal, assert_same_state, through_a_file

LAYERWISE = [case for case in CASES.values() if case.layerwise]
every_case = pytest.mark.parametrize("case", LAYERWISE, ids=lambda case: case.name)


class Model(nn.Module):
    """An embedding tied to the head, layers of two shapes, one of them used twice, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 16)])
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.layers[1](functional.gelu(self.layers[0](hidden)))
        for _ in range(2):
            hidden = hidden + self.layers[2](hidden)
        return functional.linear(self.norm(hidden), self.embedding.weight)


def build(case: Case, dtype: torch.dtype = torch.float32, **override: Any) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    groups = [
        {"params": list(model.layers.parameters()), "weight_decay": 0.1},
        {"params": [model.embedding.weight, *model.norm.parameters()], case.dense_key: None, "lr": 3e-3},
    ]
    return model, case.build(groups, **override)


def batch(step: int) -> Tensor:
    return torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(step))


def loss_of(model: Model, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(-1, 1).flatten())


def lower_the_rates(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * (1 - step / 20)


def train(model: Model, optimizer: Any, steps: range) -> list[float]:
    """Take steps at rates that fall, and return the norms of what gradients are left after the backward passes."""
    norms = []
    for step in steps:
        lower_the_rates(optimizer, step)
        loss_of(model, batch(step)).backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def normal(case: Case) -> Case:
    """The normal mode's case, with a system for each tensor where the default is one for all."""
    scope = {"scope": "tensor"} if "scope" in case.method.options.defaults() else {}
    found = CASES[case.name.removesuffix("_layerwise")]
    return dataclasses.replace(found, hyper={**found.hyper, **scope})


@every_case
@pytest.mark.parametrize(
    ("dtype", "setting"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"weight_rounding": "stochastic", "dense_state": "fp32"}),
        (torch.bfloat16, {"weight_rounding": "compensated"}),
    ],
    ids=str,
)
def test_it_is_the_normal_mode_to_the_bit(case: Case, dtype: torch.dtype, setting: dict[str, Any]) -> None:
    model, optimizer = build(case, dtype, **setting)
    other, reference = build(normal(case), dtype, **setting)
    norms = []
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        assert all(p.grad is None for p in model.parameters())
        assert optimizer.grad_norm is not None
        norms.append(optimizer.grad_norm.item())
    expected = train(other, reference, range(8))
    assert norms == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert_equal(model.parameters(), other.parameters())
    assert_same_state(optimizer, reference)


@every_case
def test_a_checkpoint_of_either_mode_resumes_in_the_other(case: Case) -> None:
    straight, optimizer = build(case)
    train(straight, optimizer, range(6))
    for begin, end in ((case, normal(case)), (normal(case), case), (case, case)):
        model, first = build(begin)
        train(model, first, range(3))
        loaded = through_a_file({"model": model.state_dict(), "optimizer": first.state_dict()})
        model, second = build(end)
        model.load_state_dict(loaded["model"])
        second.load_state_dict(loaded["optimizer"])
        train(model, second, range(3, 6))
        assert_equal(model.parameters(), straight.parameters())


@every_case
def test_there_is_one_gradient_at_a_time(case: Case) -> None:
    """Counted where torch would keep them: a hook on every parameter sees the others without a gradient."""
    model, optimizer = build(case)
    held: list[int] = []
    for parameter in model.parameters():
        parameter.register_hook(
            lambda grad: held.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        )
    train(model, optimizer, range(2))
    assert len(held) == 2 * len(list(model.parameters()))
    assert max(held) == 0
    assert optimizer.peak_gradient_bytes == max(p.nbytes for p in model.parameters())


def keeps_parts(case: Case) -> bool:
    """Whether parts of a gradient go into the state; else they stay where torch accumulates them."""
    options = case.method.check(case.hyper, case.name)
    error = any(key.startswith("error") for key in case.method.specs((64, 64), torch.float32, options))
    return error or case.method.put_aside_ is not None


@every_case
def test_accumulation_is_that_of_the_sum(case: Case) -> None:
    """Exactly with an exact error; with a quantized one, a tensor moves as the sum's quantization lets it."""
    microadam, in_state = case.name == "microadam_layerwise", keeps_parts(case)
    exact = (
        {"density": 1.0, "bits": 8, "value_dtype": "bf16"}
        if microadam
        else {"error_feedback": "fp32"}
        if "error_feedback" in case.method.options.defaults()
        else {}
    )
    model, optimizer = build(case, **exact)
    other, reference = build(normal(case), **exact)
    for step in range(4):
        for micro in range(3):
            loss = loss_of(model, batch(10 * step + micro)) / 3
            if micro < 2:
                with optimizer.accumulating():
                    loss.backward()
            else:
                assert all((p.grad is None) == in_state for p in model.layers[0].parameters() if p.ndim > 1)
                loss.backward()
            (loss_of(other, batch(10 * step + micro)) / 3).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    # MicroAdam keeps the parts in 8 bits until the last one comes
    tolerance = 0.05 if microadam else 1e-5
    for mine, theirs, start in zip(model.parameters(), other.parameters(), build(case)[0].parameters(), strict=True):
        moved = (theirs - start).norm()
        assert moved > 0
        assert (mine - theirs).norm() <= tolerance * moved + 1e-7
    counts = [state["step"] for state in optimizer.state.values()]
    assert counts == [4] * len(counts)


@pytest.mark.parametrize("lr", [1e-3, 0.0])
def test_what_only_an_early_micro_batch_reached_is_updated_too(lr: float) -> None:
    """With the error exact, as in the normal mode, where the gradient of that micro-batch is all there is.

    With lr = 0 the zero gradient that ends such a step is not a probe of the state's layout.
    """
    ends = []
    for optimizer_class in (LDAdam, LDAdamLayerwise):
        torch.manual_seed(0)
        first, second = nn.Linear(16, 40), nn.Linear(16, 40)
        params = [*first.parameters(), *second.parameters()]
        optimizer = optimizer_class(params, lr=lr, rank=4, error_feedback="fp32")
        inputs = torch.randn(3, 16)
        layerwise = isinstance(optimizer, LDAdamLayerwise)
        for _ in range(3):
            with optimizer.accumulating() if layerwise else contextlib.nullcontext():
                first(inputs).square().sum().backward()
            second(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert first.weight.grad is None
        assert [optimizer.state[p]["step"] for p in params] == [3] * 4
        ends.append([*params, optimizer.state[first.weight]["exp_avg"].abs()])
    *ends_of_params, _ = zip(*ends, strict=True)
    for mine, theirs in ends_of_params:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[0][-1], ends[1][-1], rtol=1e-4, atol=1e-6)


@every_case
def test_a_tensor_is_clipped_by_its_own_norm(case: Case) -> None:
    limit = 1e-3
    model, optimizer = build(case, clip_tensor_norm=limit)
    other, reference = build(normal(case))
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        loss_of(other, batch(step)).backward()
        norms = [p.grad.norm().item() for p in other.parameters()]
        assert min(norms) > limit
        for parameter in other.parameters():
            nn.utils.clip_grad_norm_([parameter], limit)
        lower_the_rates(reference, step)
        reference.step()
        reference.zero_grad()
        assert optimizer.grad_norm.item() == pytest.approx(torch.tensor(norms).norm().item(), rel=1e-5)
    assert_equal(model.parameters(), other.parameters())


@every_case
def test_what_cannot_be_right_is_refused_with_the_reason(case: Case) -> None:
    model, optimizer = build(case)
    loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"second gradient in one step.*accumulating"):
        loss_of(model, batch(1)).backward()
    model, optimizer = build(case)
    with optimizer.accumulating():
        loss_of(model, batch(0)).backward()
    if keeps_parts(case):
        with pytest.raises(RuntimeError, match=r"zero_grad\(\) in the middle"):
            optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(1))).backward()
    with pytest.raises(RuntimeError, match="gradient scaler"):
        scaler.step(optimizer)
    embedding = nn.Embedding(50, 20, sparse=True)
    sparse = case.build([("embedding.weight", embedding.weight)])
    with pytest.raises(RuntimeError, match=r"'embedding.weight' has a sparse gradient"):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert not sparse.state


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac", "sparse_ggt"])
def test_a_system_over_all_tensors_is_refused(name: str) -> None:
    """One for each tensor is the default; a checkpoint of a common system says so, too."""
    case, weight = CASES[f"{name}_layerwise"], nn.Parameter(torch.randn(20, 30))
    optimizer = case.build([weight])
    assert optimizer.param_groups[0]["scope"] == "tensor" and CASES[name].method.options.defaults()["scope"] == "model"
    with pytest.raises(ValueError, match=r"scope='model' needs the gradients of all parameters.*scope='tensor'"):
        case.build([weight], scope="model")
    with pytest.raises(ValueError, match="scope='model'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "scope": "model"})
    with pytest.raises(ValueError, match=r"saved with scope='model', this optimizer has scope='tensor'"):
        optimizer.load_state_dict(CASES[name].build([nn.Parameter(torch.randn(20, 30))]).state_dict())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("ldadam_layerwise", {"error_feedback": "none"}),
        ("microadam_layerwise", {"alpha": 0.1}),
        ("ldadam_layerwise", {"clip_tensor_norm": 1.0}),
    ],
)
def test_settings_that_leave_no_place_for_a_part_of_a_gradient(name: str, setting: dict[str, Any]) -> None:
    model, optimizer = build(CASES[name], **setting)
    key, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=f"{key}={value!r} cannot be combined with gradient accumulation"):  # noqa: SIM117
        with optimizer.accumulating():
            loss_of(model, batch(0)).backward()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match=r"optim='ldadam_layerwise' .*before DDP or FSDP.*use 'ldadam'"):
        LDAdamLayerwise([nn.Parameter(torch.randn(20, 30))])


def test_a_layer_used_twice_needs_checkpoints_that_are_not_reentrant() -> None:
    shared = nn.Linear(24, 24)
    optimizer = LDAdamLayerwise(shared.parameters(), rank=4)
    hidden = checkpoint(
        shared, checkpoint(shared, torch.ones(2, 24, requires_grad=True), use_reentrant=True), use_reentrant=True
    )
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        hidden.sum().backward()
    assert optimizer.state


def test_hooks_go_with_the_optimizer_or_when_told() -> None:
    for told in (False, True):
        model, optimizer = build(LAYERWISE[0])
        hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
        assert all(len(of_one) == 1 for of_one in hooks)
        before = [p.detach().clone() for p in model.parameters()]
        if told:
            optimizer.remove_hooks()
        else:
            del optimizer  # nothing else holds it: tests/optimizers/test_long_runs.py
        assert not any(hooks)
        loss_of(model, batch(0)).backward()
        assert all(torch.equal(p, b) and p.grad is not None for p, b in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True) if p.ndim > 1)


def test_the_newest_optimizer_of_a_parameter_acts_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, first = build(LAYERWISE[0])
    second = LAYERWISE[0].build(model.parameters())
    assert "another optimizer" in caplog.text and caplog.records[0].levelno == logging.WARNING
    train(model, second, range(1))
    assert second.state and not first.state


def test_copies_of_the_model_have_no_hooks_and_copies_of_the_optimizer_have() -> None:
    model, optimizer = build(LAYERWISE[0])
    twin = copy.deepcopy(model)
    assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())
    torch.save(model, io.BytesIO())
    twin_model, twin_optimizer = copy.deepcopy((model, optimizer))
    for each, its in ((model, optimizer), (twin_model, twin_optimizer)):
        train(each, its, range(3))
    assert_equal(model.parameters(), twin_model.parameters())
    assert twin_optimizer.state[twin_model.layers[0].weight]


def test_every_layerwise_string_is_a_mode_of_another() -> None:
    for name, entry in OPTIMIZERS.items():
        assert entry.optimizer_class.method.layerwise == name.endswith("_layerwise")
        if issubclass(entry.optimizer_class, Layerwise):
            assert get_entry(name.removesuffix("_layerwise")).optimizer_class is entry.optimizer_class.normal
            assert entry.optimizer_class.method.shaping == entry.optimizer_class.normal.method.shaping


def penalty(model: Model, step: int) -> None:
    hidden = model.embedding(batch(step)).detach().requires_grad_()
    (grad,) = torch.autograd.grad(
        model.norm(model.layers[0](hidden)[..., :16]).square().sum(), hidden, create_graph=True
    )
    grad.square().sum().backward()


def weights_in_the_loss(model: Model, step: int) -> None:
    (loss_of(model, batch(step)) + (model.layers[0].weight @ model.layers[1].weight).square().sum()).backward()


def repeated_under_checkpointing(model: Model, step: int) -> None:
    hidden = model.embedding(batch(step))
    for _ in range(3):
        hidden = checkpoint(model.layers[2], hidden, use_reentrant=False)
    hidden.square().mean().backward()


def reentrant_checkpointing(model: Model, step: int) -> None:
    hidden = model.embedding(batch(step))
    for layer in model.layers:
        hidden = checkpoint(layer, hidden, use_reentrant=True)
    hidden.square().mean().backward()


def partly_frozen_at_first(model: Model, step: int) -> None:
    model.layers[1].weight.requires_grad_(step > 0)
    loss_of(model, batch(step)).backward()


def run_out_of_memory(grad: Tensor) -> None:
    raise RuntimeError("out of memory")


def failing_half_way(model: Model, step: int) -> None:
    hidden = model.layers[0](model.embedding(batch(step)))
    if step == 1:
        hidden.register_hook(run_out_of_memory)
    with contextlib.suppress(RuntimeError):
        model.layers[1](hidden).square().mean().backward()


@every_case
@pytest.mark.parametrize(
    "backward",
    [
        penalty,
        weights_in_the_loss,
        repeated_under_checkpointing,
        reentrant_checkpointing,
        partly_frozen_at_first,
        failing_half_way,
    ],
    ids=lambda backward: backward.__name__,
)
def test_unusual_backward_passes_are_those_of_the_normal_mode(case: Case, backward: Any) -> None:
    (model, optimizer), (other, reference) = build(case), build(normal(case))
    for step in range(3):
        for each, its in ((model, optimizer), (other, reference)):
            backward(each, step)
            its.step()
            its.zero_grad()
    assert_equal(model.parameters(), other.parameters())
    assert_same_state(optimizer, reference)


@every_case
def test_gradients_that_were_used_cannot_be_cleared(case: Case) -> None:
    model, optimizer = build(case)
    saved = copy.deepcopy(optimizer.state_dict())
    failing_half_way(model, 1)
    with pytest.raises(RuntimeError, match=r"updates .* made to 2 of 9 tensors\. Call step\(\) first"):
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"second gradient .* one that failed needs step\(\)"):
        loss_of(model, batch(0)).backward()
    # who goes back to a checkpoint instead begins a new step
    optimizer.load_state_dict(saved)
    model.zero_grad()
    train(model, optimizer, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    torch.autograd.grad(loss_of(model, batch(3)), list(model.parameters()))
    assert_equal(model.parameters(), before)
    optimizer.zero_grad()


@every_case
def test_values_that_a_backward_pass_still_needs_are_not_lost_unnoticed(case: Case) -> None:
    """In the normal mode nothing moves before the end; here torch must say that it cannot go on."""
    model, _ = build(case)
    hidden = model.embedding(batch(0))
    # the gradient of the embedding needs the old weight when the layer has been updated
    through = functional.linear(hidden, model.layers[2].weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (through.square().sum() * model.layers[2](torch.ones(16)).sum()).backward()
    model, _ = build(case)
    loss = loss_of(model, batch(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second gradient"):
        loss.backward()


def test_what_is_unfrozen_later_counts_in_the_peak() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 48))
    model[0].requires_grad_(False)
    optimizer = LDAdamLayerwise(model.parameters(), rank=4)
    model[0].requires_grad_(True)
    model(torch.ones(2, 24)).sum().backward()
    optimizer.step()
    assert optimizer.peak_gradient_bytes == max(model[1].weight.nbytes, sum(p.nbytes for p in model[0].parameters()))
