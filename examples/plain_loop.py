"""A plain PyTorch loop: no Trainer, the optimizer made for a model by a factory or for parameters by its class.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

from hf_lowmem_optim import LDAdam, OptimizerFactory, measure_state


def main() -> None:
    """Fit a small network, with state for the compressed layers only in rank 8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    inputs = torch.randn(512, 64)
    targets = (inputs @ torch.randn(64, 10)).argmax(1)

    # the factory sorts the parameters: weights compressed, biases dense and without weight decay
    optimizer = OptimizerFactory("ldadam", lr=3e-3, rank=8, weight_decay=0.01)(model)
    # the same by hand, with a setting of its own for one layer:
    #   LDAdam([{"params": model[0].parameters(), "rank": 4}, {"params": [*model[2:].parameters()]}], lr=3e-3, rank=8)
    assert isinstance(optimizer, LDAdam)
    for step in range(100):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    report = measure_state(optimizer)
    print(f"state: {report.total_bytes:,} bytes {dict(report.component_bytes)}; AdamW: {report.adamw_fp32_bytes:,}")


if __name__ == "__main__":
    main()
