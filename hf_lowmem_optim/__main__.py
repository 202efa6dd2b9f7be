"""The command line: ``hf-lowmem-optim list | demo`` (also ``python -m hf_lowmem_optim``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_lowmem_optim import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 2 for a wrong argument.
    """
    parser = argparse.ArgumentParser(prog="hf-lowmem-optim", description="Optimizers whose state fits.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="the optimizers, with bytes of state per parameter")
    listing.set_defaults(run=_list)

    demo = commands.add_parser("demo", help="train a small language model on real text, ours beside AdamW")
    demo.add_argument("--optim", nargs="+", default=["adamw_torch", "ldadam"], metavar="NAME")
    demo.add_argument(
        "--learning-rate", nargs="+", type=float, default=None, metavar="LR", help="rates to try for each"
    )
    demo.add_argument("--optim-args", default=None, metavar="A=1,B=2", help="for the optimizers of this package")
    demo.add_argument("--steps", type=_positive, default=300)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (TypeError, ValueError) as error:
        print(f"hf-lowmem-optim {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    """An int ≥ 1 for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number of steps")
    return value


def _list(_: argparse.Namespace) -> None:
    """Print the table of optimizers."""
    from hf_lowmem_optim.memory.table import optimizer_table

    print(optimizer_table())


def _demo(args: argparse.Namespace) -> None:
    """Run the demo and print its table."""
    from hf_lowmem_optim.trainer.demo import run_demo

    results = run_demo(args.optim, args.learning_rate, num_steps=args.steps, seed=args.seed, optim_args=args.optim_args)
    print("\n| optim | learning rate | training loss | held-out loss | seconds | state bytes | B/param |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.optim} | {r.learning_rate:g} | {r.training_loss:.3f} | {r.held_out_loss:.3f} | {r.seconds:.0f} "
            f"| {r.state_bytes:,} | {r.state_bytes / r.num_parameters:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
