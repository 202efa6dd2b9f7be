"""Optimizers whose workers step apart and average together: schedule, means, checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lowmem_optim.engine import averaging
from hf_lowmem_optim.engine.buckets import Part, TensorUpdate
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.sharding.owners import waves_of
from hf_lowmem_optim.ops.dispatch import full_precision
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_

__all__ = ["REPLICATED", "WorkerOptimizer", "sync_bytes"]

#: What ``Method.replicated`` of such an optimizer says.
REPLICATED = "a sync averages all tensors at once, of which every worker has the whole"
_SENT = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOMENTS = ("exp_avg", "exp_avg_sq")
#: Of weights of 24 bits that there are in float32 at a time.
_WAVE_BYTES = 64 << 20


def sync_bytes(method: Method, groups: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Return what a worker puts into a sync's all-reduces and what the first one broadcasts, in bytes.

    Args:
        method: The method of a :class:`WorkerOptimizer`.
        groups: The parameter groups, with ``"params"``, of which only shapes and dtypes matter.
    """
    entries = common = itemsize = 0
    for group in groups:
        itemsize = _SENT[group["sync_dtype"]].itemsize
        for param in group["params"]:
            specs = method.state_specs(param, group)
            entries += param.numel() + sum(math.prod(specs[key].shape) for key in _MOMENTS if key in specs)
            common += specs["basis"].nbytes if "basis" in specs else 0
    return entries * itemsize, common


class WorkerOptimizer(LowMemoryOptimizer):
    """Base class of an optimizer that averages weights and moments over its workers every ``sync_every`` steps.

    Its options have ``sync_every``, ``clip_norm`` and ``sync_dtype``, on which all groups agree. All workers build it
    alike, from equal weights, and step equally often. One process alone sends nothing.
    """

    _process_group: Any = None

    def __init__(self, params: ParamsT, *positional: Any, process_group: Any = None, **options: Any) -> None:
        self._process_group = process_group
        super().__init__(params, *positional, **options)

    def _start(self) -> None:
        super()._start()
        self._sent_bytes, self._equal_since = 0, 0
        self._agreed = self._trains = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on all workers alike; see :meth:`LowMemoryOptimizer.add_param_group`."""
        super().add_param_group(param_group)
        self._agreed = False

    # ------------------------------------------------------------------------------------------------------ sync

    @property
    def process_group(self) -> Any:
        """The workers' group; None for the default one, as in a copy."""
        return self._process_group

    @property
    def sync_every(self) -> int:
        """K: steps after which all workers are equal again."""
        return int(self.param_groups[0]["sync_every"])

    @property
    def steps_since_sync(self) -> int:
        """Steps since the workers were equal; 0 right after a sync and after loading a state."""
        return self._num_steps() - self._equal_since

    @property
    def communicated_bytes(self) -> int:
        """Bytes that this worker has put into collectives: entries times bytes of each as sent."""
        return self._sent_bytes

    def own_state(self) -> str | None:
        """Return, as a clause, what each worker has of its own also after a sync; None if all are equal then."""
        kept = [group["error_feedback"] for group in self.param_groups if group["error_feedback"] != "none"]
        return f"the error that error_feedback={kept[0]!r} keeps is each worker's own" if kept else None

    def sync(self) -> None:
        """Average out of turn, as at the end of training; all workers call it after the same step. The basis stays."""
        if self.steps_since_sync:
            with full_precision():
                self._average_()

    @torch.no_grad()
    def _average_(self) -> None:
        """Replace weights and moments by their means."""
        if averaging.num_workers(self.process_group) > 1:
            tensors, names, wide = list[Tensor](), list[str](), list[tuple[Tensor, Tensor]]()
            sent = list[Tensor]()
            for index, group in enumerate(self.param_groups):
                known = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
                for param, name in zip(group["params"], known, strict=True):
                    if not (state := self.state.get(param, {})):
                        continue
                    own, weight = [key for key in _MOMENTS if key in state], param.detach()
                    tensors += [weight, *(moments := [state[key] for key in own])]
                    names += [name, *[f"{key} of {name}" for key in own]]
                    if CORRECTION in state:  # a weight of 24 bits
                        wide.append((weight, state[CORRECTION]))
                    else:
                        sent.append(weight)
                    sent += moments
            averaging.check_finite(tensors, names, self.process_group)
            for run in waves_of([4 * weight.numel() for weight, _ in wide], _WAVE_BYTES):
                weights, corrections = map(list, zip(*[wide[place] for place in run], strict=True))
                joined = join_weights(weights, corrections)
                self._send_(joined)
                split_weights_(weights, corrections, joined)
            self._send_(sent)
        self._equal_since = self._num_steps()

    def _send_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the workers."""
        dtype = _SENT[self.param_groups[0]["sync_dtype"]]
        self._sent_bytes += averaging.average_(tensors, self.process_group, dtype=dtype)

    def _num_steps(self) -> int:
        """Return t: the most steps that a tensor has taken."""
        return max([state["step"] for state in self._states()], default=0)

    def _states(self) -> Iterator[dict[str, Any]]:
        """Yield the states of the parameters that have one."""
        for group in self.param_groups:
            for param in group["params"]:
                if state := self.state.get(param):
                    yield state

    # ------------------------------------------------------------------------------------------------------ step

    def _update_(self, live: Sequence[tuple[int, Tensor, dict[str, Any]]]) -> None:
        """Step with gradients of zero where other workers may have some."""
        if any(hasattr(param, "placements") for _, param, _ in live):
            raise NotImplementedError(f"a parameter is sharded (DTensor), and {REPLICATED}: train under DDP")
        if averaging.num_workers(self.process_group) > 1:
            every = [(param, group) for group in self.param_groups for param in group["params"]]
            # a probe, with a rate of zero, has nothing but zeros on all workers
            still = any(group["lr"] == 0 for group in self.param_groups)
            self._trains = still and any(bool(param.grad.any()) for param, _ in every if param.grad is not None)
            for param, _ in every:
                if param.requires_grad and param.grad is None:
                    param.grad = torch.zeros_like(param)
            live = [(i, param, group) for i, (param, group) in enumerate(every) if param.grad is not None]
        super()._update_(live)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a gradient scaler asks first."""
        averaging.refuse_scaler(self.process_group)
        return super()._step_supports_amp_scaling

    def _is_real(self, param: Tensor) -> bool:
        return self._trains or super()._is_real(param)

    def _apply_(
        self,
        sparse: Sequence[TensorUpdate],
        dense: Sequence[Sequence[TensorUpdate]],
        system: Any = None,
        parts: list[Part] | None = None,
    ) -> list[Part]:
        """Take a worker's step, and then the common one if it is due."""
        updates, K = [*sparse, *(update for part in dense for update in part)], self.sync_every
        stepped = {id(update.state) for update in updates}
        before = max([state["step"] - (id(state) in stepped) for state in self._states()], default=0)
        if updates and not self._agreed:
            self._check_workers(before, updates)
        t = max([before, *(update.step for update in updates)])
        if updates and t == before and averaging.num_workers(self.process_group) > 1:
            raise RuntimeError(
                f"frozen parameters have taken {t} steps, all that are trained now at most as many, and by the most of "
                "them the workers count the steps between two averages. Keep one parameter trained from the start on"
            )
        if updates and (most := self.param_groups[0]["clip_norm"]) is not None:
            _clip_([update.grad for update in updates], most)
        self._begin_([update for update in sparse if update.step == 1], before // K * K)
        parts = super()._apply_(sparse, dense, system, parts)
        if t > before and t % K == 0:
            self._average_()
            self._renew_(t - K, t)
        return parts

    def _begin_(self, fresh: Sequence[TensorUpdate], start: int) -> None:
        """Set up compressed tensors that have their first gradient, in the period after step ``start``."""
        raise NotImplementedError

    def _renew_(self, start: int, t: int) -> None:
        """Take what is common from the averages after step t, at the end of the period after step ``start``."""
        raise NotImplementedError

    def _check_workers(self, t: int, updates: Sequence[TensorUpdate]) -> None:
        """Refuse workers that are not set up alike, and what has no mean."""
        if averaging.num_workers(self.process_group) > 1:
            for group in self.param_groups:
                wide = group["weight_rounding"] == "compensated" or any(
                    param.requires_grad and param.dtype != torch.bfloat16 for param in group["params"]
                )
                if wide and group["sync_dtype"] == "bf16":
                    raise ValueError(
                        "sync_dtype='bf16' would round weights that have more bits at every sync, and lose what they "
                        "moved. Use sync_dtype='fp32', or bfloat16 weights without weight_rounding='compensated'"
                    )
            if any(group["dense_state"] == "8bit" for group in self.param_groups):
                raise NotImplementedError(
                    "dense_state='8bit' keeps codes, of which several workers have no mean: use dense_state='param'"
                )
            lines = [f"step {t}"]
            for group in self.param_groups:
                lines.append(str(self._options_of(group)))
                for param in group["params"]:
                    what = f"{tuple(param.shape)} {param.dtype}"
                    # between two syncs a group may be added, of which no weight has been trained
                    fresh = t == self._equal_since or self.state[param]["step"] == 1 if self.state.get(param) else True
                    lines.append(f"{what}, bits adding up to {averaging.fingerprint(param)}" if fresh else what)
            averaging.check_agreement("\n".join(lines), self.process_group)
            averaging.warn_of_equal_gradients([update.grad for update in updates], self.process_group)
        self._agreed = True

    # ---------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does.

        Raises:
            RuntimeError: There are several workers, and the state is not that of all: since a sync steps were taken, or
                each has an error of its own.
        """
        if averaging.num_workers(self.process_group) > 1:
            if since := self.steps_since_sync:
                raise RuntimeError(
                    f"the state is this worker's alone, {since} steps after the last sync: save when a multiple of "
                    f"sync_every={self.sync_every} steps is taken, or have all workers call sync() first"
                )
            # wrappers such as accelerate's take a state before the first step
            if self._num_steps() and (own := self.own_state()) is not None:
                raise RuntimeError(f"state cannot be saved: {own}. Several workers save with error_feedback='none'")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, the same one on all workers; their number may be another than when it was saved."""
        super().load_state_dict(state_dict)
        self._equal_since, self._agreed = self._num_steps(), False


def _clip_(gradients: Sequence[Tensor], most: float) -> None:
    """Scale gradients down to a norm of all of them, without waiting for the device."""
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32).to(device) for grad in gradients]
    scale = (most / torch.linalg.vector_norm(torch.stack(norms))).clamp(max=1.0)
    for grad in gradients:
        grad.mul_(scale.to(grad.device, grad.dtype))
