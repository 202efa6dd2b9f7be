"""Load state dicts with something wrong in them: run as a process, so that a crash is seen as one.

    python -m tests.optimizers.state_fuzzer NAME=COUNT...

A load either raises ValueError or TypeError and leaves the optimizer as it was, ready to step, or is harmless: steps
after it raise nothing. Prints a line for each optimizer: how many were refused, how many were harmless, and the
faults.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import CASES

SHAPES = [(12, 40), (40, 12), (16, 16), (10,)]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 1.5, float("nan"), float("inf"), -float("inf"), 10**30, -(10**30), 1 << 38, "", "x"),
    *("4bit", [], {}, (), (1, 2), [0.1], b"x", np.float64(0.5), np.arange(3), 1j, object(), {"a": 1}),
]
DTYPES = [torch.float64, torch.float16, torch.int8, torch.int16, torch.int64, torch.bool, torch.complex64, torch.uint8]


def freed(tensor: Tensor, nbytes: int = 0) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def mangle_tensor(x: Tensor, rng: random.Random) -> Any:
    """Something else in the place of a tensor."""
    ways: list[Callable[[], Any]] = [
        lambda: x.to(rng.choice(DTYPES)),
        lambda: x.flatten()[:-1],
        lambda: x[..., None],
        lambda: x.reshape(-1),
        lambda: x.mT.contiguous().mT if x.dim() == 2 else x.flip(0),
        lambda: torch.zeros((), dtype=x.dtype).expand(x.shape),
        lambda: torch.zeros([2 * n for n in x.shape], dtype=x.dtype)[tuple(slice(None, None, 2) for _ in x.shape)],
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: freed(x),
        lambda: freed(x, max(0, x.nbytes - x.itemsize)),
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda: x._neg_view() if x.is_floating_point() else ~x,
        lambda: nn.Parameter(x.clone()) if x.is_floating_point() else x.clone(),
        lambda: torch.full_like(x, rng.choice([0, 1, 7, 127])),
        lambda: (
            torch.full_like(x, rng.choice([-1, -128, -32768, 32767, 1000]))
            if x.dtype == torch.int16
            else torch.full_like(x, rng.choice([float("nan"), float("inf"), -1.0, 1e38, 1e-45]))
            if x.is_floating_point()
            else torch.full_like(x, 255)
        ),
        lambda: x.tolist(),
        lambda: x.float().numpy(),
    ]
    return rng.choice(ways)()


def mutate(saved: dict[str, Any], rng: random.Random) -> None:
    """Change one thing in a state dict."""
    entries, groups = saved["state"], saved["param_groups"]
    where = rng.random()
    if where < 0.55:
        entry = entries[rng.choice(list(entries))]
        key = rng.choice(list(entry))
        way = rng.randrange(5)
        if way == 0:
            del entry[key]
        elif way == 1:
            entry[rng.choice(["extra", 7, "shared_step", "shared_gram", "error", "step2"])] = rng.choice(
                [torch.zeros(3), *VALUES]
            )
        elif way == 2:
            other = rng.choice(list(entry))
            entry[key], entry[other] = entry[other], entry[key]
        elif way == 3 or not isinstance(entry[key], Tensor):
            entry[key] = rng.choice([torch.tensor(3.0), *VALUES])
        else:
            entry[key] = mangle_tensor(entry[key], rng)
    elif where < 0.7:
        name = rng.choice(list(entries))
        ways: list[Callable[[], Any]] = [
            lambda: entries.pop(name),
            lambda: entries.update({name: rng.choice(VALUES)}),
            lambda: entries.update({rng.choice([99, "x", -1, None, "shared"]): entries[name]}),
            lambda: entries.update({name: entries[rng.choice(list(entries))]}),
            lambda: saved.update(state=rng.choice(VALUES)),
            lambda: saved.pop("state"),
        ]
        rng.choice(ways)()
    elif where < 0.8:
        ways = [
            lambda: saved.update(param_groups=rng.choice(VALUES)),
            lambda: groups.append(rng.choice([*VALUES, dict(groups[0])])),
            lambda: groups.pop(),
            lambda: saved.pop("param_groups"),
            lambda: groups[0].update(
                params=rng.choice([*VALUES, [0, 0, 1, 2], [0, 1, 2], [3, 2, 1, 0], [[], {}, 0, 1]])
            ),
            lambda: groups[0].pop("params"),
        ]
        rng.choice(ways)()
    else:
        key = rng.choice([*list(groups[0]), "shared", "unknown"])
        if rng.random() < 0.2:
            groups[0].pop(key, None)
        else:
            groups[0][key] = rng.choice([torch.tensor(0.1), torch.zeros(2), *VALUES])


def fresh(name: str) -> LowMemoryOptimizer:
    generator = torch.Generator().manual_seed(1)
    return CASES[name].build([nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES])


def step(optimizer: LowMemoryOptimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def picture(optimizer: LowMemoryOptimizer) -> tuple[list[bytes], str]:
    """Everything in an optimizer, as bytes and text that are equal for equal bits."""
    group = optimizer.param_groups[0]
    tensors = [param.detach() for param in group["params"]]
    entries = [(k, v) for param in group["params"] for k, v in optimizer.state.get(param, {}).items()]
    tensors += [value for _, value in entries if isinstance(value, Tensor)]
    numbers = [(key, value) for key, value in entries if not isinstance(value, Tensor)]
    options = sorted((str(key), repr(value)) for key, value in group.items() if key != "params")
    return [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors], repr((numbers, options))


def copied(saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state dict that shares nothing with it; ``deepcopy`` takes ten times as long."""
    entries = {
        index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    return {"state": entries, "param_groups": [{**g, "params": [*g["params"]]} for g in saved["param_groups"]]}


def check(name: str, number: int, valid: dict[str, Any], target: LowMemoryOptimizer) -> tuple[str, str | None]:
    """Load one mutation; return what became of it, and the fault if there is one."""
    rng = random.Random(number)
    saved = copied(valid)
    mutate(saved, rng)
    before = picture(target)
    try:
        target.load_state_dict(saved)
    except (ValueError, TypeError) as error:
        if picture(target) != before:
            return "refused", f"changed by a load that raised {error}"
        if not str(error) or type(error).__module__ != "builtins":
            return "refused", f"an error without words: {error!r}"
        if number % 10 == 0:
            step(target, 5)
        return "refused", None
    step(target, 5)
    step(target, 6)
    return "harmless", None


def fuzz(name: str, count: int) -> dict[str, Any]:
    source = fresh(name)
    for seed in range(4):
        step(source, seed)
    valid = copied(source.state_dict())
    found: dict[str, Any] = {"name": name, "refused": 0, "harmless": 0, "faults": []}
    target = fresh(name)
    step(target, 9)
    for number in range(count):
        try:
            outcome, fault = check(name, number, valid, target)
        except Exception as error:  # the mutation is the input, and any other error is the finding
            outcome, fault = "harmless", f"{type(error).__name__}: {error}"
        found[outcome] += 1
        if fault is not None:
            found["faults"].append(f"{name} {number}: {fault}")
        if fault is not None or outcome == "harmless":
            target = fresh(name)
            step(target, 9)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for each in sys.argv[1:]:
        given, _, times = each.partition("=")
        print(json.dumps(fuzz(given, int(times))), flush=True)
