"""Which parameters of a model are compressed, and which take the dense rule and why.

A parameter may be owned by several modules (tied weights). It enters one group, once, and if any owner is an embedding
or the output head it is dense, unless ``optim_target_modules`` selects it explicitly.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer import Trainer
from transformers.trainer_utils import check_target_module_exists

from hf_lowmem_optim.engine.options import nearest, shown

__all__ = [
    "GivenGroup",
    "Placement",
    "build_param_groups",
    "compile_regex",
    "matching_modules",
    "place_parameters",
    "prunable_weights",
    "read_groups",
]

MAX_ENTRY = 10_000
"""Characters of a name or regex; looking for a much longer one takes minutes."""
_MAX_SECONDS = 0.02
"""Of the processor, to match one name with a regex, which takes microseconds otherwise."""

TargetModules = str | Sequence[str] | None
"""What TrainingArguments.optim_target_modules may be."""

COMPRESSED = "compressed"
TOO_SMALL = "too small for this compression"
SWITCHED_OFF = "compression switched off"
NOT_WORTH = "compressed state would be larger"
EMBEDDING = "embedding"
HEAD = "output head"
VECTOR = "norm, bias or other vector"
NOT_TARGET = "not a target module"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRIX_MODULES = (nn.Linear, Conv1D, *_CONVOLUTIONS)
_EMBEDDING_MODULES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Placement:
    """Where one trainable parameter goes."""

    name: str  # its first one in the model
    parameter: nn.Parameter
    rule: str  # "compressed", or why it takes the dense rule: "embedding", "output head", ...
    decays: bool
    settings: Mapping[str, Any] = field(default_factory=dict)  # its own hyper-parameters, where not those of all
    group: int = 0  # which of the given groups it is in; without such, 0 decays and 1 does not

    @property
    def targeted(self) -> bool:
        """Return whether it goes to a group with compression (where the optimizer may find it too small)."""
        return self.rule in (COMPRESSED, TOO_SMALL)


@dataclass(frozen=True)
class GivenGroup:
    """A parameter group that a Trainer's subclass or another library made."""

    params: Sequence[tuple[str, nn.Parameter]]
    weight_decay: float
    settings: Mapping[str, Any]  # all else


def read_groups(params: Iterable[Any], model: nn.Module, weight_decay: float) -> list[GivenGroup]:
    """Read what torch's optimizers take: parameters or groups; the model has names, where they have none."""
    entries, names = list(params), {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for index, group in enumerate(entries if entries and isinstance(entries[0], dict) else [{"params": entries}]):
        members = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        pairs = [each if isinstance(each, tuple) else (names.get(id(each)), each) for each in members]
        named = [(name or f"{number} of group {index}", each) for number, (name, each) in enumerate(pairs)]
        settings = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        groups.append(GivenGroup(named, group.get("weight_decay", weight_decay), settings))
    return groups


def place_parameters(
    model: nn.Module,
    target_modules: TargetModules,
    judge: Callable[[nn.Parameter, Mapping[str, Any]], str],
    own: Mapping[int, Mapping[str, Any]] | None = None,
    also_targeted: Set[int] = frozenset(),
    given: Sequence[GivenGroup] | None = None,
    stack_settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[Placement]:
    """Decide for every trainable parameter of ``model``, each listed once, in the model's order.

    Where there are groups already, decide for every parameter in them, in their order.

    Where ``target_modules`` is None and the model trains no linear or convolution weight (IA³, prompt tuning, a head
    alone), everything is dense.

    Args:
        model: Any module; transformers models may be wrapped (PEFT, DDP) or be parts of it.
        target_modules: ``TrainingArguments.optim_target_modules``: a list of names (of which a part suffices, or a
            regex), also as JSON; the name of layers; a regex for the whole name; ``"all-linear"``; or None for every
            linear and convolution weight except embeddings and the output head.
        judge: From a targeted parameter and its own settings to its rule: ``"compressed"``, or why it is not.
        own: Settings of single parameters, by id.
        also_targeted: Ids of parameters that are targeted besides.
        given: The groups that there are already.
        stack_settings: What is set for targeted stacks of experts where their own settings do not say otherwise.

    Raises:
        TypeError: ``target_modules`` is neither a list of strings, a string nor None.
        ValueError: The model has no trainable parameter, or a target matches nothing.
    """
    if given is None:
        # The Trainer's own rule: a method that does not use its instance, in every version from 5.2 on.
        decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        # Named with their first name and without duplicates, as the Trainer lists them.
        members = [(name, p, int(name not in decaying)) for name, p in model.named_parameters() if p.requires_grad]
        decays = [True, False]
    else:
        members = [(name, p, index) for index, group in enumerate(given) for name, p in group.params]
        decays = [group.weight_decay > 0 for group in given]
    if not any(parameter.requires_grad for _, parameter, _ in members):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: every requires_grad is False. "
            "Unfreeze some, or add an adapter, before the optimizer is made."
        )
    reasons = _dense_reasons(model)
    if target_modules is None:
        targets = _matrix_weights(model) - reasons.keys() | also_targeted
    else:
        targets = _selected_targets(model, target_modules) | also_targeted
    stacks, biases = _expert_parameters(model)
    placements = []
    for name, parameter, group in members:
        settings = (own or {}).get(id(parameter), {})
        if parameter.ndim < 2 or id(parameter) in biases:
            rule = VECTOR
        elif id(parameter) in targets:
            if id(parameter) in stacks:  # what is switched off is as if nothing were set
                settings = {k: v for k, v in {**stack_settings, **settings}.items() if v or k not in stack_settings}
            rule = judge(parameter, settings)
        else:
            rule = reasons.get(id(parameter), NOT_TARGET)
        placements.append(Placement(name, parameter, rule, decays[group], settings, group))
    return placements


def build_param_groups(
    placements: Iterable[Placement],
    switch: tuple[str, Any],
    weight_decay: float,
    given: Sequence[GivenGroup] | None = None,
) -> list[dict[str, Any]]:
    """Turn placements into the optimizer's parameter groups: targeted or dense, with weight decay or without.

    Parameters with the same settings of their own are in groups of their own, behind those without. No group is empty.

    Args:
        placements: What :func:`place_parameters` returned.
        switch: The option that sends a group to the dense rule, and the value that does.
        weight_decay: Weight decay of the parameters that decay, where no groups are given.
        given: The groups that the placements were made for.
    """
    gathered: dict[tuple[int, bool, int], list[Placement]] = {}
    numbers: dict[str, int] = {}
    for known in [{}] if given is None else [group.settings for group in given]:
        numbers.setdefault(repr(known), len(numbers))
    for placement in placements:
        number = numbers.setdefault(repr(placement.settings), len(numbers))
        gathered.setdefault((number, not placement.targeted, placement.group), []).append(placement)
    groups = []
    for (_, dense, index), chosen in sorted(gathered.items(), key=lambda item: item[0]):
        decay = weight_decay if given is None else given[index].weight_decay
        settings = {"weight_decay": decay, **chosen[0].settings, **dict([switch] if dense else [])}
        if not chosen[0].decays:
            settings["weight_decay"] = 0.0
        groups.append({"params": [(p.name, p.parameter) for p in chosen], **settings})
    return groups


def prunable_weights(model: nn.Module, target_modules: TargetModules) -> set[int]:
    """Return ids of the weights that may be pruned: those that are targeted, but for adapters.

    Args:
        model: The model.
        target_modules: As for :func:`place_parameters`.
    """
    if target_modules is None:
        targets = _matrix_weights(model) - _dense_reasons(model).keys()
    else:
        targets = _selected_targets(model, target_modules)
    for module in model.modules():  # peft's layers say which of their parts are adapters
        for name in getattr(module, "adapter_layer_names", ()):
            adapters = getattr(module, name, None)
            if isinstance(adapters, (nn.Module, nn.ParameterDict)):
                targets -= {id(parameter) for parameter in adapters.parameters()}
    return targets


def _matrix_weights(model: nn.Module) -> set[int]:
    """Return ids of the trainable weights of linear and convolution layers, and of stacked experts."""
    weights = {id(module.weight) for module in model.modules() if isinstance(module, _MATRIX_MODULES)}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return (weights | _expert_parameters(model)[0]) & trained


def _expert_parameters(model: nn.Module) -> tuple[set[int], set[int]]:
    """Return ids of the stacks of experts' weights, [experts, ...], and of the stacks of their biases.

    Those are in modules that hold all experts of a layer, which transformers names ``MixtralExperts`` and the like.
    """
    stacks, biases = set[int](), set[int]()
    for module in model.modules():
        if not any("experts" in kind.__name__.lower() for kind in type(module).__mro__):
            continue
        held = list(module.parameters(recurse=False))
        if any(parameter.ndim == 3 for parameter in held):
            stacks.update(id(parameter) for parameter in held if parameter.ndim == 3)
            biases.update(id(parameter) for parameter in held if parameter.ndim == 2)
    return stacks, biases


def _selected_targets(model: nn.Module, target_modules: str | Sequence[str]) -> set[int]:
    """Return ids of the parameters which ``optim_target_modules`` selects; every entry must select something."""
    target_modules = _from_command_line(model, target_modules)
    entries = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        raise TypeError(
            f"optim_target_modules={shown(target_modules)} must be a list of module names, a regex or 'all-linear'"
        )
    if isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear":
        return _matrix_weights(model)
    if not entries or not all(entries):
        raise ValueError(
            f"optim_target_modules={shown(target_modules)} is empty or has an empty entry; name at least one module, "
            "or leave it unset to compress every linear layer except the output head"
        )
    selected: set[int] = set()
    for entry in entries:
        # transformers' rule: a lone string is a regex for the whole name, an entry of a list may be a part of it.
        pattern = entry if isinstance(target_modules, str) else [entry]
        matching = matching_modules(model, pattern, f"optim_target_modules={shown(target_modules)}", _matrices)
        selected |= {id(p) for module in matching.values() for p in _matrices(module) if p.requires_grad}
    return selected


def _from_command_line(model: nn.Module, target_modules: str | Sequence[str]) -> str | Sequence[str]:
    """Return the list that a string stands for: JSON, or the bare name of layers that is nothing's whole name."""
    if not isinstance(target_modules, str):
        return target_modules
    if target_modules.startswith('["'):
        try:
            listed: list[str] = json.loads(target_modules)
        except ValueError as error:
            raise ValueError(f"optim_target_modules={target_modules!r} is not a JSON list of names: {error}") from error
        return listed
    modules = dict(model.named_modules())
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if any(True for _ in _matrices(module))}
    return [target_modules] if target_modules in leaves - modules.keys() else target_modules


def matching_modules(
    model: nn.Module, pattern: str | list[str], where: str, held: Callable[[nn.Module], Iterable[nn.Parameter]]
) -> dict[str, nn.Module]:
    """Return the modules of a model that a pattern matches, by name, at least one with a trainable parameter.

    Args:
        model: The model.
        pattern: A regex for the whole name; or a list of one entry: a name, a part of it, or a regex for all of it.
        where: What the pattern was given as, for the errors.
        held: The parameters of a module that count.

    Raises:
        ValueError: It matches nothing, or nothing that is trained, or is no regex.
    """
    entry = pattern if isinstance(pattern, str) else pattern[0]
    modules = {name: module for name, module in model.named_modules() if name}
    compile_regex(entry, where, modules)
    matching = {name: module for name, module in modules.items() if check_target_module_exists(pattern, name)}
    if any(parameter.requires_grad for module in matching.values() for parameter in held(module)):
        return matching
    by_kind: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(parameter.requires_grad for parameter in held(module)):
            by_kind.setdefault(name.rpartition(".")[2], name)
    examples = ", ".join(map(repr, list(by_kind.values())[:4])) or "none, since none is trained"
    if matching:
        kind = " of two or more dimensions" * (held is _matrices)
        raise ValueError(
            f"{where}: {shown(entry)} matches {len(matching)} modules, for example {next(iter(matching))!r}, but none "
            f"of them holds a trainable parameter{kind} itself; name the layers that do, such as {examples}"
        )
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if list(held(module))}
    raise ValueError(
        f"{where}: {shown(entry)} matches no module of {type(model).__name__}; a regex must match the whole name of a "
        f"module, such as {examples}{nearest(entry, leaves)}"
    )


def compile_regex(entry: str, where: str, names: Iterable[str] = ()) -> re.Pattern[str]:
    """Compile what a user wrote, or raise ValueError, also if it takes too long to match one of the names.

    Some, such as ``(.*)*x``, take twice as long with every letter, and a search cannot be stopped: so each kind of name
    is matched letter by letter first.

    Args:
        entry: The regex.
        where: What it was given as.
        names: What it is to be matched with.
    """
    if len(entry) > MAX_ENTRY:
        raise ValueError(f"{where}: {shown(entry)} has {len(entry):,} characters, of {MAX_ENTRY:,} at most")
    try:
        regex = re.compile(entry)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {shown(entry)} is not a valid regex: {error}") from error
    # of names that differ in numbers alone, the longest
    kinds = {re.sub("[0-9]+", "0", name): name for name in sorted(names, key=len)}
    for name in kinds.values() if set("*+{") & set(entry) else ():
        for end in range(1, len(name) + 1):
            started = time.thread_time()
            regex.fullmatch(name, 0, end)
            if time.thread_time() - started > _MAX_SECONDS:
                raise ValueError(
                    f"{where}: {shown(entry)} takes too long to match {name[:end]!r}: every letter more takes a "
                    "multiple. Do not repeat what has a repetition in it, as in (a+)+"
                )
    return regex


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters of two or more dimensions that ``module`` holds itself."""
    return (parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2)


def _dense_reasons(model: nn.Module) -> Mapping[int, str]:
    """Return ids of all parameters of embeddings and output heads, and which of the two they belong to.

    Both count through every owner: a head tied to the embedding is found as either.
    """
    reasons: dict[int, str] = {}
    for head in _heads(model):
        reasons.update((id(parameter), HEAD) for parameter in head.parameters())
    for module in model.modules():
        # peft's adapter of an embedding is no embedding itself, but has one as its base layer
        if any(isinstance(each, _EMBEDDING_MODULES) for each in (module, getattr(module, "base_layer", None))):
            reasons.update((id(parameter), EMBEDDING) for parameter in module.parameters())
    return reasons


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Find the output heads of every transformers model inside ``model``, also under wrappers (PEFT, DDP).

    The output embeddings; and in a model made of a base model and a head (classification, question answering, ...)
    everything outside the base model.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        output = cast(Any, module).get_output_embeddings()
        if isinstance(output, nn.Module):
            yield output
        if module.base_model is not module:
            yield from _outside(module, set(module.base_model.modules()))


def _outside(module: nn.Module, inside: set[nn.Module]) -> Iterator[nn.Module]:
    """Find the largest submodules of ``module`` that share no module with ``inside``."""
    for child in module.children():
        if inside.isdisjoint(child.modules()):
            yield child
        elif child not in inside:
            yield from _outside(child, inside)
