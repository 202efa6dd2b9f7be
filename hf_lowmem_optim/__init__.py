"""Memory-efficient optimizers as a Hugging Face Trainer plugin.

Importing this package makes ``TrainingArguments(optim="ldadam")`` (and every other name of
``hf_lowmem_optim.OPTIMIZERS``) valid. It imports neither transformers nor torch by itself: the names below are loaded
when they are first used, and the optim strings are added when transformers is imported, before or after this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowmem_optim.engine.averaging import keep_gradients_local
    from hf_lowmem_optim.engine.backward import layerwise
    from hf_lowmem_optim.engine.capture import CapturedStep
    from hf_lowmem_optim.engine.fp32_weights import fp32_state_dict, load_fp32_state_dict_
    from hf_lowmem_optim.engine.method import Method
    from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
    from hf_lowmem_optim.engine.options import Options, option
    from hf_lowmem_optim.local_updates.optimizer import LocalUpdates
    from hf_lowmem_optim.local_updates.outer import OuterNesterov
    from hf_lowmem_optim.memory.measure import StateReport, measure_state
    from hf_lowmem_optim.memory.plan import plan_optimizer, plan_state
    from hf_lowmem_optim.memory.plan_types import MemoryPlan
    from hf_lowmem_optim.memory.report import build_report, write_report
    from hf_lowmem_optim.nested_lora.matryoshka import MatryoshkaLora
    from hf_lowmem_optim.nested_lora.ranks import aurac
    from hf_lowmem_optim.optimizers.dash import Dash
    from hf_lowmem_optim.optimizers.dct_adamw import DCTAdamW
    from hf_lowmem_optim.optimizers.ldadam import LDAdam
    from hf_lowmem_optim.optimizers.lordo import LoRDO
    from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFAC
    from hf_lowmem_optim.optimizers.microadam import MicroAdam
    from hf_lowmem_optim.optimizers.sparse_ggt import SparseGGT
    from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC
    from hf_lowmem_optim.optimizers.trion import Trion
    from hf_lowmem_optim.pruning.layers import iobs_layers_
    from hf_lowmem_optim.pruning.pruner import IOBSPruner
    from hf_lowmem_optim.registry import (
        OPTIMIZERS,
        LDAdamLayerwise,
        MicroAdamLayerwise,
        OptimizerEntry,
        get_entry,
        register_optimizer,
    )
    from hf_lowmem_optim.spec import TensorSpec
    from hf_lowmem_optim.trainer.callbacks import OptimizerStateMemoryCallback
    from hf_lowmem_optim.trainer.factory import OptimizerFactory
    from hf_lowmem_optim.trainer.local_updates import LocalUpdatesCallback
    from hf_lowmem_optim.trainer.model_source import ModelOptions
    from hf_lowmem_optim.trainer.nested_lora import RankEvaluationCallback, attach_nested_lora
    from hf_lowmem_optim.trainer.plan_model import plan_memory
    from hf_lowmem_optim.trainer.pruning import IOBSPruningCallback
    from hf_lowmem_optim.trainer.strings import register_optimizer_strings

__version__ = "0.2.0"

__all__ = [
    "OPTIMIZERS",
    "CapturedStep",
    "DCTAdamW",
    "Dash",
    "IOBSPruner",
    "IOBSPruningCallback",
    "LDAdam",
    "LDAdamLayerwise",
    "LoRDO",
    "LocalUpdates",
    "LocalUpdatesCallback",
    "LowMemoryOptimizer",
    "LowRankMFAC",
    "MatryoshkaLora",
    "MemoryPlan",
    "Method",
    "MicroAdam",
    "MicroAdamLayerwise",
    "ModelOptions",
    "OptimizerEntry",
    "OptimizerFactory",
    "OptimizerStateMemoryCallback",
    "Options",
    "OuterNesterov",
    "RankEvaluationCallback",
    "SparseGGT",
    "SparseMFAC",
    "StateReport",
    "TensorSpec",
    "Trion",
    "attach_nested_lora",
    "aurac",
    "build_report",
    "fp32_state_dict",
    "get_entry",
    "iobs_layers_",
    "keep_gradients_local",
    "layerwise",
    "load_fp32_state_dict_",
    "measure_state",
    "option",
    "plan_memory",
    "plan_optimizer",
    "plan_state",
    "register_optimizer",
    "register_optimizer_strings",
    "write_report",
]

_MODULES = {
    "engine.averaging": "keep_gradients_local",
    "engine.backward": "layerwise",
    "engine.capture": "CapturedStep",
    "engine.fp32_weights": "fp32_state_dict load_fp32_state_dict_",
    "engine.method": "Method",
    "engine.optimizer": "LowMemoryOptimizer",
    "engine.options": "Options option",
    "local_updates.optimizer": "LocalUpdates",
    "local_updates.outer": "OuterNesterov",
    "memory.measure": "StateReport measure_state",
    "memory.plan": "plan_optimizer plan_state",
    "memory.plan_types": "MemoryPlan",
    "memory.report": "build_report write_report",
    "nested_lora.matryoshka": "MatryoshkaLora",
    "nested_lora.ranks": "aurac",
    "optimizers.dash": "Dash",
    "optimizers.dct_adamw": "DCTAdamW",
    "optimizers.ldadam": "LDAdam",
    "optimizers.lordo": "LoRDO",
    "optimizers.lowrank_mfac": "LowRankMFAC",
    "optimizers.microadam": "MicroAdam",
    "optimizers.sparse_ggt": "SparseGGT",
    "optimizers.sparse_mfac": "SparseMFAC",
    "optimizers.trion": "Trion",
    "pruning.layers": "iobs_layers_",
    "pruning.pruner": "IOBSPruner",
    "registry": "OPTIMIZERS LDAdamLayerwise MicroAdamLayerwise OptimizerEntry get_entry register_optimizer",
    "spec": "TensorSpec",
    "trainer.callbacks": "OptimizerStateMemoryCallback",
    "trainer.factory": "OptimizerFactory",
    "trainer.local_updates": "LocalUpdatesCallback",
    "trainer.model_source": "ModelOptions",
    "trainer.nested_lora": "RankEvaluationCallback attach_nested_lora",
    "trainer.plan_model": "plan_memory",
    "trainer.pruning": "IOBSPruningCallback",
    "trainer.strings": "register_optimizer_strings",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Load a public name from its module the first time it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those that are not loaded yet."""
    return sorted([*globals(), *_HOME])


# Last, because registration imports submodules of this package when transformers is already there.
from hf_lowmem_optim.trainer import import_hook  # noqa: E402

import_hook.install()
del import_hook
