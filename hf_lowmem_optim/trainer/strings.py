"""Makes every name of the registry a valid ``optim`` string of transformers.

``TrainingArguments`` and ``set_optimizer`` call ``OptimizerNames(value)``, an Enum, and command lines list its members,
so each name becomes a real member of that Enum; and the Trainer looks the member up in a table of handlers, so each
gets a handler there. Both are additions, and a value which transformers has or gains itself stays transformers' own.
Registering again replaces what is there of ours: this package may have been removed from ``sys.modules`` and imported
anew, and then the functions and classes that were registered first are not those in use.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
from types import ModuleType
from typing import Any

from hf_lowmem_optim.registry import OPTIMIZERS, after_registration
from hf_lowmem_optim.trainer.attachment import (
    CARD_MODULE,
    HANDLERS_MODULE,
    MEMBERS_MODULE,
    TRAINER_MODULE,
    UnsupportedTransformersError,
)

__all__ = ["add_callbacks", "add_handlers", "add_members", "correct_model_cards", "register_optimizer_strings"]

logger = logging.getLogger(__name__)

OLDEST_TRANSFORMERS = "5.2.0"
_MARK = "_registered_by_hf_lowmem_optim"


def register_optimizer_strings() -> None:
    """Register all optim strings now; ``import hf_lowmem_optim`` does it by itself, so this is rarely needed.

    Calling it again changes nothing.

    Raises:
        UnsupportedTransformersError: The installed transformers lacks what the strings are attached to.
    """
    for name, add in ADDITIONS.items():
        add(importlib.import_module(name))


def add_members(training_args: ModuleType) -> None:
    """Add a member per registered optimizer to ``OptimizerNames`` of the module ``transformers.training_args``."""
    names = getattr(training_args, "OptimizerNames", None)
    if names is None or not issubclass(names, str):
        raise _unsupported(f"{MEMBERS_MODULE}.OptimizerNames is not an Enum of strings")
    for name in OPTIMIZERS:
        member = names._value2member_map_.get(name) or _insert_member(names, name)
        if hasattr(member, _MARK):
            # On the instance, where pickle and copy look it up: `training_args.bin` then loads in a process that has
            # not imported this package, because unpickling the member does.
            member.__reduce_ex__ = lambda protocol, name=name: (_restore_member, (name,))
            _check_member(names, member)
        else:
            logger.warning(
                "transformers has an optimizer named optim=%r of its own, which stays in use. For the one of "
                "hf_lowmem_optim pass Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory(%r), {})).",
                *(name, name),
            )


def add_handlers(trainer_optimizer: ModuleType) -> None:
    """Add a handler per registered optimizer to the table in the module ``transformers.trainer_optimizer``."""
    handlers = getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None)
    if not isinstance(handlers, dict):
        raise _unsupported(f"{HANDLERS_MODULE} has no table of optimizer handlers")
    # trainer_optimizer imports training_args, so the members are there.
    names = importlib.import_module(MEMBERS_MODULE).OptimizerNames
    for name in OPTIMIZERS:
        if hasattr(names(name), _MARK):
            handlers[names(name)] = _class_and_arguments


def add_callbacks(trainer: ModuleType) -> None:
    """Add our callbacks to the default ones in the module ``transformers.trainer``, which come before the reporters."""
    from hf_lowmem_optim.trainer.backward import BackwardCallback
    from hf_lowmem_optim.trainer.callbacks import EarlyLogCallback

    defaults = getattr(trainer, "DEFAULT_CALLBACKS", None)
    if not isinstance(defaults, list):
        raise _unsupported(f"{TRAINER_MODULE}.DEFAULT_CALLBACKS is not a list of callbacks")
    ours: list[Any] = [BackwardCallback, EarlyLogCallback]
    # By name, to find those of an earlier import; and in place, because other modules hold the same list.
    names = {(callback.__module__, callback.__name__) for callback in ours}
    others = [each for each in defaults if (each.__module__, getattr(each, "__name__", "")) not in names]
    defaults[:] = [*others, *ours]


def correct_model_cards(modelcard: ModuleType) -> None:
    """Have ``transformers.modelcard`` say of our optimizers what they used.

    It states ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` for whatever has "adam" in its name.
    """
    collect = getattr(modelcard, "extract_hyperparameters_from_trainer", None)
    if collect is None:  # then it states nothing
        return
    original = getattr(collect, _MARK, collect)

    def extract_hyperparameters_from_trainer(trainer: Any) -> Any:
        from hf_lowmem_optim.memory.report import settings_text

        used = settings_text(trainer.optimizer)
        return original(trainer) | ({} if used is None else {"optimizer": used})

    setattr(extract_hyperparameters_from_trainer, _MARK, original)
    modelcard.extract_hyperparameters_from_trainer = extract_hyperparameters_from_trainer  # type: ignore[attr-defined]


#: What is added to which module of transformers, in the order in which they import each other.
ADDITIONS = {
    MEMBERS_MODULE: add_members,
    HANDLERS_MODULE: add_handlers,
    CARD_MODULE: correct_model_cards,
    TRAINER_MODULE: add_callbacks,
}


def _class_and_arguments(context: Any) -> tuple[Any, dict[str, Any]]:
    """Handle transformers' ``OptimizerContext``: return a class and its keyword arguments, as its own handlers do."""
    # not a factory, to which the Trainer would not give the groups that it, or a subclass, has made
    from hf_lowmem_optim.trainer.factory import class_and_arguments

    return class_and_arguments(context.args, context.model)


def _insert_member(names: Any, name: str) -> Any:
    """Create the member ``name`` of the string Enum ``names`` the way the Enum's own metaclass would."""
    member_name = name.upper()
    if member_name in names._member_map_:
        raise _unsupported(f"OptimizerNames.{member_name} exists already with another value")
    member = str.__new__(names, name)
    member._name_, member._value_, member._sort_order_ = member_name, name, len(names._member_names_)
    member.__objclass__ = names
    setattr(member, _MARK, True)
    # Before the maps know it: afterwards the metaclass takes it for the reassignment of a member and refuses.
    setattr(names, member_name, member)
    names._member_names_.append(member_name)
    names._member_map_[member_name] = member
    names._value2member_map_[name] = member
    if hasattr(names, "_hashable_values_"):  # Python 3.13
        names._hashable_values_.append(name)
    return member


def _restore_member(name: str) -> Any:
    """Return the member ``name``; what a pickled member calls when it is loaded."""
    return importlib.import_module(MEMBERS_MODULE).OptimizerNames(name)


def _check_member(names: Any, member: Any) -> None:
    """Assert everything that transformers does with a member."""
    found = (names(member.value), names[member.name], getattr(names, member.name), pickle.loads(pickle.dumps(member)))
    equal = member == member.value and hash(member) == hash(member.value)
    if not (equal and member in list(names) and all(each is member for each in found)):
        raise _unsupported(f"OptimizerNames did not take the new member {member.value!r}")


def _unsupported(reason: str) -> UnsupportedTransformersError:
    """Describe what is wrong with the installed transformers and what to do."""
    import transformers

    return UnsupportedTransformersError(
        f"hf_lowmem_optim cannot add its optim strings ({', '.join(OPTIMIZERS)}) to transformers "
        f"{transformers.__version__}: {reason}. Supported: transformers >= {OLDEST_TRANSFORMERS}. With another version "
        f"pass Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory({next(iter(OPTIMIZERS))!r}), {{}})) instead."
    )


def _add_to_loaded_modules() -> None:
    """Add what was registered later to the modules that are there; the import hook adds it to the others."""
    for name, add in ADDITIONS.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            add(module)


# This module is loaded with the first module of transformers that it adds to. What was registered before that is in the
# table already.
after_registration.append(_add_to_loaded_modules)
