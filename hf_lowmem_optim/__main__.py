"""The command line: ``hf-lowmem-optim list | plan | run | report | prune | demo``, or ``python -m hf_lowmem_optim``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_lowmem_optim import __version__

__all__ = ["main"]

_NOTHING_FITS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 2 for a wrong argument, 3 for a plan of which nothing fits into the budget, 130 after an
        interrupt, 141 where the reader of the output has gone.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["run"]:
        from hf_lowmem_optim.trainer.launcher import run_script

        return run_script(given[1:])
    parser = argparse.ArgumentParser(prog="hf-lowmem-optim", description="Optimizers whose state fits.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("list", help="the optimizers, with bytes of state per parameter").set_defaults(run=_list)

    _add_plan(commands.add_parser("plan", help="the memory of a training run, before anything is loaded"))

    report = commands.add_parser("report", help="what OptimizerStateMemoryCallback measured in a run")
    report.add_argument("directory", metavar="DIR", help="the run's output_dir")
    report.add_argument("--plot", metavar="OUT.png", help="draw memory by component and the run's curves")
    report.add_argument("--html", metavar="OUT.html", help="write one page with all of it, which needs nothing else")
    report.set_defaults(run=_report)

    # Everything after it is the script's own, so it never gets to this parser.
    commands.add_parser("run", help="a training script of yours, unmodified, with our optim strings", add_help=False)

    _add_prune(commands.add_parser("prune", help="a saved model, layer by layer and without training"))

    demo = commands.add_parser("demo", help="train a small language model on real text, ours beside AdamW")
    demo.add_argument("--optim", nargs="+", default=["adamw_torch", "ldadam"], metavar="NAME")
    demo.add_argument("--learning-rate", nargs="+", type=float, metavar="LR", help="rates to try for each")
    demo.add_argument("--optim-args", metavar="A=1,B=2", help="for the optimizers of this package")
    demo.add_argument("--steps", type=_positive, default=300, help="rounded up to a multiple of 50")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    args, unknown = parser.parse_known_args(given)
    if unknown:  # with the usage of the command
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status: int | None = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"hf-lowmem-optim {args.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (TypeError, ValueError, OSError, ImportError) as error:
        print(f"hf-lowmem-optim {args.command}: {error}", file=sys.stderr)
        return 2
    return status or 0


def _add_plan(plan: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan``."""
    plan.add_argument("model", help="a preset such as llama-2-7b, a model directory, or a config.json")
    plan.add_argument("--optim", nargs="+", metavar="NAME", help="optimizers or references to plan for; default: all")
    plan.add_argument("--optim-args", metavar="A=1,B=2", help="hyper-parameters for the optimizers of --optim")
    plan.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="what is compressed: names, one regex, or all-linear"
    )
    plan.add_argument("--dtype", metavar="bf16", help="fp32, bf16 or fp16; default: the configuration's")
    plan.add_argument("--lora", metavar="r=16,target=all-linear", help="train adapters on a frozen model")
    plan.add_argument("--freeze", nargs="+", default=[], metavar="NAME", help="parts of the model that are not trained")
    plan.add_argument("--quantize", metavar="4bit", help="the frozen linear layers in 4 bits; needs --lora")
    plan.add_argument("--gpus", type=_positive, default=1, metavar="N")
    plan.add_argument("--sharding", default="ddp", metavar="ddp|fsdp", help="how several GPUs share the work")
    plan.add_argument("--budget", metavar="24GiB", help="memory of one GPU: what fits, and what to change")
    plan.add_argument("--reserve", metavar="2GiB", help="part of it to keep free; default: a tenth, at least 1 GiB")
    plan.add_argument("--seq-len", type=_positive, metavar="N", help="tokens of a sequence: estimates activations")
    plan.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="sequences of a GPU at a time")
    plan.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    plan.add_argument("--adamw-lr", type=float, metavar="1e-5", help="AdamW's learning rate: where ours start")
    output = plan.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", action="store_true", help="print CSV")
    plan.add_argument("--plot", metavar="OUT.png", help="draw stacked bars")
    plan.add_argument("--html", metavar="OUT.html", help="write the planner's page for the model; takes a minute")
    plan.set_defaults(run=_plan)


def _add_prune(prune: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prune``."""
    prune.add_argument("model", type=Path, metavar="MODEL_DIR", help="a model and its tokenizer, as saved")
    prune.add_argument("--data", type=Path, required=True, metavar="FILE", help="a text, or a CSV of text and label")
    prune.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pruned model goes; new")
    prune.add_argument(
        "--sparsity", type=float, metavar="S", help="of each layer; default: 0.5, or what the pattern says"
    )
    prune.add_argument("--pattern", metavar="N:M", help="keep N of each M neighbouring inputs, such as 2:4")
    prune.add_argument("--iterations", type=_positive, default=3, metavar="N", help="passes; default: 3")
    prune.add_argument("--layers", nargs="+", metavar="NAME", help="default: all but embeddings and the output head")
    prune.add_argument("--samples", type=_positive, default=128, metavar="N", help="to calibrate with; default: 128")
    prune.add_argument(
        "--sequence-length", type=_positive, default=512, metavar="N", help="tokens; texts are cut there; default: 512"
    )
    prune.set_defaults(run=_prune)


def _positive(text: str) -> int:
    """Read an int ≥ 1, for argparse."""
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive number")
    return number


def _list(_: argparse.Namespace) -> None:
    """Print the table of optimizers."""
    from hf_lowmem_optim.memory.table import optimizer_table

    print(optimizer_table())


def _plan(args: argparse.Namespace) -> int:
    """Plan, and print it in the form asked for."""
    from hf_lowmem_optim.memory.byte_sizes import parse_bytes, parse_reserve
    from hf_lowmem_optim.memory.learning_rates import learning_rates
    from hf_lowmem_optim.trainer.presets import find_model

    # before torch is imported, which takes seconds
    find_model(args.model)
    if args.budget is not None:
        parse_reserve(args.reserve, parse_bytes(args.budget))
    elif args.reserve is not None:
        raise ValueError(f"--reserve {args.reserve} is a part of a budget: give --budget")
    if args.seq_len is None and (args.batch_size != 1 or args.checkpointing):
        raise ValueError("--batch-size and --checkpointing decide activations, which need --seq-len: give that")
    if args.adamw_lr is not None:
        learning_rates([], args.adamw_lr)
    _check_outputs(args)
    # its advice on fast kernels of another package, which a plan does not run
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "kernels-community" not in str(record.msg)
    )

    from hf_lowmem_optim.memory.plan_types import plan_csv
    from hf_lowmem_optim.memory.plots import plot_plan
    from hf_lowmem_optim.trainer.model_source import ModelOptions
    from hf_lowmem_optim.trainer.plan_model import plan_memory

    targets, batch = args.target_modules, (args.seq_len, args.batch_size, args.checkpointing)
    plan = plan_memory(
        args.model,
        args.optim,
        optim_args=args.optim_args,
        # a single value may be a regex of the whole name, as in optim_target_modules
        target_modules=targets[0] if targets and len(targets) == 1 else targets,
        options=ModelOptions(args.dtype, args.lora, tuple(args.freeze), args.quantize, *batch),
        gpus=args.gpus,
        sharding=args.sharding,
        budget=args.budget,
        reserve=args.reserve,
    )
    if args.adamw_lr is not None:
        names = [row.name for row in plan.optimizers if row.registered]
        plan = replace(plan, learning_rates=learning_rates(names, args.adamw_lr))
    if args.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        print(plan_csv(plan).rstrip("\n") if args.csv else plan)
    if args.plot:
        plot_plan(plan, args.plot)
        _say_written(args.plot)
    if args.html:
        from hf_lowmem_optim.trainer.planner_data import model_data, page_of

        Path(args.html).write_text(page_of({plan.source: model_data(args.model)}), encoding="utf-8")
        _say_written(args.html)
    return 0 if plan.anything_fits else _NOTHING_FITS


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse a name that no picture or page can have, before the work."""
    if args.plot and Path(args.plot).suffix.lower() not in (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--plot {args.plot}: the suffix chooses the format; write for example out.png or out.svg")
    if args.html and Path(args.html).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {args.html}: that is a page; write for example out.html")
    for option, path in (("--plot", args.plot), ("--html", args.html)):
        if path and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{option} {path}: {Path(path).parent} is no directory: make it first")


def _say_written(path: str) -> None:
    """Say where a file is, beside output that may be JSON."""
    print(f"written to {path}", file=sys.stderr)


def _report(args: argparse.Namespace) -> None:
    """Print the report of a run, and draw it."""
    _check_outputs(args)
    from hf_lowmem_optim.memory.plots import plot_report
    from hf_lowmem_optim.memory.report import load_report, report_text
    from hf_lowmem_optim.memory.report_page import report_page

    report = load_report(Path(args.directory))
    if args.html:
        Path(args.html).write_text(report_page(report), encoding="utf-8")
        _say_written(args.html)
    print(report_text(report))
    if args.plot:
        plot_report(report, args.plot)
        _say_written(args.plot)


def _prune(args: argparse.Namespace) -> None:
    """Prune, and say what it cost."""
    from hf_lowmem_optim.trainer.prune_model import PruneOptions, parse_pattern, prune_directory

    pattern = None if args.pattern is None else parse_pattern(args.pattern)
    options = PruneOptions(args.sparsity, pattern, args.iterations, args.layers, args.samples, args.sequence_length)
    done = prune_directory(args.model, args.data, args.out, options)
    if done.num_cut:
        print(f"texts that were cut at --sequence-length {args.sequence_length} or the model's limit: {done.num_cut:,}")
    share = done.num_zeros / done.num_weights
    print(f"zeros: {done.num_zeros:,} of {done.num_weights:,} weights ({share:.2%})")
    print(f"{done.measure}: {done.before:.4g} before, {done.after:.4g} after")
    print(f"written to {args.out}")


def _demo(args: argparse.Namespace) -> None:
    """Run the demo, print its table, and draw it where matplotlib is installed."""
    from hf_lowmem_optim.memory.plots import plot_runs
    from hf_lowmem_optim.trainer.demo import run_demo

    results = run_demo(args.optim, args.learning_rate, num_steps=args.steps, seed=args.seed, optim_args=args.optim_args)
    print("\n| optim | learning rate | training loss | held-out loss | seconds | state bytes | B/param |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        run = f"{r.optim} | {r.learning_rate:g} | {r.training_loss:.3f} | {r.held_out_loss:.3f} | {r.seconds:.0f}"
        print(f"| {run} | {r.state_bytes:,} | {r.state_bytes / r.num_parameters:.2f} |")
    if importlib.util.find_spec("matplotlib") is None:
        return
    names = [f"{r.optim}, learning rate {r.learning_rate:g}" for r in results]
    histories = {name: r.log_history for name, r in zip(names, results, strict=True)}
    picture = Path("demo.png").resolve()
    plot_runs(histories, {name: r.component_bytes for name, r in zip(names, results, strict=True)}, picture)
    print(f"\nDrawn in {picture}")


if __name__ == "__main__":
    sys.exit(main())
