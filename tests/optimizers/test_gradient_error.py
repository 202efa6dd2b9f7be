"""``error_feedback="grad"``: the run of ``"param"`` to the bit with the error in the gradients, or a clear refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_lowmem_optim import LDAdam, measure_state, plan_optimizer
from tests.memory.allocator import peak_bytes
from tests.optimizers.cases import assert_equal, assert_same_state, through_a_file

ZEROING: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad(False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Model(nn.Module):
    """Equal matrices, of which one is used twice and one only in every other step; a kernel, an embedding, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.kernel = nn.Conv1d(16, 32, 3, padding=1)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 30)
        self.reentrant: bool | None = None
        self.skips = True

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        hidden = self.kernel(self.embedding(tokens).mT).mT
        first, second, last = self.layers
        for layer in (first, second, second, *([] if self.skips and step % 2 else [last])):
            hidden = hidden + functional.gelu(self._call(layer, hidden))
        return self.head(self.norm(hidden))

    def _call(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer(hidden) if self.reentrant is None else checkpoint(layer, hidden, use_reentrant=self.reentrant)


def build(error_feedback: str, dtype: torch.dtype = torch.float32) -> tuple[Model, LDAdam]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    groups = [
        {"params": [*model.layers.parameters(), *model.kernel.parameters()]},
        {"params": [*model.head.parameters()], "error_feedback": "bf16"},
        {"params": [model.embedding.weight, *model.norm.parameters()], "rank": None},
    ]
    return model, LDAdam(groups, lr=1e-2, rank=4, weight_decay=0.1, error_feedback=error_feedback)


def loss_of(model: Model, step: int, micro_batch: int = 0) -> Tensor:
    tokens = torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(100 * step + micro_batch))
    logits = model(tokens, step)
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())


def train(model: Model, optimizer: LDAdam, steps: range, zero: str = "optimizer.zero_grad()") -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        ZEROING[zero](model, optimizer)


def kept_in_gradient(optimizer: LDAdam) -> list[nn.Parameter]:
    group = optimizer.param_groups[0]
    assert group["error_feedback"] == "grad"
    kept = [p for p in group["params"] if optimizer.method.compresses(p.shape, group)]
    assert len(kept) == 4
    return kept


@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("zero", ZEROING)
def test_it_is_error_feedback_param_to_the_bit(zero: str, reentrant: bool | None) -> None:
    (model, optimizer), (other, reference) = build("grad"), build("param")
    model.reentrant = other.reentrant = reentrant
    # a tensor that misses a step then has zeros, with which "param" would step and "grad" does not
    model.skips = other.skips = "False" not in zero
    for step in range(8):
        train(model, optimizer, range(step, step + 1), zero)
        train(other, reference, range(step, step + 1), zero)
        assert all(p.grad is None for p in kept_in_gradient(optimizer))
    assert_equal(model.parameters(), other.parameters())
    assert_same_state(optimizer, reference)
    # the last layer was reached in every other step, and kept its error in between
    assert [optimizer.state[layer.weight]["step"] for layer in model.layers] == [8, 8, 4 if model.skips else 8]


def test_gradients_set_by_hand_are_added_in_the_step_and_left_alone() -> None:
    (model, optimizer), (other, reference) = build("grad"), build("param")
    for step in range(6):
        for each, its in ((model, optimizer), (other, reference)):
            if step == 3:  # in between, as usual
                train(each, its, range(3, 4))
                continue
            params = [p for g in its.param_groups for p in g["params"]]
            grads = torch.autograd.grad(loss_of(each, step), params, allow_unused=True)
            before = [None if grad is None else grad.clone() for grad in grads]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            its.step()
            its.zero_grad()
            assert all(grad is None or torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))
    assert_equal(model.parameters(), other.parameters())
    assert_same_state(optimizer, reference)


@every_dtype
@pytest.mark.parametrize("reentrant", [None, True], ids=["three micro-batches", "reentrant checkpointing"])
def test_pieces_of_a_gradient_are_added_one_after_the_other(dtype: torch.dtype, reentrant: bool | None) -> None:
    """An oracle that sees every piece: ((ξ + g1) + g2) + g3, in the parameter's dtype, is what the step uses."""
    model, optimizer = build("grad", dtype)
    model.reentrant = reentrant
    kept = kept_in_gradient(optimizer)
    for step in range(5):
        expected = {p: optimizer.state[p]["error"].view_as(p).clone() for p in kept if optimizer.state.get(p)}
        pieces: dict[nn.Parameter, int] = dict.fromkeys(kept, 0)

        def note(
            piece: Tensor,
            *,
            param: nn.Parameter,
            pieces: dict[Any, int] = pieces,
            expected: dict[Any, Tensor] = expected,
        ) -> None:
            pieces[param] += 1
            expected[param] = expected[param] + piece if param in expected else piece.clone()

        handles = [p.register_hook(partial(note, param=p)) for p in kept]
        for number in range(1 if reentrant else 3):
            loss_of(model, step, number).backward()
        for handle in handles:
            handle.remove()
        assert max(pieces.values()) == (2 if reentrant else 3)
        for param in kept:
            assert (param.grad is None) == (pieces[param] == 0)
            if param.grad is not None:
                assert torch.equal(param.grad, expected[param])
        # clipping scales gradient and error
        nn.utils.clip_grad_norm_(kept, 1e-3)
        twin = copy_of_param_mode(model, optimizer, kept)
        optimizer.step()
        for param, (theirs, state) in twin.items():
            assert torch.equal(param, theirs)
            assert torch.equal(optimizer.state[param]["error"].view(-1), state["error"].view(-1))


def copy_of_param_mode(
    model: Model, optimizer: LDAdam, kept: list[nn.Parameter]
) -> dict[nn.Parameter, tuple[nn.Parameter, dict[str, Any]]]:
    """Step the same parameters and states by ``"param"`` without an error, with g + ξ as the gradient."""
    twin = {}
    for param in kept:
        if param.grad is None:
            continue
        theirs = nn.Parameter(param.detach().clone())
        reference = LDAdam([theirs], lr=1e-2, rank=4, weight_decay=0.1, error_feedback="param")
        if param in optimizer.state:
            reference.state[theirs] = copy.deepcopy(dict(optimizer.state[param]))
            reference.state[theirs]["error"].zero_()
        theirs.grad = param.grad.clone()
        reference.step()
        twin[param] = (theirs, dict(reference.state[theirs]))
    return twin


def test_frozen_parameters_join_when_they_thaw() -> None:
    torch.manual_seed(0)
    model = Model()
    model.layers.requires_grad_(False)
    other = copy.deepcopy(model)
    optimizer = LDAdam(model.parameters(), rank=4, error_feedback="grad")
    reference = LDAdam(other.parameters(), rank=4, error_feedback="param")
    for each, its in ((model, optimizer), (other, reference)):
        train(each, its, range(2))
        each.layers.requires_grad_(True)
        train(each, its, range(2, 6))
    assert_equal(model.parameters(), other.parameters())
    weight = model.layers[0].weight
    loss_of(model, 6).backward()
    # with a hook by now: the error is in
    assert weight.grad is not None
    assert weight.grad.data_ptr() == optimizer.state[weight]["error"].data_ptr()


@every_dtype
def test_there_is_one_buffer_a_parameter_and_for_a_moment_one_gradient(
    dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Counted by the allocator over whole steps, whose activations are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's profiler sees what the calling thread allocates
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.manual_seed(0)
    # too large to share a call
    model = nn.Sequential(*[nn.Linear(544, 544, bias=False) for _ in range(6)]).to(dtype)
    optimizer = LDAdam(model.parameters(), rank=4, error_feedback="grad")
    batch = torch.randn(4, 544, dtype=dtype)

    def step() -> None:
        model(batch).float().square().mean().backward()
        optimizer.step()
        model.zero_grad()

    gradient = model[0].weight.nbytes
    activations = 2**17
    first = peak_bytes(step)
    planned = plan_optimizer(optimizer)
    # without the constant for slices and libraries, larger than these gradients
    temporaries = LDAdam.method.scratch_bytes(optimizer.param_groups) - LDAdam.method.scratch_bytes([])
    # all gradients, state, and the first buffer beside the first gradient; then never more than one gradient
    assert 6 * gradient < first <= 12 * gradient + planned.total_bytes + temporaries + activations
    for _ in range(3):
        later = peak_bytes(step)
        assert later <= max(gradient + activations, temporaries + activations) < 6 * gradient
    measured = measure_state(optimizer)
    assert measured == planned
    assert "error" not in measured.component_bytes
    assert measured.in_gradient_bytes == 6 * gradient
    without = LDAdam(model.parameters(), rank=4, error_feedback="none")
    assert plan_optimizer(without).component_bytes == planned.component_bytes


def test_the_buffer_counts_as_state_while_another_gradient_is_beside_it() -> None:
    model, optimizer = build("grad")
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    optimizer.step()
    weight = model.layers[0].weight
    weight.grad = torch.zeros_like(weight)
    measured, planned = measure_state(optimizer), plan_optimizer(optimizer)
    assert measured.in_gradient_bytes == planned.in_gradient_bytes - weight.nbytes
    assert measured.total_bytes == planned.total_bytes + weight.nbytes


@every_dtype
def test_resume_between_backward_passes_is_bit_for_bit(dtype: torch.dtype) -> None:
    straight, optimizer = build("grad", dtype)
    train(straight, optimizer, range(8), "model.zero_grad()")
    model, first = build("grad", dtype)
    train(model, first, range(4))
    loaded = through_a_file({"model": model.state_dict(), "optimizer": first.state_dict()})
    resumed, second = build("grad", dtype)
    resumed.load_state_dict(loaded["model"])
    second.load_state_dict(loaded["optimizer"])
    assert any(state["error"].any() for state in second.state.values() if "error" in state)
    train(resumed, second, range(4, 8))
    assert_equal(resumed.parameters(), straight.parameters())
    assert_same_state(second, optimizer)


def test_loading_gives_up_the_step_that_has_begun() -> None:
    model, optimizer = build("grad")
    train(model, optimizer, range(3))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 4))
    end = copy.deepcopy(model)
    loss_of(model, 9).backward()
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    model.zero_grad()
    train(model, optimizer, range(3, 4))
    assert_equal(model.parameters(), end.parameters())


def test_copies_have_hooks_of_their_own() -> None:
    model, optimizer = build("grad")
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for each, its in ((model, optimizer), (twin, twin_optimizer)):
        loss_of(each, 2).backward()
        for param in kept_in_gradient(its):
            assert param.grad is not None
            assert param.grad.data_ptr() == its.state[param]["error"].data_ptr()
        its.step()
        train(each, its, range(3, 5))
    assert_equal(model.parameters(), twin.parameters())


Act = Callable[[Model, LDAdam], Any]


def after_backward(*acts: Act) -> Act:
    """Act between a backward pass and ``step()``."""

    def run(model: Model, optimizer: LDAdam) -> None:
        for act in (another_backward, *acts):
            act(model, optimizer)

    return run


def another_backward(model: Model, optimizer: LDAdam) -> None:
    loss_of(model, 2).backward()


def replace(model: Model, optimizer: LDAdam) -> None:
    weight = model.layers[0].weight
    weight.grad = torch.ones_like(weight)


def take_a_step(model: Model, optimizer: LDAdam) -> None:
    optimizer.step()


def keep_the_graph(model: Model, optimizer: LDAdam) -> None:
    loss_of(model, 2).backward(create_graph=True)


def use_a_scaler(model: Model, optimizer: LDAdam) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 2)).backward()
    scaler.step(optimizer)


def gradients_of_another_dtype(model: Model, optimizer: LDAdam) -> None:
    model.layers[0].weight.grad_dtype = torch.bfloat16
    loss_of(model, 2).backward()


drop, zero, optimizer_drop, optimizer_zero = ZEROING.values()
REFUSALS: dict[str, tuple[Act, str]] = {
    "dropped by the model": (after_backward(drop, another_backward), "replaced or dropped after"),
    "zeroed by the model": (after_backward(zero, another_backward), "zeroed or changed in place"),
    "dropped by the optimizer": (after_backward(optimizer_drop), r"^zero_grad\(\) would drop"),
    "zeroed by the optimizer": (after_backward(optimizer_zero), r"^zero_grad\(\) would drop"),
    "dropped before the step": (
        after_backward(drop, take_a_step),
        "replaced or dropped after",
    ),
    "replaced before the step": (
        after_backward(replace, take_a_step),
        "parameter 0 .*replaced or dropped after",
    ),
    "saved": (after_backward(lambda _, optimizer: optimizer.state_dict()), "cannot be saved between backward pass and"),
    "copied": (after_backward(lambda _, optimizer: copy.deepcopy(optimizer)), "cannot be copied between backward pass"),
    "graph": (keep_the_graph, "create_graph=True"),
    "graph in a later micro-batch": (after_backward(keep_the_graph), "replaced or dropped after"),
    "scaler": (use_a_scaler, r"gradient scaler .*bf16=True"),
    "dtype": (gradients_of_another_dtype, "float32 with a gradient of torch.bfloat16"),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("what", REFUSALS)
def test_what_would_lose_the_error_is_refused(what: str) -> None:
    act, message = REFUSALS[what]
    model, optimizer = build("grad")
    train(model, optimizer, range(2))
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=message):
        act(model, optimizer)
    assert_equal(model.parameters(), before.parameters())
    # and with an error that has a place of its own it is not
    other, reference = build("4bit")
    train(other, reference, range(2))
    act(other, reference)


@pytest.mark.parametrize("zero", ZEROING)
def test_before_the_first_step_a_gradient_may_be_dropped(zero: str) -> None:
    (model, optimizer), (other, reference) = build("grad"), build("grad")
    loss_of(model, 5).backward()
    optimizer.state_dict()
    copy.deepcopy(optimizer)
    ZEROING[zero](model, optimizer)
    train(model, optimizer, range(3))
    train(other, reference, range(3))
    assert_equal(model.parameters(), other.parameters())


def test_several_processes_and_layerwise_mode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowmem_optim.registry import LDAdamLayerwise

    with pytest.raises(ValueError, match=r"error_feedback='grad' .*layer-wise mode frees.*'4bit', or the normal mode"):
        LDAdamLayerwise([nn.Parameter(torch.zeros(20, 30))], error_feedback="grad")
    model, optimizer = build("grad")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match=r"error_feedback='grad' .*before DDP or FSDP.*'4bit'"):
        build("grad")
    with pytest.raises(NotImplementedError, match="before DDP or FSDP"):
        train(model, optimizer, range(1))
    build("param")


def test_a_failed_backward_pass_can_be_abandoned() -> None:
    """What has reached the errors is used by later steps, so that nothing is lost of it; the rest is dropped."""
    model, optimizer = build("grad")
    train(model, optimizer, range(2))
    kept = kept_in_gradient(optimizer)
    before = [optimizer.state[p]["error"].clone() for p in kept]
    loss_of(model, 2).backward()
    grown = [optimizer.state[p]["error"].clone() for p in kept]
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"abandon_step\(\)"):
        loss_of(model, 3).backward()
    assert optimizer.abandon_step() == len(kept)
    assert all(p.grad is None for p in model.parameters())
    for param, sum_, error in zip(kept, grown, before, strict=True):
        assert torch.equal(optimizer.state[param]["error"], sum_) and not torch.equal(sum_, error)
    assert optimizer.abandon_step() == 0
    train(model, optimizer, range(4, 6))
    optimizer.state_dict()


def test_optimizers_that_keep_no_error_in_gradients_have_nothing_to_do_with_them() -> None:
    """No hook; a group that comes later brings it."""
    for model, _ in (build(error_feedback) for error_feedback in ("4bit", "param", "none")):
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model, optimizer = build("grad")
    assert {len(p._post_accumulate_grad_hooks) for p in kept_in_gradient(optimizer)} == {1}
    assert not model.head.weight._post_accumulate_grad_hooks
    # where nothing is compressed there is no error
    dense, late = (nn.Parameter(torch.zeros(20, 30)) for _ in range(2))
    optimizer = LDAdam([dense], rank=None, error_feedback="grad")
    assert not dense._post_accumulate_grad_hooks
    optimizer.add_param_group({"params": [late], "rank": 4})
    assert len(late._post_accumulate_grad_hooks) == 1
