"""Print what a step on FSDP2 sends, by path, beside what FSDP2 itself sends, and the state of each process.

    python benchmarks/communication.py
    python benchmarks/communication.py --models llama-2-7b --ranks 8 --optim ldadam microadam

Everything is computed: the formulas are those that ``hf-lowmem-optim plan --sharding fsdp`` prints, and the tests count
what two processes send. Weights and gradients are bfloat16. A method that has several paths is printed with each: with
stochastically rounded weights every compressed tensor is gathered, as it is in any method's worst case. Workers that
average every so many steps have whole weights, under DDP: theirs are the bytes of a sync by its steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from hf_lowmem_optim import OPTIMIZERS, plan_memory
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.communication import ddp_sent_bytes, fsdp_sent_bytes
from hf_lowmem_optim.memory.plan_types import MemoryPlan, OptimizerPlan

MODELS = ("llama-2-7b", "llama-2-70b")
RANKS = (8, 64, 512)
#: Beside the defaults of every method.
VARIANTS = ("rank=128", "weight_rounding=stochastic")
#: In the documentation.
SHOWN = ("ldadam", "ldadam weight_rounding=stochastic", "microadam", "sparse_mfac", "lowrank_mfac", "lordo")
HEADER = ("model", "GPUs", "optimizer", "path", "sent a step", "of FSDP2's own", "calls", "state")


def rows(models: Sequence[str], ranks: Sequence[int], optims: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield lines of the table: a line for FSDP2 itself, and one for each optimizer and its variants.

    Args:
        models: Presets.
        ranks: Numbers of processes, a GPU each.
        optims: Optim strings, with arguments after a blank: ``"ldadam rank=128"``.
    """
    for model in models:
        for count in ranks:
            own = 0
            for optim in optims:
                name, _, optim_args = optim.partition(" ")
                whole = OPTIMIZERS[name].optimizer_class.method.replicated is not None
                sharding = "ddp" if whole else "fsdp"
                plan = plan_memory(model, name, optim_args=optim_args or None, gpus=count, sharding=sharding)
                if not own:
                    own = fsdp_own(plan)
                    yield model, str(count), "FSDP2 itself", "", format_bytes(own), "", "", ""
                if whole:
                    ddp = ddp_sent_bytes(plan.weights.gradient_bytes["gradients"], count)
                    yield model, str(count), "DDP itself", "", format_bytes(ddp), f"{100 * ddp / own:.2g} %", "", ""
                yield model, str(count), optim, *cells(plan[name], own, count)


def fsdp_own(plan: MemoryPlan) -> int:
    """Return what FSDP2 itself sends from each process in a step; also where each has everything."""
    weights, gradients = sum(plan.weights.weight_bytes.values()), plan.weights.gradient_bytes["gradients"]
    split = plan.processes.gpus // plan.processes.num_shards
    return fsdp_sent_bytes(weights, gradients, plan.processes.gpus) // split


def cells(row: OptimizerPlan, own: int, count: int) -> tuple[str, ...]:
    """Return what an optimizer sends from each process, and its state there."""
    if row.sync is not None and row.state is not None:
        sent, every = row.sync.bytes_per_step, f"every {row.sync.sync_every} steps"
        return every, format_bytes(sent), f"{100 * sent / own:.2g} %", "–", format_bytes(row.state.total_bytes)
    assert row.traffic is not None and row.state is not None
    paths = [path for path in row.traffic.tensors if path != "local"]
    sent = row.traffic.total_bytes // count
    share = f"{100 * sent / own:.2g} %" if sent else "0"
    amount = format_bytes(sent) if sent else "nothing"
    return ", ".join(paths), amount, share, str(row.traffic.calls), format_bytes(row.state.total_bytes)


def table(models: Sequence[str], ranks: Sequence[int], optims: Sequence[str]) -> str:
    """Return the table in Markdown."""
    aligned = ("---", "---:", "---", "---", "---:", "---:", "---:", "---:")
    lines = [HEADER, aligned, *rows(models, ranks, optims)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def all_optims() -> list[str]:
    """Return every method of the normal mode, and the variants that it has."""
    found = list[str]()
    for name, entry in OPTIMIZERS.items():
        method = entry.optimizer_class.method
        if not method.layerwise:
            found.append(name)
            defaults = {key: str(value) for key, value in method.options.defaults().items()}
            for variant in VARIANTS:
                key, _, value = variant.partition("=")
                found += [f"{name} {variant}"] * (key in defaults and defaults[key] != value)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--optim", nargs="+", default=all_optims(), help='such as "ldadam rank=128"')
    arguments = parser.parse_args()
    print(table(arguments.models, arguments.ranks, arguments.optim), end="")


if __name__ == "__main__":
    main()
