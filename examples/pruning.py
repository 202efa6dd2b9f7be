"""Prune a small classifier to a tenth of its weights, by magnitude and by I-OBS, and compare.

    python examples/pruning.py --sparsity 0.9 --seeds 3

Both runs take the same steps of AdamW on the same mini-batches, a few after each projection. What differs is that I-OBS
moves the weights that stay to where the others are missed least. A SparseMFAC with a learning rate of zero beside AdamW
holds the window of gradients that this takes; train with SparseMFAC itself, and it needs no second optimizer.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from statistics import mean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_lowmem_optim import IOBSPruner, SparseMFAC

WINDOW = 64


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels of handwritten digits, for training and held out."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    training, held_out = order.tensor_split([len(images) * 3 // 4])
    return images[training], labels[training], images[held_out], labels[held_out]


def mini_batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw mini-batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator)
        yield images[chosen], labels[chosen]


def train_dense(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Return a trained classifier of 26,122 parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _, (x, y) in zip(range(1000), mini_batches(images, labels, 64, seed), strict=False):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def prune(
    model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, correction: bool, seed: int
) -> nn.Module:
    """Return the model, pruned in six steps with 20 of AdamW after each."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curvature = SparseMFAC(model.parameters(), lr=0.0, window=WINDOW, density=args.density) if correction else None
    pruner = IOBSPruner(
        curvature or optimizer,
        sparsity=args.sparsity,
        initial_sparsity=args.sparsity / 2,
        begin=WINDOW,
        end=WINDOW + 100,
        every=20,
        saliency=args.saliency if correction else "magnitude",
        correction=correction,
    )
    for _, (x, y) in zip(range(WINDOW + 120), mini_batches(images, labels, 32, seed + 100), strict=False):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if curvature is not None:
            curvature.step()
        pruner.step()
    return model


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images that are classified rightly."""
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Return held-out accuracies, means over seeds."""
    found: dict[str, list[float]] = {"dense": [], "magnitude": [], "I-OBS": []}
    for seed in range(args.seeds):
        images, labels, *held_out = load_data(seed)
        model = train_dense(images, labels, seed)
        found["dense"].append(accuracy(model, *held_out))
        for name, correction in (("magnitude", False), ("I-OBS", True)):
            pruned = prune(model, images, labels, args, correction, seed)
            found[name].append(accuracy(pruned, *held_out))
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.1f} %" for name, values in found.items()))
    return {name: mean(values) for name, values in found.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--density", type=float, default=1.0, help="of the window's gradients")
    parser.add_argument("--saliency", choices=("magnitude", "obs"), default="magnitude", help="of I-OBS")
    return parser.parse_args(arguments)


def main() -> None:
    """Compare, and print the means."""
    args = parse()
    means = compare(args)
    print(f"{args.sparsity:.0%} pruned: " + ", ".join(f"{name} {value:.1f} %" for name, value in means.items()))


if __name__ == "__main__":
    main()
