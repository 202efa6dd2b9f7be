"""DeepSpeed ZeRO hands over flat vectors: refused where a method needs matrices. Stand-ins take DeepSpeed's place."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from hf_lowmem_optim import OPTIMIZERS, IOBSPruningCallback, LDAdam, MicroAdam, OptimizerFactory
from hf_lowmem_optim.trainer.factory import class_and_arguments
from tests.trainer.tiny_models import tiny_llama

NEED_MATRICES = [name for name in OPTIMIZERS if name != "microadam"]


@pytest.fixture
def zero_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set accelerate up as its launcher does for ZeRO-2."""
    plugin = SimpleNamespace(zero_stage=2, selected=True)
    process = {"distributed_type": DistributedType.DEEPSPEED, "process_index": 0, "local_process_index": 0}
    monkeypatch.setattr(PartialState, "_shared_state", {**process, "backend": "gloo", "fork_launched": False})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {**process, "deepspeed_plugins": {"default": plugin}})


@pytest.mark.parametrize("name", NEED_MATRICES)
def test_a_method_that_needs_matrices_is_refused_with_the_remedy(name: str, zero_2: None) -> None:
    said = r"ZeRO stage 2 hands \w+ one flat vector .* as AdamW\. Use FSDP2 .*ZeRO-2\), or ZeRO stage 0, or optim="
    with pytest.raises(NotImplementedError, match=said):
        OptimizerFactory(name)(tiny_llama())


def test_training_arguments_are_enough(tmp_path: Path) -> None:
    """The Trainer asks for the class before there are parameter groups."""
    args = TrainingArguments(str(tmp_path), optim="ldadam", use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(NotImplementedError, match="ZeRO stage 3"):
        class_and_arguments(args, None)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=0)
    assert class_and_arguments(args, None)[0] is LDAdam


def test_pruning_is_refused_however_deepspeed_was_started(tmp_path: Path, zero_2: None) -> None:
    """``accelerate launch`` leaves ``args.deepspeed`` as it is."""
    args, state = SimpleNamespace(deepspeed=None, deepspeed_plugin=None), SimpleNamespace()
    with pytest.raises(NotImplementedError, match="DeepSpeed"):
        # stand-ins: real arguments would start DeepSpeed, which is not installed
        IOBSPruningCallback(sparsity=0.5).on_train_begin(args, state, None)  # type: ignore[arg-type]


def test_what_is_asked_to_be_adamw_may_be(zero_2: None) -> None:
    OptimizerFactory("ldadam", rank=None)(tiny_llama())


def test_microadam_says_what_it_is_on_flat_vectors(zero_2: None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    OptimizerFactory("microadam")(model)
    assert (
        "ZeRO stage 2 hands over one flat vector per process. MicroAdam then selects entries in blocks" in caplog.text
    )
    # zero.Init leaves tensors without entries
    next(model.parameters()).ds_shape = torch.Size([4, 4])  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match=r"in parts \(zero\.Init\)"):
        OptimizerFactory("microadam")(model)


def flattened(optimizer_class: Any, **hyper: Any) -> Any:
    """Build an optimizer and put flat vectors into its groups, as DeepSpeed's wrappers do."""
    groups = [{"params": [nn.Parameter(torch.ones(256, 384))]}, {"params": [nn.Parameter(torch.ones(96))]}]
    optimizer = optimizer_class(groups, lr=1e-2, **hyper)
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.ones(group["params"][0].numel()))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    return optimizer


@pytest.mark.parametrize("name", NEED_MATRICES)
def test_flat_vectors_in_the_place_of_matrices_are_refused_at_the_first_step(name: str) -> None:
    """Also where nothing said that DeepSpeed would be there."""
    if OPTIMIZERS[name].optimizer_class.method.layerwise:
        pytest.skip("its hooks are gone with the parameters, or it is refused for several processes")
    optimizer = flattened(OPTIMIZERS[name].optimizer_class)
    with pytest.raises(NotImplementedError, match=r"replaced by flat vectors.*would not find a matrix"):
        optimizer.step()
    assert not optimizer.state


def test_microadam_notes_once_that_its_vectors_are_flat(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = flattened(MicroAdam)
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    assert caplog.text.count("an experimental variant") == 1
    assert "indices" in optimizer.state[optimizer.param_groups[0]["params"][0]]


def test_vectors_from_the_start_are_nobodys_flat_matrices() -> None:
    vector = nn.Parameter(torch.ones(5000))
    vector.grad = torch.ones_like(vector)
    LDAdam([vector]).step()
