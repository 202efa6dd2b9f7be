"""The base class of all optimizers: groups, the step, checks, and resume; a method adds its :class:`Method`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from hf_lowmem_optim.engine.adamw import adamw_update_, require_bitsandbytes
from hf_lowmem_optim.engine.allocation import allocate_, follow_options_, saved_as_options_say
from hf_lowmem_optim.engine.arrangement import Arrangement, Live, checked_rules, probed_parameters, remember_
from hf_lowmem_optim.engine.backward import LayerwiseMode
from hf_lowmem_optim.engine.buckets import SHARED_PREFIX, Part, TensorUpdate, arrange, batches, split_stacks
from hf_lowmem_optim.engine.capture import StepFormulas, refuse_capture
from hf_lowmem_optim.engine.checks import (
    check_rounding,
    check_tensor,
    check_unchanged,
    checked_parameters,
    named_like_others,
    refuse_mps,
)
from hf_lowmem_optim.engine.coupled import SHARED_STEP, check_agreement, note_absent_, place_system_, system_home
from hf_lowmem_optim.engine.gradient_error import GradientErrors
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import Options, as_plain, check_group_keys
from hf_lowmem_optim.engine.sharding.layout import specs_at_rest
from hf_lowmem_optim.engine.sharding.paths import Path
from hf_lowmem_optim.engine.sharding.system import check_system
from hf_lowmem_optim.engine.sharding.update import update_sharded_
from hf_lowmem_optim.engine.state import exact_load
from hf_lowmem_optim.ops.dispatch import full_precision
from hf_lowmem_optim.ops.weight_correction import CORRECTION
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["LowMemoryOptimizer"]

#: Parameters of an optimizer that have seeds of their own for stochastic rounding.
_MAX_PARAMETERS = 1 << 24
#: Options that may be given by position, as to torch's AdamW.
_POSITIONAL = ("lr", "betas", "eps", "weight_decay")


class LowMemoryOptimizer(Optimizer):
    """Base class: see :class:`~hf_lowmem_optim.optimizers.ldadam.LDAdam` for a subclass.

    State is allocated at a parameter's first gradient, so that building the optimizer costs nothing and sharding
    wrappers may still replace the parameters. Each tensor counts its own updates in ``state[param]["step"]``.

    Attributes:
        method: What a subclass is: its options, its state, its update.
    """

    method: ClassVar[Method]
    #: What acts on gradients during the backward pass; None in the normal mode.
    _backward: LayerwiseMode | GradientErrors | None = None
    #: The numbers of a step that is recorded.
    recording: StepFormulas | None = None

    def __init_subclass__(cls) -> None:
        """Give a method's class the signature and the argument list of its options."""
        super().__init_subclass__()
        if "method" not in cls.__dict__:
            return
        types, parameters = cls.method.options.types(), []
        for name, default in cls.method.options.defaults().items():
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in _POSITIONAL else inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=types[name]))
        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=ParamsT)
        cls.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        described = "".join(f"\n    {name}: {text}" for name, text in cls.method.options.help().items())
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\nArgs:\n    params: As in torch.{described}"

    def __init__(self, params: ParamsT, *positional: Any, **options: Any) -> None:
        """Build the optimizer.

        Args:
            params: Parameters, named parameters or parameter groups, as in torch. A group may set any option.
            *positional: ``lr``, ``betas``, ``eps`` and ``weight_decay``, in this order.
            **options: Any option by name; see the class.

        Raises:
            TypeError: An option is unknown or has the wrong type, or a parameter an unsupported dtype.
            ValueError: An option is out of range, or a parameter is not a leaf.
            ImportError: ``dense_state="8bit"`` without bitsandbytes.
        """
        who, method = type(self).__name__, getattr(type(self), "method", None)
        if not isinstance(method, Method):
            raise TypeError(f"{who} has no class attribute `method = Method(...)`, which says what it is")
        if len(positional) > len(_POSITIONAL):
            raise TypeError(f"{who} takes {', '.join(_POSITIONAL)} by position; give every other option by name")
        given = dict(zip(_POSITIONAL, positional, strict=False))
        if both := given.keys() & options.keys():
            raise TypeError(f"{who} got {both.pop()!r} twice")
        defaults = dict(vars(method.check({**given, **options}, who)))
        # a learning rate that is a tensor stays one, to be changed in place
        defaults["lr"] = as_plain({**defaults, **given, **options}["lr"], tensors=False)
        self._start()
        self._complete = False
        try:
            super().__init__(params, dict(defaults))
            check_rounding(self.param_groups)
        except BaseException:
            # an exception that somebody keeps would keep the optimizer, too
            self.remove_hooks()
            raise
        self._complete = True

    def _start(self) -> None:
        """Set up what lives beside parameters and state."""
        self._complete = True
        self._options: dict[int, tuple[tuple[Any, ...], Options]] = {}
        self._specs: dict[tuple[Any, ...], tuple[bool, dict[str, TensorSpec]]] = {}
        self._arrangements: dict[tuple[int, ...], Arrangement] = {}
        self.unchecked: set[int] = set()
        self.paths: dict[tuple[Any, ...], Path] = {}
        self._system_home: Tensor | None = None
        self._had_matrices: list[bool] = []
        if self.method.layerwise:
            self._backward = LayerwiseMode(self)

    # ------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own values of any option.

        Args:
            param_group: ``"params"`` and overrides, as in torch.

        Raises:
            TypeError: A parameter is no float32, bfloat16 or float16 tensor, or an override is unknown or has the wrong
                type.
            ValueError: A parameter is not a leaf, or on a device that the method does not serve; or an override is out
                of range, has no effect, or differs from another group's where all must agree.
            ImportError: ``dense_state="8bit"`` without bitsandbytes.
            NotImplementedError: The group's settings do not work with several processes.
        """
        who, own = type(self).__name__, self.method.options.defaults()
        check_group_keys(param_group, own, who)
        param_group = {
            key: as_plain(value, tensors=False) if key in own else value for key, value in param_group.items()
        }
        full = {**self.defaults, **param_group}
        self.method.check({key: full[key] for key in own}, who)
        check_agreement(self.method, [*self.param_groups, full], who)
        params, tensors = checked_parameters(param_group["params"], who)
        if self._complete and "weight_rounding" in param_group:
            check_rounding([{**full, "params": tensors}])
        if full["dense_state"] == "8bit":
            require_bitsandbytes(tensors)
        if self.method.shared_state is not None and not self.method.is_dense(full):
            refuse_mps(tensors, who)
        super().add_param_group({**param_group, "params": named_like_others(params, self.param_groups)})
        self._had_matrices.append(any(each.dim() >= 2 and self.method.compresses(each.shape, full) for each in tensors))
        self._watch(len(self.param_groups) - 1)

    def _watch(self, index: int) -> None:
        """Have gradients of a group acted on during the backward pass, where its options ask for that."""
        if self._backward is None and GradientErrors.serves(self.method, self.param_groups[index]):
            self._backward = GradientErrors(self)
            for earlier in range(index):
                self._backward.watch(earlier)
        if self._backward is not None:
            self._backward.watch(index)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds 'differentiable', which would then be saved with every group
        self.defaults = {key: self.defaults[key] for key in self.method.options.defaults()}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if not hasattr(self, "_specs"):  # a copy, made without __init__
            self._start()
            for index in range(len(self.param_groups)):
                self._watch(index)
        self._system_home = None
        # the options with which the state was made
        self._options.clear()
        for group in self.param_groups:
            if any(self.state.get(param) for param in group["params"]):
                self._options_of(group)

    def __getstate__(self) -> dict[str, Any]:
        if self._backward is not None:
            self._backward.check_save("the optimizer cannot be copied between backward pass and step(): ")
        return super().__getstate__()

    # ------------------------------------------------------------------------------------------------------ step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # what a compiler traces of it is not what it computes
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients, as in torch.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse or complex, or a CUDA graph is captured. Nothing has been updated then.
            NotImplementedError: A parameter is a sharded DTensor, which its group's options do not serve. Nothing has
                been updated then.
            ValueError: An option was changed on which the state depends. Nothing has been updated then.
        """
        if self.recording is None and torch.cuda._initialized:
            refuse_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._backward is not None:
            self._backward.before_step()
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        self._update_([(i, param, group) for i, (param, group) in enumerate(params) if param.grad is not None])
        if self._backward is not None:
            self._backward.after_step()
        return loss

    def _update_(self, live: Sequence[Live]) -> None:
        """Update parameters that have a gradient: each with its place among all parameters, and its group."""
        if not live:
            return
        method = self.method
        places = tuple([place for place, _, _ in live])
        states: list[dict[str, Any]] = [self.state.get(param, {}) for _, param, _ in live]
        options_of = {key: self._options_of(group) for key, group in {id(group): group for _, _, group in live}.items()}
        known, probed = self._arrangements.get(places), frozenset[int]()
        if known is None or not known.holds(live, states, options_of, method):
            known = None
            rules = checked_rules(self, live, options_of)
            states = [self.state[param] for _, param, _ in live]
            probed = probed_parameters(self, live, options_of)
        else:
            rules = known.rules
        system, coupled = None, None
        if method.shared_state is not None:
            members = zip(live, rules, strict=True)
            coupled = next((options_of[id(group)] for (_, _, group), (compressed, _) in members if compressed), None)
        if coupled is not None and vars(coupled)["scope"] == "model":
            system = None if self._system_home is None else self.state.get(self._system_home)
            if system is None or SHARED_STEP not in system:
                system = self._common_system(coupled)
        recording = self.recording
        options_of = options_of if recording is None else recording.options_of(self, live)
        sparse: list[TensorUpdate] = []
        dense: dict[int, list[TensorUpdate]] = {}
        sharded: list[tuple[TensorUpdate, bool]] = []
        for (index, param, group), (compressed, specs), state in zip(live, rules, states, strict=True):
            grad, options = param.grad, options_of[id(group)]
            assert grad is not None
            if id(param) in probed:
                continue
            step = state["step"] = state["step"] + 1
            if known is None:
                if [key for key in method.follows if (key in specs) != (key in state)]:
                    follow_options_(state, specs, method.follows, param)
                grad = grad.detach() if grad.requires_grad else grad
                # kernels read memory, which does not hold the numbers of a lazy gradient
                grad = grad.clone() if grad.is_neg() or grad._is_zerotensor() else grad
            stochastic = options.weight_rounding == "stochastic" and param.dtype != torch.float32
            seed = step * _MAX_PARAMETERS + index if stochastic else None
            t: Any = step if recording is None else recording.count(state, "step")
            fused = compressed and CORRECTION in state and method.takes_corrections(options, param.device)
            update = TensorUpdate(param.detach(), grad, state, options, t, seed, index, fused)
            if known is None and hasattr(param, "placements"):
                sharded.append((update, compressed))
            else:
                (sparse if compressed else dense.setdefault(id(group), [])).append(update)
        # fused and own kernels hide a change from autograd; a pass through an older graph must see it
        torch.autograd.graph.increment_version([param for _, param, _ in live if id(param) not in probed])
        with full_precision():
            parts = self._apply_(sparse, list(dense.values()), system, None if known is None else known.parts)
            if sharded:
                update_sharded_(self, sharded, system, self._apply_)
        if known is None and not probed:
            remember_(self._arrangements, places, Arrangement.of(live, states, options_of, method, rules, parts))

    def _apply_(
        self,
        sparse: Sequence[TensorUpdate],
        dense: Sequence[Sequence[TensorUpdate]],
        system: Any = None,
        parts: list[Part] | None = None,
    ) -> list[Part]:
        """Update whole tensors: those that are compressed, and lists of those of a group that are not.

        Returns:
            How the compressed ones were put together, which serves equal ones again as ``parts``.
        """
        method, coupled_update_ = self.method, self.method.coupled_update_
        matrices = split_stacks(sparse)
        parts = arrange(matrices, whole=method.whole) if parts is None else parts
        together = batches(matrices, whole=method.whole, parts=parts)
        if coupled_update_ is None:
            for batch in together:
                assert method.update_ is not None
                with batch.weights() as W:
                    method.update_(W, batch.g, batch.state, batch.step, batch.options)
        elif system is None:
            for batch in together:
                assert method.shared_state is not None
                own = {key: list(batch.state[key]) for key in method.shared_state(batch.options)}
                coupled_update_([batch], own, batch.step)
        elif sparse:
            system[SHARED_STEP] += 1
            if len(sparse) < sum([len(group["params"]) for group in self.param_groups]):
                note_absent_(self, method, sparse, system[SHARED_STEP])
            shared = {k.removeprefix(SHARED_PREFIX): [v] for k, v in system.items() if k.startswith(SHARED_PREFIX)}
            t: Any = self.recording.count(system, SHARED_STEP) if self.recording is not None else system[SHARED_STEP]
            coupled_update_(list(together), shared, t)
        for updates in dense:
            adamw_update_(updates)
        return parts

    def _common_system(self, options: Options) -> dict[str, Any]:
        """Return the state that has the system over all parameters, checked, or allocated if there is none yet."""
        home, group = system_home(self, self.method)
        if hasattr(home, "placements"):
            check_system(self)
        state = self._prepared(home, group)[2]
        place_system_(state, home, group, self.method, options)
        self._system_home = home
        return state

    def _is_real(self, param: Tensor) -> bool:
        """Return whether a gradient of zero is nevertheless one of training."""
        return self._backward is not None and self._backward.has_more(param)

    def _options_of(self, group: dict[str, Any]) -> Options:
        """Return the options of a group, made anew and checked when one of them has changed."""
        values = tuple([value.item() if isinstance(value := group[key], Tensor) else value for key in self.defaults])
        known = self._options.get(id(group))
        if known is not None and known[0] == values:
            return known[1]
        options = self.method.options_of(group)
        if known is not None and any(self.state.get(param) for param in group["params"]):
            check_unchanged(known[1], options, self.method)
        self._options[id(group)] = values, options
        return options

    def _checked_rule(self, param: Tensor, group: dict[str, Any]) -> None:
        """Refuse a gradient or a state that the parameter's rule cannot serve."""
        rule = self._rule(param, self._options_of(group))
        check_tensor(param, group, self.state.get(param), rule=rule, optimizer=self)

    def _rule(self, param: Tensor, options: Options) -> tuple[bool, dict[str, TensorSpec]]:
        """Return whether a parameter is compressed, and the specs of its state."""
        key = (param.shape, param.dtype, *[getattr(options, name) for name in self.method.layout_options])
        rule = self._specs.get(key)
        if rule is None:
            compressed = self.method.compressed_state(param.shape, param.dtype, options) is not None
            rule = self._specs[key] = compressed, self.method.specs(param.shape, param.dtype, options)
        return (rule[0], specs_at_rest(rule[1])) if hasattr(param, "placements") else rule

    def _prepared(self, param: Tensor, group: dict[str, Any]) -> tuple[bool, dict[str, TensorSpec], dict[str, Any]]:
        """Return whether a parameter is compressed, the specs of its state, and the state, allocated if need be."""
        options = self._options_of(group)
        compressed, specs = self._rule(param, options)
        if not self.state.get(param):
            allocate_(self.state, [(param, (options, compressed, specs))])
        return compressed, specs, self.state[param]

    # ---------------------------------------------------------------------------------------------------- backward

    def abandon_step(self) -> int:
        """Go on without ``step()`` after a backward pass that failed half-way (out of memory).

        Returns:
            The number of parameters whose gradients of that pass have been used already; 0 in the normal mode.
        """
        if self._backward is None:
            return 0
        used = self._backward.abandon_step()
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        return used

    def remove_hooks(self) -> None:
        """Take off the hooks that act on gradients during the backward pass; ``step()`` does everything then."""
        if self._backward is not None:
            self._backward.remove_hooks()

    def restore_hooks(self) -> None:
        """Take hooks back that another optimizer took over, or that waited for shards; those removed stay off."""
        if self._backward is not None and (self._backward.hooks or self._backward.waits):
            for index in range(len(self.param_groups)):
                self._backward.watch(index)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear what gradients there are, as in torch.

        Raises:
            RuntimeError: Gradients were used during the backward pass already.
        """
        if self._backward is not None:
            self._backward.check_zero_grad()
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a gradient scaler asks first."""
        if self._backward is not None:
            self._backward.refuse_scaler()
        return False

    # ---------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does.

        Raises:
            RuntimeError: A step has begun whose gradients are in the state already.
        """
        if self._backward is not None:
            self._backward.check_save("the state cannot be saved between backward pass and step(): ")
        return saved_as_options_say(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; tensors keep the dtypes in which they were saved, what a step had begun is forgotten.

        As in torch, the options of the groups are those that were saved.

        Args:
            state_dict: What :meth:`state_dict` gave, also after ``torch.load(weights_only=True)``.

        Raises:
            ValueError: It was written by another optimizer, for other parameters, or with another value of an option
                on which the shape of the state depends. Nothing has been changed then.
        """
        with exact_load(self, self.method):
            super().load_state_dict(state_dict)
        if self._backward is not None:
            self._backward.after_load()
