"""AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861), by bitsandbytes, which is only imported when used.

Both moments are quantized in blocks of 256 consecutive entries to the 256 values of a dynamic map, signed for m and
unsigned for v, times the block's largest absolute value. The maps are constants. Tensors below 4096 entries keep
float32 moments, as in bitsandbytes, whose operation then does their update too: a trajectory is bit for bit that of
``bitsandbytes.optim.AdamW8bit``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.state import TensorSpec

__all__ = ["MAX_ENTRIES", "adamw8bit_state", "adamw8bit_update_", "operation_bytes", "require_bitsandbytes"]

_BLOCK_SIZE = 256
_MIN_QUANTIZED_ENTRIES = 4096
#: bitsandbytes' kernels count entries in 32 bits; whole blocks.
MAX_ENTRIES = 1 << 30
_EXTRA = "pip install 'hf-lowmem-optim[bitsandbytes]'"


def adamw8bit_state(shape: Sequence[int]) -> dict[str, TensorSpec]:
    """State of one parameter, whatever its dtype.

    Args:
        shape: Shape of the parameter.

    Returns:
        Specs by state key; allocated as zeros, all of it holds zeros.
    """
    numel = math.prod(shape)
    if numel < _MIN_QUANTIZED_ENTRIES:
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), TensorSpec(tuple(shape), torch.float32, "dense"))
    codes = TensorSpec((numel,), torch.uint8, "dense")
    absmax = TensorSpec((-(-numel // _BLOCK_SIZE),), torch.float32, "dense statistics")
    return {
        "exp_avg_codes": codes,
        "exp_avg_absmax": absmax,
        "exp_avg_sq_codes": codes,
        "exp_avg_sq_absmax": absmax,
    }


def operation_bytes(entries: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that bitsandbytes' operation allocates for some entries: nothing on a GPU, where it is one kernel.

    On the CPU: the gradient in float32, both moments, the root and the denominator, and a wider weight.
    """
    if device.type != "cpu":
        return 0
    moments = 2 if entries >= _MIN_QUANTIZED_ENTRIES else 1
    return 4 * entries * (3 + moments + (dtype != torch.float32))


def require_bitsandbytes(params: Iterable[Tensor]) -> None:
    """Refuse ``dense_state="8bit"`` where bitsandbytes cannot do it.

    Args:
        params: The parameters; those on the meta device are only planned with and need nothing.

    Raises:
        ImportError: bitsandbytes is missing, or has no such operation for the CPU.
    """
    devices = {param.device.type for param in params} - {"meta"}
    if not devices:
        return
    version = _bitsandbytes().__version__
    operation = "bitsandbytes::optimizer_update_8bit_blockwise"
    if "cpu" in devices and not torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CPU"):
        raise ImportError(
            f'dense_state="8bit" on the CPU needs a bitsandbytes with an 8-bit AdamW for it, which {version} has not; '
            f"upgrade it: {_EXTRA}"
        )


def adamw8bit_update_(
    weight: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    start: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of consecutive entries of one tensor, in place.

    Args:
        weight: Contiguous and flat; float32, bfloat16 or float16.
        grad: Likewise; only read.
        state: The whole tensor's, as :func:`adamw8bit_state` describes it; the entries' part is written.
        start: Where the entries begin in the tensor, a multiple of 256.
        step: t, 1 for the first update.
        lr: Learning rate.
        betas: Decay rates β1 and β2.
        eps: Added to √v̂.
        weight_decay: Decoupled weight decay.
    """
    functional = _bitsandbytes().functional
    stop = start + weight.numel()
    with _on_the_default_stream(weight.device):
        if "exp_avg" in state:
            m, v = (state[key].view(-1)[start:stop] for key in ("exp_avg", "exp_avg_sq"))
            functional.optimizer_update_32bit(
                "adam", grad, weight, m, betas[0], eps, step, lr, v, betas[1], weight_decay=weight_decay
            )
            return
        codes = [state[key][start:stop] for key in ("exp_avg_codes", "exp_avg_sq_codes")]
        blocks = slice(start // _BLOCK_SIZE, -(-stop // _BLOCK_SIZE))
        absmax = [state[key][blocks] for key in ("exp_avg_absmax", "exp_avg_sq_absmax")]
        maps = (_dynamic_map(signed, weight.device) for signed in (True, False))
        # β3 and α are of another optimizer that shares the operation
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, weight, *codes, *betas, 0.0, 0.0, eps, step, lr, *maps, *absmax, weight_decay
        )


def _bitsandbytes() -> Any:
    """The package, imported at its first use."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f'dense_state="8bit" needs bitsandbytes: {_EXTRA}') from error
    return bitsandbytes


@functools.lru_cache(maxsize=16)
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The map of bitsandbytes from codes to values, float32 [256]."""
    table: Tensor = _bitsandbytes().functional.create_dynamic_map(signed=signed)
    return table.to(device)


@contextmanager
def _on_the_default_stream(device: torch.device) -> Iterator[None]:
    """Order bitsandbytes' kernels, which run on CUDA's default stream, after and before those of torch's stream."""
    if device.type != "cuda":
        yield
        return
    default, current = torch.cuda.default_stream(device), torch.cuda.current_stream(device)
    if default == current:
        yield
        return
    default.wait_stream(current)
    yield
    current.wait_stream(default)
