"""What an optimizer sends, beside what FSDP2 or DDP does itself, as text: in a step on FSDP2, in a sync under DDP."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lowmem_optim.engine.sharding.traffic import StepTraffic
from hf_lowmem_optim.memory.byte_sizes import format_bytes

__all__ = ["SyncTraffic", "ddp_sent_bytes", "fsdp_sent_bytes", "sync_text", "traffic_text"]


@dataclass(frozen=True)
class SyncTraffic:
    """What workers send that step apart, and then average.

    Attributes:
        sync_every: Steps from one sync to the next; no step sends anything in between.
        sent_bytes: What each worker sends in a sync, in rings.
    """

    sync_every: int
    sent_bytes: int

    @classmethod
    def of(cls, sync_every: int, sync_bytes: tuple[int, int], num_workers: int) -> SyncTraffic:
        """Return it for what a worker puts into a sync's all-reduces, and what one broadcasts."""
        reduced, broadcast = sync_bytes
        return cls(sync_every, (num_workers - 1) * (2 * reduced + broadcast) // num_workers)

    @property
    def bytes_per_step(self) -> int:
        """What each worker sends in a step, on average."""
        return self.sent_bytes // self.sync_every


def ddp_sent_bytes(gradient_bytes: int, num_workers: int) -> int:
    """Return what DDP itself sends in a step from each process, in a ring: the gradients, averaged."""
    return 2 * (num_workers - 1) * gradient_bytes // num_workers


def sync_text(traffic: SyncTraffic, ddp_bytes: int, fsdp_bytes: int) -> str:
    """Write what each worker sends in a sync, and on average.

    Args:
        traffic: What it sends.
        ddp_bytes: What DDP itself would send in a step.
        fsdp_bytes: What FSDP2 itself would.
    """
    every = f"sends every {traffic.sync_every} steps, per GPU: {format_bytes(traffic.sent_bytes)}"
    ddp, fsdp = format_bytes(ddp_bytes), format_bytes(fsdp_bytes)
    return f"{every}, {format_bytes(traffic.bytes_per_step)} a step; DDP itself {ddp} a step, FSDP2 itself {fsdp}"


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
