"""A recorded step, replayed, is ``step()``: on a GPU; and on a CPU that notes what it is given and repeats it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lowmem_optim import OPTIMIZERS, CapturedStep, LDAdam
from hf_lowmem_optim.engine import buckets, capture
from hf_lowmem_optim.ops import gram, low_rank
from hf_lowmem_optim.ops.constants import keeping, to_device
from hf_lowmem_optim.ops.step_numbers import Formulas, argument, factor
from tests.ops.backends import BF16, DEVICE, EMULATED, FP32, ON_GPU, QUIET, WAITING, Use
from tests.optimizers.cases import CASES

pytestmark = QUIET
triton = pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from hf_lowmem_optim.ops.triton.device import address_table  # noqa: E402 (needs triton)
from hf_lowmem_optim.ops.triton.tables import launches  # noqa: E402 (needs triton)

#: What launches a kernel.
LAUNCH: tuple[type, str] = (JITFunction, "run") if EMULATED else (GridExecutor, "__call__")
#: A vector, and matrices of two shapes, of which one is tall and no multiple of a block.
SHAPES = [(10,), (4, 32), (4, 32), (9, 8)]
SPARSE: dict[str, Any] = {"density": 0.1, "block_size": 64, "window": 2}
MICROADAM: dict[str, Any] = {**SPARSE, "min_compress_size": 100}
COMPENSATED: dict[str, Any] = {"weight_rounding": "compensated", "dense_state": "fp32"}
#: Method, options, the weights' dtype.
Setting = tuple[str, dict[str, Any], torch.dtype]
SETTINGS: dict[str, Setting] = {
    "microadam": ("microadam", MICROADAM, BF16),
    "microadam alpha": ("microadam", {**MICROADAM, "alpha": 0.25, "value_dtype": "8bit"}, FP32),
    "microadam window": ("microadam", {**MICROADAM, **COMPENSATED, "bias_correction": "window"}, BF16),
    "microadam looped": ("microadam", {**MICROADAM, "window": 17}, BF16),
    "sparse_mfac": ("sparse_mfac", {**SPARSE, **COMPENSATED}, BF16),
    "sparse_mfac momentum": ("sparse_mfac", {**SPARSE, "momentum": 0.5, "scope": "tensor"}, FP32),
    "ldadam": ("ldadam", {"rank": 3}, FP32),
    "ldadam high rank": ("ldadam", {"rank": 17, "error_feedback": "8bit", **COMPENSATED}, BF16),
    "ldadam none": ("ldadam", {"rank": 3, "error_feedback": "none"}, BF16),
    "lowrank_mfac": ("lowrank_mfac", {"rank": 2, "window": 2, **COMPENSATED}, BF16),
    "lowrank_mfac momentum": ("lowrank_mfac", {"rank": 2, "window": 2, "momentum": 0.5, "scope": "tensor"}, BF16),
}
#: What an interpreter, which takes seconds for each, need not repeat.
LIKE_OTHERS = ("microadam", "microadam looped", "ldadam none", "lowrank_mfac momentum")
#: Of AdamW alone, which takes no time.
DENSE: Setting = ("ldadam", {"rank": 100}, FP32)


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Notes torch's operations and the launches of kernels instead of what they compute, to repeat them.

    Args:
        tables: What launches read beside what is the optimizer's or made by the step: it stays as it is.
    """

    def __init__(self, tables: list[Tensor]) -> None:
        super().__init__()
        self.actions: list[Callable[[], Any]] = []
        self.tables, self.own = tables, list(touched())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        assert not name.startswith(WAITING), f"{func} waits for the device"
        assert name != "lift_fresh", "numbers of the host, which a graph would read when they are gone"
        result = func(*args, **kwargs)
        self.own += leaves(result)
        if func._schema.is_mutable:
            self.actions.append(lambda: func(*args, **kwargs))
        elif not func.is_view and "empty" not in name:
            made = leaves(result)
            self.actions.append(lambda: [a.copy_(b) for a, b in zip(made, leaves(func(*args, **kwargs)), strict=True)])
        return result

    def launch(self, original: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> None:
            numbers = CURRENT[-1].recording._words
            stays = {tensor.untyped_storage().data_ptr() for tensor in [*self.own, *self.tables, numbers]}
            assert {tensor.untyped_storage().data_ptr() for tensor in leaves((args, kwargs))} <= stays
            self.actions.append(lambda: original(*args, **kwargs))

        return noted

    def replay(self) -> None:
        for action in self.actions:
            action()


@pytest.fixture
def recorder(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU be taken for a GPU."""
    use("triton")
    monkeypatch.setattr(low_rank, "_READABLE", ())
    monkeypatch.setattr(gram, "_READABLE", ())
    monkeypatch.setattr(buckets, "_rounds_alike", lambda _: True)

    def graph_of(run: Callable[[], None], _: torch.device) -> Callable[[], None]:
        owner, name = LAUNCH
        before = [(part, part.clone()) for part in touched()]
        with pytest.MonkeyPatch.context() as patch, keeping() as tables, Recording(tables) as recording:
            patch.setattr(owner, name, recording.launch(getattr(owner, name)))
            run()
        for part, was in before:  # recording computes nothing
            part.copy_(was)
        return recording.replay

    monkeypatch.setattr(capture, "_graph_of", graph_of)


#: The optimizer at hand: what belongs to it is as it was after a recording.
CURRENT: list[Any] = []


def touched() -> Iterator[Tensor]:
    for state in CURRENT[-1].state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    yield from (param for group in CURRENT[-1].param_groups for param in group["params"])


class Twins:
    """An optimizer that takes its steps, and one that replays them."""

    def __init__(self, name: str, options: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(10,), (18, 19)] if options.get("rank") == 17 else SHAPES
        values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        self.params = [[nn.Parameter(value.clone()) for value in values] for _ in range(2)]
        self.plain, self.recorded = (self.build(name, options, params) for params in self.params)
        CURRENT.append(self.recorded)
        self.step = CapturedStep(self.recorded)
        for param in self.params[1]:
            param.grad = torch.zeros_like(param)
        self.count = 0

    @staticmethod
    def build(name: str, options: dict[str, Any], params: list[nn.Parameter]) -> Any:
        """With a group that AdamW has."""
        cls = OPTIMIZERS[name].optimizer_class
        key, off = cls.method.switch
        groups = [{"params": params[1:]}, {"params": params[:1], key: off, "weight_decay": 0.25}]
        return cls(groups, lr=2**-6, weight_decay=0.125, **options)

    def take(self, *, absent: bool = False) -> None:
        """Take a step of both and compare them to the bit; with other rates than before, powers of two."""
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        for number, (plain, recorded) in enumerate(zip(*self.params, strict=True)):
            grad = torch.randn(plain.shape, generator=generator).to(plain)
            plain.grad = grad if number or not absent else None
            if plain.grad is None:
                recorded.grad = None
            elif recorded.grad is None:
                recorded.grad = grad.clone()
            else:
                recorded.grad.copy_(grad)
        for optimizer in (self.plain, self.recorded):
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] = 2.0 ** -(6 + number + self.count % 3)
        self.plain.step()
        self.step()
        for plain, recorded in zip(*self.params, strict=True):
            assert torch.equal(plain, recorded)
            mine, theirs = self.recorded.state[recorded], self.plain.state[plain]
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                same = torch.equal(mine[key], value) if isinstance(value, Tensor) else mine[key] == value
                assert same, (self.count, key)

    def go_on(self, steps: int, replays: int) -> None:
        """Take steps of which so many are replays."""
        before = self.step.replays
        for _ in range(steps):
            self.take()
        assert self.step.replays - before == replays


def check_replays(setting: Setting, device: str) -> None:
    twins = Twins(*setting, device)
    for _ in range(5):
        twins.take()
    # all but a first step and one that prepares; a window that fills takes another
    assert twins.step.replays == (2 if setting[1].get("window") == 17 else 3)


@pytest.mark.parametrize("name", [name for name in SETTINGS if EMULATED or name not in LIKE_OTHERS])
def test_replays_are_steps(name: str, recorder: None) -> None:
    check_replays(SETTINGS[name], "cpu")


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_GPU) for name in SETTINGS])
def test_a_cuda_graph_of_a_step_replays(name: str) -> None:
    check_replays(SETTINGS[name], DEVICE)


def test_what_changes_is_recorded_again(recorder: None) -> None:
    """Gradients, options, state that are others; then it goes on."""
    twins = Twins(*DENSE)

    twins.go_on(4, 2)
    for param in twins.params[1]:
        param.grad = None
    twins.go_on(3, 2)
    for optimizer in (twins.plain, twins.recorded):
        optimizer.param_groups[0]["betas"] = (0.5, 0.75)
    twins.go_on(3, 2)
    for optimizer in (twins.plain, twins.recorded):
        optimizer.load_state_dict(optimizer.state_dict())
    twins.go_on(3, 2)
    twins.take(absent=True)
    twins.go_on(3, 2)
    for optimizer, params in zip((twins.plain, twins.recorded), twins.params, strict=True):
        optimizer.step()  # of both, beside a recording
        assert all(optimizer.state[param]["step"] >= 17 for param in params[1:])
    twins.go_on(2, 2)
    for optimizer, params in zip((twins.plain, twins.recorded), twins.params, strict=True):
        for param in params:
            optimizer.state[param] = dict(optimizer.state[param])
    twins.go_on(3, 2)
    for steps in (1, 2):  # once a step has been recorded, and when the next one would be
        for optimizer, params in zip((twins.plain, twins.recorded), twins.params, strict=True):
            optimizer.state[params[0]]["step"] += steps
        twins.go_on(steps, steps - 1)


def test_parameters_that_never_had_a_gradient_do_not_keep_a_step_from_being_recorded(recorder: None) -> None:
    """One that had is told that it has none, in a system of several."""
    twins = Twins("sparse_mfac", {"density": None}, FP32)
    for _ in range(4):
        twins.take(absent=True)
    assert twins.step.replays == 2
    twins.take()
    for _ in range(3):
        twins.take(absent=True)
    assert twins.step.replays == 2


def test_what_a_replay_cannot_do_is_refused_also_later(recorder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(*DENSE)
    square = nn.Parameter(torch.ones(3, 3))
    for optimizer, params in zip((twins.plain, twins.recorded), twins.params, strict=True):
        params.append(nn.Parameter(square.detach().clone()))
        optimizer.add_param_group({"params": params[-1:]})

    def refuses(error: type[Exception], says: str) -> None:
        counts = [twins.recorded.state[param]["step"] for param in twins.params[1]]
        before = [param.clone() for param in twins.params[1]]
        with pytest.raises(error, match=says):
            twins.step()
        assert counts == [twins.recorded.state[param]["step"] for param in twins.params[1]]
        assert all(torch.equal(param, was) for param, was in zip(twins.params[1], before, strict=True))

    twins.go_on(4, 2)
    for register in (twins.recorded.register_step_post_hook, register_optimizer_step_post_hook):
        hook = register(lambda *_: None)
        refuses(NotImplementedError, "hooks of its step")
        hook.remove()
        twins.go_on(3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_initialized", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        refuses(RuntimeError, "outside of the graph")
    twins.go_on(1, 1)
    transposed = twins.params[1][-1]
    transposed.data = transposed.data.T
    refuses(NotImplementedError, "not contiguous")


def test_a_recording_is_made_on_a_stream_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own is of the GPU on which somebody recorded first: what is launched on another one would be run."""
    streams: list[Any] = []

    def graph(_: Any, pool: None, stream: Any, mode: str) -> Any:
        streams.append(stream)
        return nullcontext()

    for name, fake in {"CUDAGraph": Mock, "Stream": lambda device: [device], "device": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture._stream_of.cache_clear()
    for index in (0, 1, 0):
        capture._graph_of(lambda: None, torch.device("cuda", index))
    capture._stream_of.cache_clear()
    assert streams == [[torch.device("cuda", index)] for index in (0, 1, 0)] and streams[0] is streams[2]


def test_tables_of_a_step_are_there_for_the_next_one() -> None:
    """Those of many launches, of tensors that are not aligned, and of parameters that are plain tensors."""
    several = torch.zeros(300, 4).unbind()
    first = [address_table([each]) for each in several]
    assert all(address_table([each]) is table for each, table in zip(several, first, strict=True))
    memo: dict[str, Any] = {}
    for odd in ([torch.zeros(33)[1:], torch.zeros(32)], [torch.zeros(32), torch.zeros(33)[1:]]):
        found = [launches(odd, lambda place: (place,), lambda place: 1, memo, "some")[0] for _ in range(2)]
        assert found[0] is found[1] and [launch.which for launch in found[0]] in ([[0], [1]], [[1], [0]])
        assert {launch.which[0] for launch in found[0] if launch.is_aligned} == {int(odd[0].data_ptr() % 16 != 0)}
    assert len(memo) == 1, "of ever other patterns the last one is kept"
    param = torch.ones(4, 3, requires_grad=True)
    param.grad = torch.ones(4, 3)
    optimizer = LDAdam([param])
    optimizer.step()
    assert optimizer._arrangements


def test_a_window_that_fills_is_recorded_again(recorder: None) -> None:
    """Rows count once they are written: each such step differs from the one before."""
    twins = Twins("microadam", {**MICROADAM, "window": 5, "min_compress_size": 120}, FP32)
    for _ in range(8):
        twins.take()
    assert 2 <= twins.step.replays <= 5


def test_gradients_that_move_are_told(recorder: None) -> None:
    twins = Twins(*DENSE)
    with pytest.warns(UserWarning, match=r"zero_grad\(set_to_none=False\)"):
        for _ in range(6):
            kept = [param.grad for param in twins.params[1]]
            twins.take()
            for param in twins.params[1]:
                param.grad = None
            assert len(kept) == len(SHAPES)
    assert twins.step.replays == 0


def test_what_fails_while_it_is_recorded_has_no_effect(recorder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(*DENSE)
    twins.take()
    twins.take()
    graph_of = capture._graph_of

    def fail(run: Callable[[], None], device: torch.device) -> None:
        graph_of(run, device)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(capture, "_graph_of", fail)
    before = [param.clone() for param in twins.params[1]]
    with pytest.raises(RuntimeError, match="out of memory"):
        twins.step()
    assert all(torch.equal(param, was) for param, was in zip(twins.params[1], before, strict=True))
    monkeypatch.setattr(capture, "_graph_of", graph_of)
    for _ in range(3):
        twins.take()
    assert twins.step.replays == 2


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].method.captured])
def test_other_methods_say_that_they_cannot(name: str, recorder: None) -> None:
    optimizer = CASES[name].build([nn.Parameter(torch.ones(20, 30))])
    with pytest.raises(NotImplementedError, match=f"a step of {type(optimizer).__name__} cannot be recorded: it "):
        CapturedStep(optimizer)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparse_mfac", {"block_size": 16384}, "block_size=16384 of a parameter group; it takes at most 8192"),
        ("microadam", {"block_size": 96, "quant_block_size": 96}, "quant_block_size=96 of a parameter group; it takes"),
        ("ldadam", {"weight_rounding": "stochastic"}, "weight_rounding='stochastic' of a parameter group; it takes"),
        ("microadam", {"weight_rounding": "compensated", "alpha": 0.25}, "alpha=0.25 of a parameter group with"),
        ("ldadam", {"stochastic_rounding": True}, "stochastic_rounding=True of a parameter group; it takes"),
        ("ldadam", {"error_feedback": "grad"}, "it acts on gradients during the backward pass"),
    ],
)
def test_options_that_no_recording_has_are_refused(
    name: str, options: dict[str, Any], message: str, recorder: None
) -> None:
    optimizer = OPTIMIZERS[name].optimizer_class([nn.Parameter(torch.ones(20, 30).bfloat16())], **options)
    with pytest.raises(NotImplementedError, match=message):
        CapturedStep(optimizer)


def test_what_is_no_optimizer_of_ours_or_on_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(20, 30))
    with pytest.raises(TypeError, match="takes an optimizer of this package, got AdamW"):
        CapturedStep(torch.optim.AdamW([param]))
    with pytest.raises(TypeError, match="takes an optimizer of this package, got type"):
        CapturedStep(LDAdam)
    with pytest.raises(NotImplementedError, match="its parameters are on no device, instead of one GPU"):
        CapturedStep(LDAdam([{"params": []}]))
    optimizer = LDAdam([param])
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")  # which waits, as one on a GPU would
    with pytest.raises(NotImplementedError, match="lr of a parameter group is on meta; it takes a number"):
        CapturedStep(optimizer)
    with pytest.raises(NotImplementedError, match="its parameters are on cpu, where the backend is"):
        CapturedStep(LDAdam([param]))
    optimizer = LDAdam([param])
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="hooks of its step"):
        CapturedStep(optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="numbers of the host"):
        to_device(torch.ones(2), torch.device("cuda"))


def test_formulas_are_computed_anew() -> None:
    """By the operations of Python on numbers of its own, in their order."""
    formulas, now = Formulas(torch.device("cpu")), {"t": 3}
    t = formulas.read("t", lambda: now["t"])
    assert t is formulas.read("t", lambda: 5) and t - 1 is t - 1
    correction = 0.5 / (1 - 0.9**t) ** 0.5
    row, rate = (t - 1) % 4, factor(2 * correction)
    assert t > 2 and 0 <= row < 4
    places = argument(row, int), argument(correction)
    assert [place.dtype for place in places] == [torch.int32, torch.float32]
    for now["t"] in (3, 4, 5):
        assert formulas.renew()
        formulas.write()
        expected = torch.tensor(0.5 / (1 - 0.9 ** now["t"]) ** 0.5)
        assert places[0].item() == now["t"] - 1 & 3 and places[1].item() == expected and rate == 2 * expected
    now["t"] = 2
    assert not formulas.renew()
    ones = torch.ones(2)
    for wrong in (
        lambda: float(t),
        lambda: ones.mul_(t),
        lambda: ones.add_(1, alpha=t),
        lambda: ones[t],
        lambda: t & 1,
    ):
        with pytest.raises((TypeError, IndexError)):
            wrong()
