"""What the processes of ``test_fsdp2.py`` do: the Trainer with accelerate's FSDP2, on CPUs.

accelerate takes its FSDP2 path for GPUs only. The processes say that they have some, by two patches of accelerate.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_lowmem_optim import LDAdam, OptimizerStateMemoryCallback, layerwise, plan_memory
from hf_lowmem_optim.engine.sharding.traffic import step_traffic
from hf_lowmem_optim.memory.communication import fsdp_sent_bytes
from hf_lowmem_optim.memory.measure import measure_state
from hf_lowmem_optim.memory.plan import plan_optimizer
from tests.local_updates.trainer_jobs import say_where_the_group_is
from tests.sharding.counting import counted
from tests.sharding.processes import die

#: Before it torch scrambles unevenly split tensors in full checkpoints, and gloo adds up instead of averaging.
IS_OLD_TORCH = torch.__version__ < "2.13"
SIZES = {"hidden_size": 32, "intermediate_size": 71, "num_hidden_layers": 2, "num_attention_heads": 2}
PARTS = "SHARDED_STATE_DICT"
FULL = PARTS if IS_OLD_TORCH else "FULL_STATE_DICT"
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "fsdp2_full_finetuning.py"
EXAMPLE_OPTIONS = ["--max_steps", "2", "--save_steps", "1", "--batch_size", "2"]
#: All processes together have this many rows in a micro-batch, and two micro-batches a step.
ROWS = 4


@dataclass(frozen=True)
class Run:
    """A way to train; every one accumulates, and clips but for layer-wise mode and what is compared with it."""

    optim: str
    optim_args: str
    kind: str = FULL
    dtype: torch.dtype = torch.float32
    lora: bool = False
    max_grad_norm: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "ldadam": Run("ldadam", "rank=4", max_grad_norm=0),
    "layerwise": Run("ldadam_layerwise", "rank=4", PARTS, max_grad_norm=0),
    "bfloat16": Run("ldadam", "rank=4,weight_rounding=stochastic", PARTS, torch.bfloat16),
    "microadam": Run("microadam", "min_compress_size=1000", config={"activation_checkpointing": True}),
    "sparse_mfac": Run("sparse_mfac", "density=0.1,window=4", PARTS),
    "lora": Run("ldadam", "rank=2", lora=True, config={"reshard_after_forward": False}),
}


def pretend_to_have_gpus() -> None:
    def set_device(state: Any) -> None:
        if state.device is None:
            state.device = torch.device("cpu")

    backend = ("gloo", DistributedType.MULTI_GPU)
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: backend  # type: ignore[method-assign]
    accelerate.state.PartialState.set_device = set_device  # type: ignore[method-assign]


def make_trainer(folder: Path, run: Run, callbacks: Sequence[TrainerCallback] = (), **more: Any) -> Trainer:
    """Build what trains four steps."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=65, tie_word_embeddings=False, **SIZES)
    model: Any = LlamaForCausalLM(config).to(run.dtype)
    if run.lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(i, i + 16) % 64 for i in range(64))]
    fsdp = {"version": 2, "state_dict_type": run.kind, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "optim": run.optim,
            "optim_args": run.optim_args,
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": ROWS // int(os.environ["WORLD_SIZE"]),
            "gradient_accumulation_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "dataloader_pin_memory": False,
            "fsdp": True,
            "fsdp_config": {**fsdp, **run.config},
            "learning_rate": 1e-2,
            "max_grad_norm": run.max_grad_norm,
            **more,
        }
    )
    return Trainer(model, args, train_dataset=rows, callbacks=[OptimizerStateMemoryCallback(), Averaging(), *callbacks])


def whole(value: Any) -> Any:
    return value.full_tensor().detach().clone() if isinstance(value, DTensor) else value


def average(model: Any) -> None:
    """Have FSDP2 divide sums of gradients, also where gloo does not average."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


class Averaging(TrainerCallback):
    """Does so in the Trainer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        average(model)


class Recorder(TrainerCallback):
    """Keeps weights and state as they are at a checkpoint, or where a run goes on from one."""

    def __init__(self) -> None:
        self.weights: list[Any] = []
        self.state: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step:
            self.record(**given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2:
            self.record(**given)

    def record(self, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.weights = [whole(param) for param in model.parameters()]
        inner = optimizer.optimizer
        params = [param for group in inner.param_groups for param in group["params"]]
        self.state = [{key: whole(value) for key, value in inner.state[param].items()} for param in params]


def same(a: Any, b: Any) -> bool:
    """Return whether weights or state are the same bit for bit."""
    if isinstance(a, dict):
        return bool(a.keys() == b.keys() and all(same(a[key], b[key]) for key in a))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def train(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train without a break; leave weights and state at the checkpoint and the weights of the end."""
    pretend_to_have_gpus()
    found = {}
    for name, run in RUNS.items():
        recorder = Recorder()
        trainer = make_trainer(folder / name, run, [recorder])
        planned = plan_memory(trainer.model, run.optim, optim_args=run.optim_args, gpus=world, sharding="fsdp")
        trainer.train()
        params, inner = list(trainer.model.parameters()), trainer.optimizer.optimizer
        assert trainer.accelerator.is_fsdp2 and all(isinstance(param, DTensor) for param in params)
        assert all(param.dtype == run.dtype for param in params if param.requires_grad)
        assert any(inner.method.compresses(p.shape, group) for group in inner.param_groups for p in group["params"])
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert rank or all(
            0 < log["optimizer_state/total_bytes"] == logs[0]["optimizer_state/predicted_bytes"] for log in logs
        )
        # on each process; the command plans the first one, which has the largest parts
        measured = measure_state(inner, local=True)
        assert measured == plan_optimizer(inner, local=True), name
        assert rank or logs[0]["optimizer_state/process_bytes"] == measured.total_bytes
        state = planned[run.optim].state
        assert state is not None
        assert rank or (state.component_bytes, state.group_bytes) == (measured.component_bytes, measured.group_bytes)
        held = sum(param.to_local().nbytes for param in params if param.requires_grad)
        assert rank or planned.weights.gradient_bytes == {"gradients": held}
        if inner.method.layerwise:
            gradients = sum(param.to_local().nbytes for param in params)
            assert 0 < inner.peak_gradient_bytes < gradients / 2 and all(log["grad_norm"] > 0 for log in logs)
        end = [whole(param) for param in params]
        if rank == 0:
            torch.save((recorder.weights, recorder.state, end), folder / f"{name}.pt")
            if name == "layerwise":
                assert same(end, torch.load(folder / "ldadam.pt")[2])
        found[name] = {state["step"] for state in inner.state.values()}
    return found


def resume(rank: int, world: int, folder: Path) -> dict[str, tuple[bool, bool, float]]:
    """Go on from the checkpoint: does it begin with the same bits, end with them, and how far off is the end?"""
    pretend_to_have_gpus()
    found = {}
    for name in RUNS if world > 1 else ("bfloat16", "sparse_mfac", "lora"):
        run = RUNS[name]
        weights, state, end = torch.load(folder / f"{name}.pt")
        recorder = Recorder()
        trainer = make_trainer(folder / name, run, [recorder], save_strategy="no")
        trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
        begins = same(recorder.weights, weights) and same(recorder.state, state)
        ours = [whole(param) for param in trainer.model.parameters()]
        moved = sum(((a - b).float().square().sum() for a, b in zip(end, weights, strict=True)), torch.zeros(()))
        off = sum(((a - b).float().square().sum() for a, b in zip(ours, end, strict=True)), torch.zeros(()))
        found[name] = (begins, same(ours, end), (off / moved).sqrt().item())
    return found


class Armed(TrainerCallback):
    """Ends the process in the middle of its third step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            for name in ("all_to_all_single", "all_reduce"):
                setattr(dist, name, lambda *args, **kwargs: die(self.folder))


def killed(rank: int, world: int, folder: Path) -> float:
    """Lose a process: the others end with an error; return the seconds that it took."""
    pretend_to_have_gpus()
    trainer = make_trainer(folder / "killed", RUNS["ldadam"], [Armed(folder)] if rank == 1 else [])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|timed out"):
        trainer.train()
    assert trainer.state.global_step == 2
    return time.monotonic() - start


def resume_the_killed(rank: int, world: int, folder: Path) -> bool:
    """Go on from what the run left, and end as the one that was not killed."""
    pretend_to_have_gpus()
    trainer = make_trainer(folder / "killed", RUNS["ldadam"], save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    end = torch.load(folder / "ldadam.pt")[2]
    return same([whole(param) for param in trainer.model.parameters()], end)


def clip_each(rank: int, world: int, folder: Path) -> float:
    """Clip each sharded tensor by its own norm in layer-wise mode; return the last norm of all gradients."""
    make = lambda: torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 16))  # noqa: E731
    torch.manual_seed(0)
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    average(model)
    with pytest.raises(NotImplementedError, match="or build it from the parameters that FSDP2 has sharded"):
        layerwise(LDAdam)(plain.parameters())
    optimizer = layerwise(LDAdam)(model.parameters(), lr=1e-2, rank=4, clip_tensor_norm=0.05)
    other, norms = LDAdam(plain.parameters(), lr=1e-2, rank=4), list[torch.Tensor]()
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for each in (model, plain):
            (each(x) - x.flip(1)).square().mean().backward()
        norms = [torch.nn.utils.clip_grad_norm_(param, 0.05) for param in plain.parameters()]
        assert all(param.grad is None for param in model.parameters())
        for each_optimizer in (optimizer, other):
            each_optimizer.step()
        other.zero_grad()
    for param, alone in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(param), alone.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(optimizer.grad_norm, torch.stack(norms).norm())
    assert max(norms) > 0.05
    return float(optimizer.grad_norm)


def example(rank: int, world: int, folder: Path) -> str:
    """Run the example, which leaves two checkpoints; return what it prints."""
    return run_example("--output_dir", str(folder / "example"))


def resume_example(rank: int, world: int, folder: Path) -> str:
    """Go on with the example from its first checkpoint; return what it prints."""
    return run_example("--output_dir", str(folder / "again"), "--resume", str(folder / "example" / "checkpoint-1"))


def run_example(*places: str) -> str:
    """Run the example as ``accelerate launch`` would, and return what it prints."""
    say_where_the_group_is()
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["example"] = example  # dataclasses look there
    spec.loader.exec_module(example)
    sys.argv = ["example", *EXAMPLE_OPTIONS, *places]
    with redirect_stdout(io.StringIO()) as printed:
        example.main()
    return printed.getvalue()


def count_bytes(rank: int, world: int, folder: Path) -> tuple[int, int, int, int]:
    """Count what FSDP2 and the optimizer send in a step; return both, and what their formulas say."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32, bias=False))
    for layer in (*model, model):
        fully_shard(layer, reshard_after_forward=True)
    optimizer = LDAdam(model.parameters(), lr=1e-2, rank=4, error_feedback="bf16")
    counts = [0, 0]
    for _ in range(2):
        with counted() as fsdp:
            model(torch.randn(64, 32)).square().sum().backward()
        with counted() as ours:
            optimizer.step()
        counts = [fsdp.nbytes, ours.nbytes]
    params = list(model.parameters())
    held = sum(param.to_local().nbytes for param in params)
    traffic = step_traffic(optimizer.method, optimizer.param_groups, world)
    assert (set(traffic.tensors), ours.calls.total()) == ({"collective"}, traffic.calls), (traffic, ours.calls)
    return counts[0], fsdp_sent_bytes(held, held, world), counts[1], traffic.total_bytes


def zero_redundancy(rank: int, world: int, folder: Path) -> bool:
    """Train with torch's ZeroRedundancyOptimizer, save and go on; the end is that of a plain optimizer."""
    ends = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
        settings: dict[str, Any] = {"lr": 1e-2, "rank": 4}

        def build(model: Any = model, sharded: bool = sharded, settings: Any = settings) -> Any:
            parts = ZeroRedundancyOptimizer(model.parameters(), LDAdam, **settings) if sharded else None
            return parts or LDAdam(model.parameters(), **settings)

        optimizer = build()
        for step in range(4):
            if sharded and step == 2:
                optimizer.consolidate_state_dict(to=0)
                saved = [optimizer.state_dict() if rank == 0 else None]
                dist.broadcast_object_list(saved)
                optimizer = build()
                optimizer.load_state_dict(saved[0])
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([param.detach().clone() for param in model.parameters()])
    assert len(optimizer.optim.state) < len(ends[0])
    return same(*ends)
