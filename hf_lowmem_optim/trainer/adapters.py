"""LoRA adapters for planning: peft itself adds them, so that what is planned is what peft trains."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from torch import nn

from hf_lowmem_optim.engine.options import nearest

__all__ = ["LoraOptions", "add_lora"]


@dataclass(frozen=True)
class LoraOptions:
    """What shapes LoRA adapters: their rank, and the modules that get one (whole names or ends of them)."""

    r: int = 8
    targets: tuple[str, ...] = ("all-linear",)

    @classmethod
    def parse(cls, text: str) -> LoraOptions:
        """Read ``"r=16,target=q_proj+v_proj"``; what is left out has its default.

        Raises:
            ValueError: It is not of that form.
        """
        values: dict[str, str] = {}
        for entry in text.split(","):
            key, _, value = (part.strip() for part in entry.partition("="))
            if key not in ("r", "target") or not value or key in values:
                raise ValueError(
                    f"lora={text!r}: {entry.strip()!r} is not r=… or target=…, once "
                    f"each{nearest(key, ('r', 'target'))}; "
                    "write for example r=16,target=all-linear or r=8,target=q_proj+v_proj"
                )
            values[key] = value
        rank = values.get("r", "8")
        if not rank.isdigit() or int(rank) < 1:
            raise ValueError(f"lora={text!r}: r={rank!r} must be an int ≥ 1")
        return cls(int(rank), tuple(map(str.strip, values.get("target", "all-linear").split("+"))))

    def __str__(self) -> str:
        return f"r={self.r} on {'+'.join(self.targets)}"


def add_lora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Freeze a model on the meta device, put adapters on it, and return it as peft wraps it.

    Raises:
        ImportError: peft is not installed.
        ValueError: A target matches no module, or none that can have an adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'hf-lowmem-optim[peft]'") from error
    everything = options.targets == ("all-linear",)
    if not everything:
        _check_targets(model, options.targets)
    config = LoraConfig(r=options.r, target_modules="all-linear" if everything else list(options.targets))
    with warnings.catch_warnings():
        # about Conv1D's layout, which changes no size
        warnings.simplefilter("ignore")
        try:
            return get_peft_model(model, config, low_cpu_mem_usage=True)
        except ValueError as error:
            raise ValueError(f"lora target={'+'.join(options.targets)}: {error}") from error


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse a target that names no module; peft would, too, but only if none of them does."""
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {name.rpartition(".")[2] for name in names if not re.search(r"\.\d+$", name)}
            raise ValueError(
                f"lora target={target!r} matches no module of {type(model).__name__}{nearest(target, ends)}"
            )
