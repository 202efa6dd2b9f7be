"""What an optimizer class is, apart from any instance: what planner, factory, checks and report ask of it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hf_lowmem_optim.engine.adamw import adamw_state
from hf_lowmem_optim.engine.buckets import Batch, most_entries, most_tensors
from hf_lowmem_optim.engine.options import Options, as_plain
from hf_lowmem_optim.ops.dispatch import chosen_backend
from hf_lowmem_optim.ops.gram import most_systems
from hf_lowmem_optim.ops.low_rank import MOST_FACTOR_BYTES
from hf_lowmem_optim.ops.weight_correction import CORRECTION
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["CoupledUpdate", "Method", "StagedUpdate", "Stages", "StateFunction", "Update"]

#: Slices and small factors that a step allocates whatever the sizes of its tensors, on a CPU and on other devices.
_CPU_SLICES_BYTES, _DEVICE_SLICES_BYTES = 16 << 20, 80 << 20
#: Copies of a system's matrix that solving it takes, the eigenvectors' workspace included; of several one more.
_SYSTEM_COPIES = 6


class StateFunction(Protocol):
    """Describes the state of one tensor; the only place where its sizes are written."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, options: Any, /) -> dict[str, TensorSpec] | None:
        """Return specs by state key; None for a tensor that the method leaves to AdamW."""


class Update(Protocol):
    """One step of equal tensors, each by itself."""

    def __call__(
        self, W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Any], t: int, options: Any, /
    ) -> None:
        """Update weights and state in place.

        Args:
            W: The weights, contiguous, all of one shape; those of three and more dimensions as matrices (out, rest),
                stacks as several weights. Of any shapes for a method that is :attr:`Method.whole`.
            g: Their gradients, likewise; only read.
            state: Their states stacked, [number of tensors, ...], by state key; of a method that is ``whole``, a list
                of each tensor's own, and ``"memo"``, where operations note what stays as long as all these states stay
                where they are. And ``"places"``, the list of the tensors' places among all parameters.
            t: Which update of these tensors it is, 1 for the first.
            options: The options of their group.
        """


class CoupledUpdate(Protocol):
    """One step of all tensors that share a system, such as the Gram matrix of their gradients; or have one each."""

    def __call__(
        self,
        tensors: Sequence[Batch],
        shared: Mapping[str, Sequence[Tensor]],
        t: int,
        everywhere: Callable[[Tensor], Tensor] | None = None,
        /,
    ) -> None:
        """Update weights, state and shared state in place.

        Args:
            tensors: The tensors, those of one shape together; a single batch if each has a system of its own.
            shared: The state of the systems by key: of the one of all tensors, or of each tensor's.
            t: Which step of the systems it is, 1 for the first.
            everywhere: Where other processes have more tensors of the system: takes a row of float64 numbers for each
                tensor here, as long as those of the first shared tensor, and returns the rows of all tensors. It must
                be called once. None if all tensors are here.
        """


class Stages(Protocol):
    """One step, after the first, of a matrix of which each process has a part, with exchanges between its stages."""

    def __call__(
        self,
        W: Sequence[Tensor],
        g: Sequence[Tensor],
        state: Mapping[str, Any],
        t: int,
        options: Any,
        shape: Sequence[int],
        axis: int,
        /,
    ) -> Generator[Any, Any, bool]:
        """Update this process's part in place; ``W`` to ``options`` are an :class:`Update`'s, of one part.

        Args:
            W: The weight.
            g: Its gradient.
            state: Its state; every tensor is cut along its longest dimension.
            t: Which update it is, at least 2.
            options: The options of its group.
            shape: Shape of the whole matrix.
            axis: The dimension along which it is cut.

        Yields:
            First the state keys that it needs whole: it is sent these tensors by key, and what it writes to them is
            kept. Then lists of tensors that are to be added up over the processes, in place.

        Returns:
            Whether it has taken the step; if not, it has written nothing, on no process.
        """


@dataclass(frozen=True)
class StagedUpdate:
    """How a matrix of which each process has a part is updated.

    Attributes:
        stages: The update.
        exchanged: ``(shape, dtype, options, axis)`` -> the bytes of whole state tensors, and those of each sum.
    """

    stages: Stages
    exchanged: Callable[[Sequence[int], torch.dtype, Any, int], tuple[int, list[int]]]


@dataclass(frozen=True)
class Method:
    """A method: its options, its state, its update.

    Attributes:
        name: The string for ``TrainingArguments(optim=...)``.
        options: Its options.
        state: Describes the state of one tensor.
        update_: Updates equal tensors; a method whose tensors depend on each other has ``coupled_update_`` instead.
        switch: The option that sends a group to AdamW, and the value that does.
        scratch: What an update allocates for a moment, at most, in float32 copies of a weight; 0 if it works in place.
            Or a function that returns it for the options and the shape of a weight.
        scratch_state: What it allocates beside, at most, in float32 copies of a weight's state, the error left out.
        scratch_entries: What it allocates beside, at most, in float32 numbers, however many tensors a call serves:
            a function of shape, options and device, for a method that works on parts of tensors.
        whole: Whether one call serves any number of tensors of any shapes, each with a state of its own, because it
            allocates for one after the other; or ``"gpu"``: there it serves any number of one shape, because it
            allocates for as many as ``most_tensors`` says, or factors alone, of these at most ``MOST_FACTOR_BYTES``.
        adam_like: Whether it is Adam with less state, so that AdamW is as good where compression saves nothing.
        uses_betas: Whether ``betas`` and ``eps`` are options of its own also where it is not ``adam_like``.
        optional_state: State keys that exist only for some values of an option which may change in a run, with that
            option: the state follows it.
        coupled_update_: Updates all tensors that share a system.
        shared_state: Describes the state of a system.
        shared_options: The options on which all groups of a system must agree, ``"scope"`` among them; of a method
            without a system, on which all groups must.
        absent_: Notes in a tensor's state that it had no gradient in a step of its system: ``(state, t) -> None``.
        check_loaded: Finds what its kernels could not be handed in a tensor's loaded state, beyond shapes and dtypes:
            ``(state, shape, options)`` -> the fault as a clause, or None.
        constants: Describes what it shares with all optimizers of a process and never saves (``ops/constants.py``):
            ``(shape, device, options)`` of a compressed tensor -> specs by the constant's key.
        put_aside_: Adds a part of a step's gradient to the state, to which the update will add the rest; for a method
            whose error, if any, is not in the gradient's own coordinates: ``(g, state, seed, options) -> None``.
        layerwise: Whether it updates during the backward pass.
        captured: Whether a later step in Triton can be recorded in a CUDA graph: it waits for nothing on the GPU, and
            takes what changes from step to step as ``ops/step_numbers.py`` has it.
        corrected: With which values of which options its update takes compensated weights as they are, with their
            corrections in the state, where Triton serves it: always for ``{}``. Its torch version joins and splits them
            itself then. None for a method whose update is given float32 copies instead.
        serves_flat: Whether it makes sense of a group's matrices as one flat vector a process, as DeepSpeed makes them.
        block_entries: Of how many consecutive entries are the blocks that it treats each by itself, apart from a system
            over all tensors, with some options; None with options for which that is not so.
        staged: Its update of a matrix of which several processes have parts, for steps after the first.
        replicated: Why every process must have all tensors whole, with all gradients, when it steps, as a clause; it
            has then no layer-wise mode, and serves no sharded parameters. None for any other method.

    Raises:
        ValueError: There is no such switch, or no option that :attr:`corrected` names, or not one update.
    """

    name: str
    options: type[Options]
    state: StateFunction
    update_: Update | None = None
    switch: tuple[str, Any] = ("compress", False)
    scratch: float | Callable[[Any, Sequence[int]], float] = 1.0
    scratch_state: float = 0.0
    scratch_entries: Callable[[Sequence[int], Any, torch.device], int] | None = None
    whole: bool | Literal["gpu"] = False
    adam_like: bool = True
    uses_betas: bool = False
    optional_state: Mapping[str, str] = field(default_factory=dict)
    coupled_update_: CoupledUpdate | None = None
    shared_state: Callable[[Any], dict[str, TensorSpec]] | None = None
    shared_options: tuple[str, ...] = ()
    absent_: Callable[[Mapping[str, Tensor], int], None] | None = None
    check_loaded: Callable[[Mapping[str, Tensor], Sequence[int], Any], str | None] | None = None
    constants: Callable[[Sequence[int], torch.device, Any], dict[Hashable, TensorSpec]] | None = None
    put_aside_: Callable[[Sequence[Tensor], Mapping[str, Tensor], int | None, Any], None] | None = None
    layerwise: bool = False
    captured: bool = False
    corrected: Mapping[str, Any] | None = None
    serves_flat: bool = False
    block_entries: Callable[[Any], int | None] | None = None
    staged: StagedUpdate | None = None
    replicated: str | None = None

    def __post_init__(self) -> None:
        """Check what a mistyped description would break later."""
        key = self.switch[0]
        if key not in self.options.defaults():
            raise ValueError(
                f"switch={self.switch!r} of the method {self.name!r} names no option of {self.options.__name__}: "
                "declare one that sends a group to AdamW, such as "
                "`compress: bool = option(True, 'False leaves the group to AdamW', shapes_state=True)`"
            )
        if unknown := [name for name in self.corrected or () if name not in self.options.defaults()]:
            raise ValueError(
                f"corrected={dict(self.corrected or {})!r} of the method {self.name!r} names {unknown[0]!r}, which is "
                f"no option of {self.options.__name__}"
            )
        if (self.update_ is None) == (self.coupled_update_ is None):
            raise ValueError(f"the method {self.name!r} needs update_ or coupled_update_, and not both")

    # ------------------------------------------------------------------------------------------------- options

    @functools.cached_property
    def shaping(self) -> tuple[str, ...]:
        """The options on which the shape of the state depends: they must be equal on resume."""
        return self.options.shaping()

    @functools.cached_property
    def follows(self) -> Mapping[str, str]:
        """:attr:`optional_state`, and that of every method."""
        return {**self.optional_state, CORRECTION: "weight_rounding"}

    @functools.cached_property
    def layout_options(self) -> tuple[str, ...]:
        """The options that decide which state a tensor has."""
        return (*self.shaping, *self.follows.values())

    def check(self, values: Mapping[str, Any], owner: str) -> Options:
        """Return the options that some values by name make; what is missing counts as its default.

        Raises:
            TypeError: A name is unknown or a value has the wrong type.
            ValueError: A value is out of range.
        """
        return self.options.of(values, owner)

    def options_of(self, group: Mapping[str, Any]) -> Options:
        """Return the options of a parameter group, which may have other keys besides."""
        return self.options(**{key: as_plain(group[key]) for key in self.options.defaults()})

    def is_dense(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group is switched to AdamW as a whole."""
        key, off = self.switch
        return bool(group[key] == off if off is not None else group[key] is None)

    # --------------------------------------------------------------------------------------------------- state

    def compresses(self, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
        """Return whether a tensor of this shape takes the compressed rule in a group."""
        return self.compressed_state(shape, torch.float32, self.options_of(group)) is not None

    def compressed_state(
        self, shape: Sequence[int], dtype: torch.dtype, options: Options
    ) -> dict[str, TensorSpec] | None:
        """Return the state of a tensor under the compressed rule; None where it takes AdamW."""
        if 0 in shape or self.is_dense(vars(options)):
            return None
        if not options.is_stack(shape):
            return self.state(shape, dtype, options)
        each = self.state(shape[1:], dtype, options)
        return None if each is None else {key: spec.stack(shape[0]) for key, spec in each.items()}

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return, of options by name, those on which the shape of the state depends; ``stacked`` only if it is set."""
        return {key: values[key] for key in self.shaping if key != "stacked" or values[key]}

    def state_specs(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Describe the state of a parameter in a group: what will be, or was, allocated for it.

        Args:
            param: The parameter; only its shape and dtype matter.
            group: Its group, or any mapping with the options.

        Returns:
            Specs by state key.
        """
        return self.specs(param.shape, param.dtype, self.options_of(group))

    def specs(self, shape: Sequence[int], dtype: torch.dtype, options: Options) -> dict[str, TensorSpec]:
        """Describe the state of a tensor, under whichever rule it takes."""
        specs = self.compressed_state(shape, dtype, options)
        specs = adamw_state(shape, dtype, options.dense_state) if specs is None else specs
        if options.weight_rounding == "compensated" and dtype != torch.float32:
            specs = {**specs, CORRECTION: TensorSpec(tuple(shape), torch.int8, "weight correction")}
        return specs

    def shared_specs(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, TensorSpec]:
        """Describe the state that belongs to all parameters together.

        It is kept in the state of one of them, under ``"shared_"`` and its own key, with ``"shared_step"``.

        Args:
            groups: The parameter groups, with ``"params"``.

        Returns:
            Specs by state key; empty for methods that treat each tensor by itself.
        """
        if self.shared_state is None:
            return {}
        for group in groups:
            if group["scope"] == "model" and any(self.compresses(param.shape, group) for param in group["params"]):
                return self.shared_state(self.options_of(group))
        return {}

    def constants_of(self, groups: Iterable[Mapping[str, Any]]) -> dict[Hashable, TensorSpec]:
        """Describe the constants that the compressed tensors of some groups need, once each, by key."""
        found: dict[Hashable, TensorSpec] = {}
        for group in groups if self.constants is not None else ():
            options = self.options_of(group)
            for shape, dtype, device in _equal_tensors(group["params"], options):
                if self.constants is not None and self.compressed_state(shape, dtype, options) is not None:
                    found.update(self.constants(shape, device, options))
        return found

    # ------------------------------------------------------------------------------------------------- scratch

    def takes_corrections(self, options: Any, device: torch.device) -> bool:
        """Return whether an update is given compensated weights as they are; the meta device counts as a GPU."""
        if self.corrected is None or any(getattr(options, key) != value for key, value in self.corrected.items()):
            return False
        return device.type == "meta" or chosen_backend(device) == "triton"

    def scratch_copies(self, options: Any, shape: Sequence[int]) -> float:
        """Return :attr:`scratch` with some options, for a weight of a shape."""
        return self.scratch(options, shape) if callable(self.scratch) else self.scratch

    def scratch_bytes(self, groups: Sequence[Mapping[str, Any]]) -> int:
        """Return the bytes that a step allocates for a moment beside the state, at most.

        Those are what the method declares, of the tensors that one call of its update serves, the float32 copies of
        weights that ``weight_rounding`` asks for, and a constant for what works in slices, AdamW included. Contiguous
        copies that the layout of a gradient makes necessary, and workspaces of libraries, are not counted.

        Args:
            groups: The parameter groups, with ``"params"``; parameters on the meta device count as on a GPU.
        """
        most, solved, all_on_cpu = 0.0, 0, True
        for group in groups:
            options = self.options_of(group)
            all_on_cpu &= all(param.device.type == "cpu" for param in group["params"])
            # a buffer for error and gradient is made whole, a stack's too, while the gradient is there
            kinds = {(param.shape, param.dtype) for param in group["params"]}
            made = [spec for kind in kinds for spec in self.specs(*kind, options).values() if spec.in_gradient]
            most = max([most, *(spec.stored_bytes for spec in made)])
            total, systems = Counter[torch.device](), Counter[torch.device]()
            for param in group["params"]:
                total[param.device] += param.numel()
            for (shape, dtype, device), count in _equal_tensors(group["params"], options).items():
                specs = self.compressed_state(shape, dtype, options)
                if specs is None:
                    continue
                systems[device] += count
                rounded = options.weight_rounding != "nearest" and dtype != torch.float32
                if options.weight_rounding == "compensated" and device.type != "cpu":
                    rounded &= not self.takes_corrections(options, device)
                state = sum(math.prod(spec.shape) for key, spec in specs.items() if not key.startswith("error"))
                entries, scratch = math.prod(shape), self.scratch_state * state
                together = 1 if self.whole is True else min(count, most_tensors(entries, device))
                copied = rounded * entries * together
                if rounded and self.whole is True:  # tensors of other shapes may be copied with it
                    copied = max(entries, min(total[device], most_entries(device)))
                parts = self.scratch_entries(shape, options, device) if self.scratch_entries is not None else 0
                scratch += self.scratch_copies(options, shape) * entries
                most = max(most, 4 * (copied + scratch * together + parts))
                if self.whole == "gpu" and device.type != "cpu":
                    most = max(most, min(4 * self.scratch_state * state * count, MOST_FACTOR_BYTES))
            solved = max(solved, self._solving_bytes(options, systems))
        return math.ceil(most) + solved + (_CPU_SLICES_BYTES if all_on_cpu else _DEVICE_SLICES_BYTES)

    def _solving_bytes(self, options: Any, tensors: Mapping[torch.device, int]) -> int:
        """Return what solving the systems of so many tensors of a group allocates."""
        if self.shared_state is None:
            return 0
        size = sum(spec.stored_bytes for spec in self.shared_state(options).values())
        each = tensors.items() if options.scope == "tensor" else ()
        together = max([min(count, most_systems(size, device)) for device, count in each], default=1)
        return (_SYSTEM_COPIES + (together > 1)) * together * size

    # --------------------------------------------------------------------------------------------------- limits

    def needs_one_process(self, group: Mapping[str, Any], *, sharded: bool = False) -> str | None:
        """Return why a group cannot be trained by several processes, as a clause for a message; None if it can.

        Args:
            group: The group.
            sharded: Whether FSDP2 splits its parameters, whose hooks get gradients that are averaged; a method that is
                :attr:`replicated` is trained by several processes otherwise.
        """
        if sharded and self.replicated is not None:
            return self.replicated
        if self.layerwise and not sharded:
            return "layer-wise mode uses a gradient before the processes have averaged it"
        if group.get("error_feedback") == "grad":
            return "error_feedback='grad' uses a gradient before the processes have averaged it"
        return None


def _equal_tensors(
    params: Sequence[Tensor], options: Options
) -> Counter[tuple[Sequence[int], torch.dtype, torch.device]]:
    """Count equal tensors that an update is given, the matrices of stacks among them."""
    counts: Counter[tuple[Sequence[int], torch.dtype, torch.device]] = Counter()
    for param in params:
        count, shape = (len(param), param.shape[1:]) if options.is_stack(param.shape) else (1, param.shape)
        counts[shape, param.dtype, param.device] += count
    return counts
