"""``OptimizerFactory``: from a model to an optimizer whose parameter groups are right for it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_lowmem_optim.engine.adamw import adamw_state
from hf_lowmem_optim.engine.hooks import sharded_later
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import POSITIVE, Options, check_number
from hf_lowmem_optim.memory.budget import SIZE_KEYS
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.learning_rates import FACTORS
from hf_lowmem_optim.memory.plan import plan_optimizer
from hf_lowmem_optim.memory.plan_table import align
from hf_lowmem_optim.registry import get_entry
from hf_lowmem_optim.trainer.backward import check_adapters, check_backward_arguments, shards_later
from hf_lowmem_optim.trainer.deepspeed import check_zero
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_training_args
from hf_lowmem_optim.trainer.overrides import (
    Overrides,
    check_overrides,
    check_overrides_apply,
    own_settings,
    scale_dense_rates,
)
from hf_lowmem_optim.trainer.param_groups import (
    COMPRESSED,
    NOT_TARGET,
    NOT_WORTH,
    SWITCHED_OFF,
    TOO_SMALL,
    Placement,
    TargetModules,
    build_param_groups,
    place_parameters,
    read_groups,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["OptimizerFactory", "class_and_arguments"]

logger = logging.getLogger(__name__)

_DENSE = {"param": "dense", "fp32": "dense, fp32", "8bit": "dense, 8 bit"}
_ROUNDED = {"nearest": "", "stochastic": "are rounded stochastically", "compensated": "have a correction of 8 bits"}


class OptimizerFactory:
    """Makes an optimizer of this package for a model.

    Linear and convolution weights and experts are compressed; embeddings, the output head, norms and biases take the
    dense rule; biases and norms do not decay; frozen parameters stay out. What went where is logged.

    Args:
        optimizer: The optimizer's string or its class, for example ``"ldadam"`` or ``LDAdam``.
        target_modules: What is compressed instead: a list of module names or parts of them, a regex, or
            ``"all-linear"``, as in ``TrainingArguments.optim_target_modules``.
        overrides: Hyper-parameters of single modules: ``{"mlp": {"rank": 64}, "lm_head": {"lr": 1e-4}}``. A key is the
            name of a module, a part of it, or a regex for all of it, as in a list of target modules; the first key that
            matches holds. ``rank`` (in general the method's ``switch``) as None leaves matrices
            dense, and with a value compresses them, embeddings and head too. Biases and norms never decay.
        lr_ratio: Learning rate of LoRA's B matrices over that of everything else (LoRA+, arXiv 2402.12354);
            an ``lr`` of the overrides is multiplied as well.
        dense_lr_ratio: Learning rate of what takes the dense rule (embeddings, head, norms, biases) over that of what
            is compressed; it does not touch a rate that ``overrides`` sets. A method that has an option of this name
            (:class:`~hf_lowmem_optim.optimizers.trion.Trion`) gets it, and multiplies every rate of the dense rule.
        **hyper: Hyper-parameters of the optimizer. Those left out have its own defaults, the learning rate too.

    Raises:
        TypeError: The optimizer is not of this package, or a hyper-parameter is unknown or has the wrong type.
        ValueError: The name is unknown, the class is not registered, or a hyper-parameter is out of range.

    Example:
        >>> factory = OptimizerFactory("ldadam", lr=1e-3, rank=32)
        >>> optimizer = factory(model)  # in a plain loop
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(factory, {}))
    """

    def __init__(
        self,
        optimizer: str | type[LowMemoryOptimizer],
        /,
        target_modules: TargetModules = None,
        *,
        overrides: Overrides | None = None,
        lr_ratio: float | None = None,
        dense_lr_ratio: float | None = None,
        **hyper: Any,
    ) -> None:
        self.name = get_entry(optimizer).name
        if dense_lr_ratio is not None and "dense_lr_ratio" in self.optimizer_class.method.options.defaults():
            hyper["dense_lr_ratio"], dense_lr_ratio = dense_lr_ratio, None
        self.target_modules = target_modules
        self.overrides = overrides
        self.lr_ratio = lr_ratio
        self.dense_lr_ratio = dense_lr_ratio
        self.hyper = hyper
        self.optimizer_class.method.check(hyper, self.optimizer_class.__name__)
        check_overrides(overrides, self.optimizer_class, hyper)
        for key, ratio in (("lr_ratio", lr_ratio), ("dense_lr_ratio", dense_lr_ratio)):
            if ratio is not None:
                check_number(key, ratio, POSITIVE)

    @classmethod
    def from_training_args(cls, args: TrainingArguments) -> OptimizerFactory:
        """Make a factory from training arguments, as ``TrainingArguments(optim="ldadam")`` does.

        Args:
            args: Read are ``optim``, ``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2``,
                ``adam_epsilon``, ``optim_args`` and ``optim_target_modules``; for betas and epsilon a value equal to
                the field's default means the optimizer's own default.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: ``optim`` is no optimizer of this package, or a value is wrong.
            NotImplementedError: DeepSpeed would leave it without matrices.
        """
        entry = get_entry(str(getattr(args.optim, "value", args.optim)))
        hyper = hyperparameters_from_training_args(args, entry.optimizer_class)
        error_in_gradients = hyper.get("error_feedback") == "grad"
        check_backward_arguments(args, entry.optimizer_class, error_in_gradients=error_in_gradients)
        check_zero(entry.optimizer_class, hyper, args, None)
        return cls(entry.name, args.optim_target_modules, **hyper)

    @property
    def optimizer_class(self) -> type[LowMemoryOptimizer]:
        """Return the class of the optimizers it makes."""
        return get_entry(self.name).optimizer_class

    @overload
    def __call__(self, /) -> OptimizerFactory: ...

    @overload
    def __call__(self, model: nn.Module, /, **hyper: Any) -> LowMemoryOptimizer: ...

    def __call__(self, model: nn.Module | None = None, /, **hyper: Any) -> LowMemoryOptimizer | OptimizerFactory:
        """Make the optimizer for ``model``.

        Args:
            model: The model, after freezing and adding adapters. Without one the factory returns itself: the Trainer
                calls ``factory()(model, **kwargs)``.
            **hyper: Hyper-parameters that replace the factory's for this optimizer.

        Returns:
            A new optimizer; the factory can be called again.

        Raises:
            TypeError: ``model`` is not a module, or a hyper-parameter is unknown or has the wrong type.
            ValueError: The model has nothing to train, a target or an override matches nothing or has no effect, or a
                hyper-parameter is out of range.
        """
        if model is None:
            if hyper:
                raise TypeError(f"{self!r} was called with {', '.join(hyper)} but without a model")
            return self
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"OptimizerFactory makes its own parameter groups and needs the model, not {type(model).__name__}; "
                f"for groups of your own call hf_lowmem_optim.{self.optimizer_class.__name__}(groups, ...)"
            )
        check_zero(self.optimizer_class, {**self.hyper, **hyper}, None, model)
        return _reported(*self.build(model, **hyper))

    def class_for(self, model: nn.Module) -> type[LowMemoryOptimizer]:
        """Return a class that makes the optimizer for ``model`` from parameter groups of somebody else.

        Every group keeps its settings, split into what is compressed and what is not. What the class makes is an
        instance of :attr:`optimizer_class`.
        """
        # a class goes with the next garbage collection; the model must not wait for that
        alive = weakref.ref(model)

        def make(_: type, params: Iterable[Any], **hyper: Any) -> LowMemoryOptimizer:
            if (model := alive()) is None:
                raise RuntimeError(f"the model that this {self.name} is for is gone")
            check_zero(self.optimizer_class, {**self.hyper, **hyper}, None, model)
            return _reported(*self.build(model, params, **hyper))

        made = self.optimizer_class
        return type(made.__name__, (made,), {"__new__": make, "__module__": __name__, "__doc__": made.__doc__})

    def build(
        self, model: nn.Module, params: Iterable[Any] | None = None, /, **hyper: Any
    ) -> tuple[LowMemoryOptimizer, list[Placement]]:
        """Make the optimizer for ``model`` without a word in the log; the planner takes the same way.

        Args:
            model: The model, on any device: on the meta device this plans a model that does not exist.
            params: Parameters or groups of parameters, as torch's optimizers take them, to which it keeps.
            **hyper: Hyper-parameters that replace the factory's for this optimizer.

        Returns:
            The optimizer, and where each parameter went.
        """
        optimizer_class, method = self.optimizer_class, self.optimizer_class.method
        options = method.check({**self.hyper, **hyper}, optimizer_class.__name__)
        everyone = vars(options)
        check_overrides(self.overrides, optimizer_class, everyone)
        if method.layerwise or everyone.get("error_feedback") == "grad":
            check_adapters(model, f"optim={self.name!r}" if method.layerwise else "error_feedback='grad'")
        given = None if params is None else read_groups(params, model, everyone["weight_decay"])
        own = own_settings(model, self.overrides, self.lr_ratio, everyone["lr"], given)
        listed = [*model.parameters(), *(p for group in given or () for _, p in group.params)]
        switched_on = own.with_value(*method.switch) & {id(p) for p in listed if p.ndim >= 2}
        judge = partial(_rule, method, options)
        # where only the number of entries matters, experts may be compressed together
        stack = {} if method.whole is True or everyone["stacked"] else {"stacked": True}
        placements = place_parameters(model, self.target_modules, judge, own.values, switched_on, given, stack)
        check_overrides_apply(self.overrides, own, placements, optimizer_class)
        placements = scale_dense_rates(placements, own, self.dense_lr_ratio, everyone["lr"])
        groups = build_param_groups(placements, method.switch, everyone["weight_decay"], given)
        with sharded_later(shards_later()):
            return optimizer_class(groups, **everyone), placements

    def __repr__(self) -> str:
        own = {key: getattr(self, key) for key in ("target_modules", "overrides", "lr_ratio", "dense_lr_ratio")}
        settings = {**{key: value for key, value in own.items() if value is not None}, **self.hyper}
        arguments = [repr(self.name), *(f"{key}={value!r}" for key, value in settings.items())]
        return f"OptimizerFactory({', '.join(arguments)})"


def class_and_arguments(
    args: TrainingArguments, model: nn.Module | None
) -> tuple[type[LowMemoryOptimizer], dict[str, Any]]:
    """Return what ``Trainer.get_optimizer_cls_and_kwargs`` does: a class, and its arguments beside parameter groups.

    Raises:
        ValueError: A value is wrong, or needs the model, and there is none.
    """
    factory, remedy = OptimizerFactory.from_training_args(args), "call get_optimizer_cls_and_kwargs(args, model)"
    if model is not None:
        return factory.class_for(model), dict(factory.hyper)
    needing = {"optim_target_modules": factory.target_modules, "lr_ratio": factory.lr_ratio}
    for key, value in {**needing, "dense_lr_ratio": factory.dense_lr_ratio}.items():
        if value is not None:
            raise ValueError(f"{key}={value!r} cannot be followed without the model; {remedy}")
    logger.warning(
        "optim=%r without the model: it cannot tell embeddings and the output head from other matrices, and compresses "
        "all that it is given, but for groups with %s=%r. To leave those two dense, %s.",
        *(factory.name, *factory.optimizer_class.method.switch, remedy),
    )
    return factory.optimizer_class, dict(factory.hyper)


def _rule(method: Method, everyone: Options, parameter: nn.Parameter, own: Mapping[str, Any]) -> str:
    """Return "compressed" for a targeted parameter, or why it is not."""
    options = method.options_of({**vars(everyone), **own}) if own else everyone
    if method.is_dense(vars(options)):
        return SWITCHED_OFF
    compressed = method.compressed_state(parameter.shape, parameter.dtype, options)
    if compressed is None:
        return TOO_SMALL
    # for adapters, with one small dimension, compression may save nothing over AdamW
    dense = adamw_state(parameter.shape, parameter.dtype, options.dense_state)
    sizes = [sum(spec.nbytes for spec in specs.values()) for specs in (compressed, dense)]
    return COMPRESSED if sizes[0] < sizes[1] or not method.adam_like else NOT_WORTH


def _reported(optimizer: LowMemoryOptimizer, placements: Sequence[Placement]) -> LowMemoryOptimizer:
    """Log what went where, and warn where compression was asked for and none came of it."""
    if not _is_main_process():
        return optimizer
    (key, off), who = optimizer.method.switch, type(optimizer).__name__
    setting, rules = optimizer.defaults[key], {placement.rule for placement in placements}
    error = " or error_feedback" if "error_feedback" in optimizer.defaults else ""
    if setting != off and rules & {TOO_SMALL, NOT_WORTH} and COMPRESSED not in rules:
        logger.warning(
            "%s compresses nothing here: every target is too small for %s=%s, or its compressed state would be larger "
            "than that of the dense rule (dense_state=%s), which all %d tensors take therefore. A lower %s%s makes it "
            "smaller.",
            *(who, key, setting, optimizer.defaults["dense_state"], len(placements), key, error),
        )
    elif setting != off and not rules & {COMPRESSED, SWITCHED_OFF}:
        logger.warning(
            "%s compresses nothing here: besides embeddings and the output head no linear or convolution layer has a "
            "trainable weight, so all %d tensors take the dense AdamW rule. If there is something else to compress, "
            "name its modules in optim_target_modules.",
            *(who, len(placements)),
        )
    halves = [p for p in placements if p.rule != COMPRESSED and p.parameter.dtype == torch.float16]
    if any({**optimizer.defaults, **p.settings}["dense_state"] == "param" for p in halves):
        logger.warning(
            "float16 weights keep AdamW's moments in float16 (dense_state=param), where squares of small gradients are "
            "0: its steps then have no bound, as those of torch's. Set dense_state=fp32, or load the model in bfloat16."
        )
    # At warning level, which Python and transformers show by default; not where transformers is told to be silent.
    if transformers_logging.get_verbosity() <= logging.WARNING:
        logger.warning("%s", _summary(optimizer, placements))
    return optimizer


def _summary(optimizer: LowMemoryOptimizer, placements: Sequence[Placement]) -> str:
    """Write the summary of an optimizer made from placements: tensors by rule, and the bytes of state to expect."""
    who, sizes = type(optimizer).__name__, dict[str, list[int]]()
    for placement in sorted(placements, key=lambda placement: placement.rule != COMPRESSED):
        sizes.setdefault(_label(optimizer, placement), []).append(placement.parameter.numel())
    counts = {label: f"{len(n):,} tensor{'s' if len(n) > 1 else ' '}" for label, n in sizes.items()}
    lines = align([(f"  {label}", counts[label], f"{sum(n):,} parameters") for label, n in sizes.items()])
    plan = plan_optimizer(optimizer)
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in plan.component_bytes.items())
    rounded = _ROUNDED[optimizer.defaults["weight_rounding"]]
    if rounded:
        lines.append(f"  weights narrower than float32 {rounded}")
    total, adamw = format_bytes(plan.total_bytes), format_bytes(plan.adamw_fp32_bytes)
    lines.append(f"  state: {total} ({parts}); AdamW in fp32: {adamw}")
    factors = FACTORS.get(optimizer.method.name.removesuffix("_layerwise"))
    lr, usual = (float(values["lr"]) for values in (optimizer.defaults, optimizer.method.options.defaults()))
    if (dense := optimizer.method.options_of(optimizer.defaults).dense_lr) != lr:
        lines.append(f"  learning rate: {lr:g}, {dense:g} for what is dense; the default of {who} is {usual:g}")
    elif all(placement.rule != COMPRESSED for placement in placements):
        lines.append(f"  learning rate: {lr:g}; start with AdamW's, since nothing is compressed")
    elif factors:
        start = f"{factors[0]:g} × AdamW's to fine-tune, {factors[1]:g} × from scratch"
        lines.append(f"  learning rate: {lr:g}; start with {start}")
    if plan.total_bytes > plan.adamw_fp32_bytes:
        scales = " or ".join(key for key in SIZE_KEYS if key in optimizer.method.shaping)
        remedy = f"a smaller {scales}" if scales else "storage in fewer bits"
        lines.append(f"  This is more than AdamW takes; {remedy} saves memory.")
    return "\n".join([f"{who} for {plan.num_parameters:,} trainable parameters:", *lines])


def _label(optimizer: LowMemoryOptimizer, placement: Placement) -> str:
    """Describe the rule of a parameter, with the settings that go with it and those of its own."""
    settings = {**optimizer.defaults, **placement.settings}
    keys = optimizer.method.shaping
    if placement.rule == COMPRESSED:
        shaping, usual = optimizer.method.settings(settings), optimizer.method.options.defaults()
        shaping.pop("dense_state")
        # the first say most; of the others what is not as usual, for lines that fit a terminal
        said_first = [key for number, key in enumerate(shaping) if number < 3 or shaping[key] != usual[key]]
        label = f"compressed ({', '.join(f'{key}={shaping[key]}' for key in said_first)})"
    else:
        key, off = optimizer.method.switch
        keys = (*keys, key)
        reason = f"{key}={off}" if placement.rule == SWITCHED_OFF else placement.rule
        if placement.rule == NOT_TARGET and not placement.name.endswith(".weight"):
            reason += f" ({placement.name.rpartition('.')[2]})"  # a matrix that its module holds by another name
        label = f"{_DENSE[settings['dense_state']]}: {reason}"
    said = (*keys, *(() if placement.decays else ("weight_decay",)))
    own = {key: value for key, value in placement.settings.items() if key not in said}
    texts = (f"{key}={value:g}" if type(value) is float else f"{key}={value}" for key, value in own.items())
    return ", ".join([label, *texts])


def _is_main_process() -> bool:
    """Return whether this process is the one that reports, without setting up any distributed state."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
