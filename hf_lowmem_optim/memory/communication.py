"""What a step on FSDP2 sends, as text: the optimizer's part beside FSDP2's own."""

from __future__ import annotations

from hf_lowmem_optim.engine.sharding.traffic import StepTraffic
from hf_lowmem_optim.memory.byte_sizes import format_bytes

__all__ = ["fsdp_sent_bytes", "traffic_text"]


def fsdp_sent_bytes(weight_bytes: int, gradient_bytes: int, num_shards: int) -> int:
    """Return what FSDP2 itself sends in a step from each process, in rings.

    It gathers the weights twice, for the forward and for the backward pass, and averages the gradients.

    Args:
        weight_bytes: This process's part of all weights.
        gradient_bytes: Its part of the gradients.
        num_shards: How many processes share them.
    """
    return (num_shards - 1) * (2 * weight_bytes + gradient_bytes)


def traffic_text(traffic: StepTraffic, num_shards: int, fsdp_bytes: int) -> str:
    """Write what each process sends in a step after the first, by path.

    Args:
        traffic: What all of them send together.
        num_shards: How many they are.
        fsdp_bytes: What FSDP2 itself sends from each.
    """
    parts = []
    for path in dict.fromkeys((*traffic.tensors, *traffic.sent_bytes)):
        count, nbytes = traffic.tensors.get(path), traffic.sent_bytes.get(path, 0)
        sent = f" {format_bytes(nbytes // num_shards)}" * (nbytes > 0)
        parts.append(path + ("" if count is None else f" {count} tensor{'s' * (count > 1)}") + sent)
    total, own = format_bytes(traffic.total_bytes // num_shards), format_bytes(fsdp_bytes)
    calls = f"{total} in {traffic.calls} call{'s' * (traffic.calls != 1)}" if traffic.calls else "nothing"
    return f"sends a step, per GPU: {calls} ({', '.join(parts)}); FSDP2 itself {own}"
