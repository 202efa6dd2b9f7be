"""``step()`` as a CUDA graph: recorded once, and replayed with the numbers of each step.

Where many small tensors make a step, the host takes longer to launch it than the GPU to compute it. A replay launches
everything at once. Counts, rates and what else changes stay on the host, where a checkpoint and a schedule find them:
``ops/step_numbers.py`` brings what follows from them to the device before each replay.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from hf_lowmem_optim.engine.arrangement import Live
from hf_lowmem_optim.engine.coupled import SHARED_STEP
from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.ops.constants import keeping
from hf_lowmem_optim.ops.dispatch import chosen_backend
from hf_lowmem_optim.ops.step_numbers import Formulas, Number
from hf_lowmem_optim.ops.window import MAX_FUSED_BLOCK

__all__ = ["CapturedStep", "StepFormulas", "refuse_capture"]

#: After how many steps without a replay a user is told.
_MOST_MOVES = 3


class StepFormulas(Formulas):
    """The numbers of a step of an optimizer: its counts, its rates, and what follows from them."""

    def count(self, state: dict[str, Any], key: str) -> Number:
        """Return a count that a state has, as the number that it will be in each step; equal ones are one."""
        return self.read((key, state[key]), lambda: state[key])

    def options_of(self, optimizer: Any, live: Sequence[Live]) -> dict[int, Options]:
        """Return the options of each group, by its id, with a learning rate that is read anew for each step."""
        found: dict[int, Options] = {}
        for group in {id(group): group for _, _, group in live}.values():
            options = found[id(group)] = copy.copy(optimizer._options_of(group))
            rate = self.read(("lr", id(group)), functools.partial(_rate, optimizer, group))
            object.__setattr__(options, "lr", rate)
        return found


def _rate(optimizer: Any, group: dict[str, Any]) -> float:
    return float(optimizer._options_of(group).lr)


class CapturedStep:
    """Calls an optimizer's ``step()`` as a CUDA graph: for many small tensors, which launches keep a GPU waiting for.

    The first calls take their steps without a graph, which compiles what a graph needs, and the next one records it.
    From then on a call counts, computes the step's numbers on the host, and replays. The weights become what ``step()``
    makes of them, but that AdamW's part has its rate in float32, as torch's has with a rate that is a tensor.

    A graph knows the addresses of weights, state and gradients. Whenever one of them is elsewhere, other parameters
    have gradients, an option other than ``lr`` has changed, or a state was loaded, steps are taken without a graph, and
    recorded again. So gradients must stay where they are: ``zero_grad(set_to_none=False)``. While it lives, a graph
    keeps the memory that a step needs beside its state.

    Example:
        >>> step = CapturedStep(optimizer)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     step()
        ...     optimizer.zero_grad(set_to_none=False)

    Attributes:
        replays: How many steps were replays.
    """

    def __init__(self, optimizer: Any) -> None:
        """Prepare; nothing is recorded yet.

        Args:
            optimizer: MicroAdam, SparseMFAC, LDAdam or LowRankMFAC, with all parameters on one GPU.

        Raises:
            TypeError: It is no optimizer of this package.
            NotImplementedError: A step of it cannot be recorded, for the reason that the error says.
        """
        if isinstance(optimizer, type) or not hasattr(optimizer, "recording"):
            raise TypeError(f"CapturedStep takes an optimizer of this package, got {type(optimizer).__name__}")
        _refuse_unrecordable(optimizer)
        self._optimizer = optimizer
        self.replays = 0
        self._moves = 0
        self._known: list[Any] | None = None
        self._formulas: StepFormulas | None = None
        self._replay: Callable[[], None] | None = None
        self._tables: list[Tensor] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """Take a step, as ``optimizer.step()`` does.

        Raises:
            NotImplementedError: A step cannot be recorded any more, for the reason that the error says. Nothing has
                been updated then.
            RuntimeError: Somebody else captures a CUDA graph. Likewise.
        """
        optimizer = self._optimizer
        refuse_capture(optimizer)
        params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
        live = [(i, param, group) for i, (param, group) in enumerate(params) if param.grad is not None]
        states: list[dict[str, Any]] = [optimizer.state.get(param, {}) for _, param, _ in live]
        began = all(state.get("step") for state in states)
        strided = {param.grad.layout for _, param, _ in live if param.grad is not None} == {torch.strided}
        absent = optimizer.method.shared_state is not None and len(live) < len(params)
        # a step that has to tell absent tensors of a system, and a first one, do what no graph can
        if not (began and strided) or (absent and any(p.grad is None and optimizer.state.get(p) for p, _ in params)):
            self._forget()
            optimizer.step()
            return
        same = self._known == _situation(optimizer, live, states)
        if same and self._replay is not None:
            if self._take(live, states):
                return
            same = False
        elif self._known is not None and not same:
            self._note_move()
        self._forget()
        _refuse_unrecordable(optimizer)
        if same:
            self._record(live[0][1].device, states)
        else:
            _step_with(optimizer, StepFormulas(live[0][1].device))
        self._known = _situation(optimizer, live, states)

    def _forget(self) -> None:
        self._known = self._replay = self._formulas = None
        self._tables = []

    def _take(self, live: Sequence[Live], states: Sequence[dict[str, Any]]) -> bool:
        """Replay, if every comparison in the step comes out as when it was recorded."""
        assert self._formulas is not None and self._replay is not None
        counts = _counts(states)
        for state, key in counts:
            state[key] += 1
        if not self._formulas.renew():
            for state, key in counts:
                state[key] -= 1
            return False
        self._formulas.write()
        torch.autograd.graph.increment_version([param for _, param, _ in live])
        self._replay()
        self.replays += 1
        self._moves = 0
        return True

    def _record(self, device: torch.device, states: Sequence[dict[str, Any]]) -> None:
        """Record a step, and replay it once, for recording computes nothing."""
        formulas = StepFormulas(device)
        formulas.replays = True
        counts = _counts(states)
        before = [state[key] for state, key in counts]
        try:
            with keeping() as self._tables:
                replay = _graph_of(lambda: _step_with(self._optimizer, formulas), device)
        except BaseException:
            for (state, key), count in zip(counts, before, strict=True):
                state[key] = count
            raise
        self._formulas, self._replay = formulas, replay
        formulas.write()
        replay()
        self.replays += 1

    def _note_move(self) -> None:
        self._moves += 1
        if self._moves == _MOST_MOVES:
            warnings.warn(
                f"in {_MOST_MOVES} steps tensors were elsewhere than in the steps before, or options others, so that "
                "CapturedStep could not replay: keep gradients where they are, with zero_grad(set_to_none=False)",
                stacklevel=4,
            )


def refuse_capture(optimizer: Any) -> None:
    """Raise RuntimeError, when somebody else captures a CUDA graph: it would have the numbers of one step."""
    if torch.cuda._initialized and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(optimizer).__name__} counts its steps on the host: a CUDA graph of step() would repeat one step's "
            "numbers. Capture forward and backward pass, and call CapturedStep(optimizer) outside of the graph"
        )


def _graph_of(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what a function launches; return what launches it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, None, _stream_of(device), "thread_local"):
        run()
    return graph.replay


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all recordings on a GPU: torch's own is of the GPU on which it was first asked for."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no annotations there


def _step_with(optimizer: Any, formulas: StepFormulas) -> None:
    optimizer.recording = formulas
    try:
        optimizer.step()
    finally:
        optimizer.recording = None


def _situation(optimizer: Any, live: Sequence[Live], states: Sequence[dict[str, Any]]) -> list[Any]:
    """Return what a graph depends on beside numbers: which tensors there are, and where; options but the rates."""
    params, groups = [param for _, param, _ in live], [group for _, _, group in live]
    grads: list[Any] = [param.grad for param in params]
    parts = [value for value in chain.from_iterable(map(dict.values, states)) if isinstance(value, Tensor)]
    distinct = {id(group): group for group in groups}.values()
    counts = [state[key] for state, key in _counts(states)]
    return [
        *[{**vars(optimizer._options_of(group)), "lr": None} for group in distinct],
        bool(_hooks(optimizer)),
        *map(id, groups),
        *map(id, states),
        # equal ones are one number
        *[count - counts[0] for count in counts],
        *map(id, params),
        *map(Tensor.data_ptr, params),
        *map(Tensor.is_contiguous, params),
        *map(Tensor.data_ptr, grads),
        *map(Tensor.is_contiguous, grads),
        *map(id, parts),
        *map(Tensor.data_ptr, parts),
        *map(Tensor.numel, parts),
    ]


def _counts(states: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Return what a step counts: where, and under which key."""
    return [(state, key) for state in states for key in ("step", SHARED_STEP) if key in state]


def _hooks(optimizer: Any) -> list[Any]:
    """Return what is to run before and after each ``step()``, of this optimizer or of all."""
    every = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return [hook for hooks in (*every, *own) for hook in hooks.values()]


def _refuse_unrecordable(optimizer: Any) -> None:
    """Raise NotImplementedError, for steps that no graph can repeat, with the reason if an optimizer's are such."""
    if (reason := _why_not(optimizer)) is not None:
        raise NotImplementedError(f"a step of {type(optimizer).__name__} cannot be recorded: {reason}")


def _why_not(optimizer: Any) -> str | None:
    """Return why no step of an optimizer can be recorded, None if it can."""
    params: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
    if not optimizer.method.captured:
        return "it waits for the GPU, or has numbers that only the host knows; use step()"
    if optimizer._backward is not None:
        return "it acts on gradients during the backward pass; use step()"
    if _hooks(optimizer):
        return "a replay would not run the hooks of its step(); remove them"
    for group in optimizer.param_groups:
        if group["weight_rounding"] == "stochastic":
            return "weight_rounding='stochastic' of a parameter group; it takes 'nearest' or 'compensated'"
        if group.get("stochastic_rounding"):
            return "stochastic_rounding=True of a parameter group; it takes False"
        if group["weight_rounding"] == "compensated" and group.get("alpha"):
            # its kernels get the addresses of float32 copies in tables, and a graph has memory of its own
            return f"alpha={group['alpha']} of a parameter group with weight_rounding='compensated'; it takes 0.0"
        if group["dense_state"] == "8bit":
            return "dense_state='8bit' of a parameter group counts on the host; it takes 'param' or 'fp32'"
        if isinstance(lr := group["lr"], Tensor) and lr.device.type != "cpu":
            return f"lr of a parameter group is on {lr.device}; it takes a number, or a tensor on the CPU"
        if (block_size := group.get("block_size", 1)) > MAX_FUSED_BLOCK:
            return f"block_size={block_size} of a parameter group; it takes at most {MAX_FUSED_BLOCK}"
        if (quantized := group.get("quant_block_size", 1)) & (quantized - 1):
            return f"quant_block_size={quantized} of a parameter group; it takes a power of two"
    if len(devices := {param.device for param in params}) != 1:
        return f"its parameters are on {', '.join(sorted(map(str, devices))) or 'no device'}, instead of one GPU"
    if any(hasattr(param, "placements") for param in params):
        return "a parameter is a sharded DTensor"
    if not all(param.is_contiguous() and (param.grad is None or param.grad.is_contiguous()) for param in params):
        return "a parameter or its gradient is not contiguous"
    device = next(iter(devices))
    if (backend := chosen_backend(device)) != "triton":
        return f"its parameters are on {device}, where the backend is {backend!r}; it takes a GPU with Triton"
    return None
