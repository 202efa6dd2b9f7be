"""From the name of a model to a model on the meta device: its shapes and dtypes, and none of its weights.

A source is a preset, a directory with a ``config.json``, such a file, a transformers configuration or a live model.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.nn.modules import module as registration
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from hf_lowmem_optim.engine.options import check_number, count_up_to, nearest, shown
from hf_lowmem_optim.json_file import check_shape, read_json
from hf_lowmem_optim.trainer.param_groups import compile_regex
from hf_lowmem_optim.trainer.presets import PRESETS, find_model
from hf_lowmem_optim.words import check_type

__all__ = ["ModelOptions", "OpenedModel", "open_model"]

Source = str | Path | PreTrainedConfig | nn.Module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES.update((str(dtype).removeprefix("torch."), dtype) for dtype in list(DTYPES.values()))

#: Fields of a configuration that say how often something is repeated, and how often at most.
_REPEATS = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?|experts?|heads?|labels|classes)($|_(?!dim|size))")
MAX_REPEATS = 2**20
#: Fields that may be any number, because nothing has that size; what any other may be at most.
_NO_SIZE = re.compile(r"seed|theta|base|factor|max_length|param|_ids?$")
MAX_SIZE = 2**30
MAX_PARTS = 50_000  # parameters and modules of a model, which take some seconds to make


@dataclass(frozen=True)
class LoraOptions:
    """What shapes LoRA adapters: their rank, and the modules that get one (whole names or ends of them)."""

    r: int = 8
    targets: tuple[str, ...] = ("all-linear",)

    @classmethod
    def parse(cls, text: str) -> LoraOptions:
        """Read ``"r=16,target=q_proj+v_proj"``; what is left out has its default."""
        values: dict[str, str] = {}
        for entry in text.split(","):
            key, _, value = (part.strip() for part in entry.partition("="))
            if key not in ("r", "target") or not value or key in values:
                hint = nearest(key, ("r", "target"))
                raise ValueError(
                    f"lora={shown(text)}: {shown(entry.strip())} is not r=… or target=…, once each{hint}; "
                    "write for example r=16,target=all-linear or r=8,target=q_proj+v_proj"
                )
            values[key] = value
        rank = values.get("r", "8")
        if not re.fullmatch("0*[1-9][0-9]{0,17}", rank):
            raise ValueError(f"lora={shown(text)}: r={shown(rank)} must be an int ≥ 1")
        return cls(int(rank), tuple(map(str.strip, values.get("target", "all-linear").split("+"))))

    def __str__(self) -> str:
        return f"r={self.r} on {'+'.join(self.targets)}"


@dataclass(frozen=True)
class ModelOptions:
    """How a model that does not exist yet will be loaded, prepared and fed.

    Attributes:
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``; None for what the configuration says, else float32.
        lora: LoRA adapters on a frozen model: ``"r=16,target=all-linear"``, targets joined by ``+``.
        freeze: Parameters that are not trained: parts of their names (whole words between dots) or regexes of the
            whole name.
        quantize: ``"4bit"``: the frozen linear layers in bitsandbytes' 4-bit format; needs ``lora``.
        seq_len: Tokens of a sequence; with it a plan estimates activations.
        batch_size: Sequences of a process at a time (``per_device_train_batch_size``).
        checkpointing: Whether layers are computed anew in the backward pass (``gradient_checkpointing=True``).

    Raises:
        ValueError: A value is none of these.
    """

    dtype: str | None = None
    lora: str | None = None
    freeze: Sequence[str] = ()
    quantize: str | None = None
    seq_len: int | None = None
    batch_size: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.dtype), ("lora", self.lora)):
            check_type(name, value, (str, NoneType), "text or None")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype={shown(self.dtype)} is not one of {', '.join(DTYPES)}{nearest(self.dtype, DTYPES)}"
            )
        if not isinstance(self.freeze, (list, tuple)) or not all(isinstance(each, str) for each in self.freeze):
            raise TypeError(f"freeze={shown(self.freeze)} must be a list of names, for example [{shown(self.freeze)}]")
        if self.quantize not in (None, "4bit"):
            raise ValueError(f"quantize={shown(self.quantize)} is not supported; the choice is '4bit'")
        if self.quantize and not self.lora:
            raise ValueError("quantize='4bit' needs lora as well: weights in 4 bits cannot be trained")
        if self.lora:
            LoraOptions.parse(self.lora)
        for name, number in (("seq_len", self.seq_len), ("batch_size", self.batch_size)):
            if number is not None or name == "batch_size":
                check_number(name, number, count_up_to(MAX_REPEATS))
        if self.seq_len is None and (self.batch_size != 1 or self.checkpointing):
            raise ValueError("batch_size and checkpointing are for an estimate of activations, which needs seq_len")


@dataclass(frozen=True)
class OpenedModel:
    """A model to plan for."""

    model: nn.Module  # on the meta device, unless it is a live one
    source: str
    description: str  # dtype and options in words
    quantized: frozenset[int]  # ids of the parameters that will be stored in 4 bits


def open_model(source: Source, options: ModelOptions) -> OpenedModel:
    """Make the model that a source describes, without its weights; a live model is taken as it is.

    Raises:
        FileNotFoundError: A path does not exist and the name is no preset either.
        ImportError: LoRA was asked for and peft is not installed.
        TypeError: The source is none of these.
        ValueError: The configuration cannot be read or built, an option does not match the model, or options were given
            for a live model.
    """
    if isinstance(source, nn.Module):
        if options != ModelOptions():
            raise ValueError(
                f"{type(source).__name__} is a live model, whose dtypes, adapters and frozen parts are taken as they "
                "are; prepare it first, or plan for its configuration: plan_memory(model.config, ...)"
            )
        return OpenedModel(source, type(source).__name__, "as it is", frozenset())
    config, name = _read_config(source)
    dtype = DTYPES[options.dtype] if options.dtype else _own_dtype(config)
    model: nn.Module = _build(config, dtype, name)
    words = [str(dtype).removeprefix("torch.")]
    if options.freeze:
        count = _freeze(model, options.freeze)
        words.append(f"frozen: {', '.join(options.freeze)} ({count} tensors)")
    quantized = frozenset(_quantizable(model) if options.quantize else ())
    if options.lora:
        lora = LoraOptions.parse(options.lora)
        model = _add_lora(model, lora)
        words.append(f"LoRA {lora}")
    if not any(parameter.numel() for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(f"{name!r} describes a model without anything to train")
    if quantized:
        words.append(f"{len(quantized)} frozen linear layers in 4 bits")
    return OpenedModel(model, name, ", ".join(words), quantized)


def _add_lora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Freeze a model on the meta device, and let peft itself add the adapters: the plan is for what it trains."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'hf-lowmem-optim[peft]'") from error
    everything = options.targets == ("all-linear",)
    if not everything:
        _check_targets(model, options.targets)
    largest = max(size for parameter in model.parameters() for size in (1, *parameter.shape))
    if options.r > largest:
        raise ValueError(f"lora r={options.r} is more than any matrix of {type(model).__name__} can use: {largest}")
    config = LoraConfig(r=options.r, target_modules="all-linear" if everything else list(options.targets))
    with torch.device("meta"), warnings.catch_warnings():
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
                f"lora target={shown(target)} matches no module of {type(model).__name__}{nearest(target, ends)}"
            )


def _read_config(source: Any) -> tuple[PreTrainedConfig, str]:
    """Return the configuration that a source names, and what to call it."""
    if isinstance(source, PreTrainedConfig):
        return source, type(source).__name__
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"a model to plan for is a preset, a path, a configuration or a module, not {type(source).__name__}"
        )
    if isinstance(source, str):
        source = find_model(source)
        if source in PRESETS:
            return _config_from_dict(PRESETS[source], source), source
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = " It holds an adapter: plan for its base model with lora" * (path / "adapter_config.json").exists()
            raise FileNotFoundError(f"{str(source)!r} is a directory without a config.json.{hint}")
        path = path / "config.json"
    elif not path.is_file():
        raise FileNotFoundError(f"{shown(str(source))} is neither a file nor a directory")
    content = read_json(path)
    _check_sizes(content, repr(str(path)))
    return _config_from_dict(content, str(path)), str(source)


def _config_from_dict(content: Any, where: str) -> PreTrainedConfig:
    """Make a configuration of the class that its ``model_type`` names."""
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ValueError(f"{where!r} has no model_type, so it is no configuration of a transformers model")
    kind = content["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{where!r} has model_type={shown(kind)}, which transformers {transformers.__version__} does not "
            f"know{nearest(kind, CONFIG_MAPPING.keys())}. Build the model yourself and plan for it: plan_memory(model)"
        )
    if content.get("quantization_config"):
        raise ValueError(
            f"{where!r} describes weights that are quantized already; plan for the configuration of the original "
            "model, with quantize='4bit' and lora"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(content))
    except Exception as error:  # transformers computes with whatever the file holds
        raise ValueError(f"{where!r} is no valid configuration of {kind!r}: {_in_a_line(error)}") from error


def _check_sizes(content: Any, where: str) -> None:
    """Refuse a number that nobody's model has: transformers makes lists of some, before a model is built."""
    for key, value in content.items() if isinstance(content, dict) else ():
        most = MAX_REPEATS if _REPEATS.search(key) else MAX_SIZE
        for number in value if isinstance(value, list) else (value,):
            _check_sizes(number, where)
            if isinstance(number, int) and number > most and not _NO_SIZE.search(key):
                raise ValueError(f"{where} has {shown(key)}: {shown(number)}, and a plan is for {most:,} at most")


def _in_a_line(error: Exception) -> str:
    """Return another library's message as one line."""
    return shown(f"{type(error).__name__}: {' '.join(str(error).split())}")[1:-1]


def _own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the configuration's dtype, which ``from_pretrained`` loads; float32 if it names none."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype), torch.float32)


def _build(config: PreTrainedConfig, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """Make the model on the meta device, in the class that the configuration names."""
    model_class = _model_class(config, name)
    try:
        with _building(dtype):
            return model_class(copy.deepcopy(config))  # what is planned changes it
    except Exception as error:  # a model's constructor computes with whatever the configuration holds
        raise ValueError(f"{name!r} cannot be built as {model_class.__name__}: {_in_a_line(error)}") from error


def _model_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """Return the class in ``architectures``, else the one for training the bare model type."""
    architectures = getattr(config, "architectures", None) or []
    check_shape(architectures, [str], f"architectures of {name!r}")
    for architecture in architectures:
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        raise ValueError(
            f"{name!r} names the architecture {architecture!r}, which transformers {transformers.__version__} does not "
            "have. Build the model yourself and plan for it: plan_memory(model)"
        )
    from transformers.models.auto import modeling_auto

    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION"):
        known = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING")
        if type(config) in known:
            found = known[type(config)]
            return cast(type[PreTrainedModel], found[0] if isinstance(found, (list, tuple)) else found)
    raise ValueError(f'{name!r} names no architecture; add for example "architectures": ["BertForMaskedLM"] to it')


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Create modules on the meta device, in a dtype, and keep hints about running them away from a plan."""
    log = logging.getLogger("transformers")
    before, level = torch.get_default_dtype(), log.level
    torch.set_default_dtype(dtype)
    log.setLevel(logging.ERROR)
    parts = itertools.count(1)

    def count(*_: Any) -> None:
        if next(parts) > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS:,} parts, which a plan takes too long for")

    handles = [registration.register_module_parameter_registration_hook(count)]
    handles.append(registration.register_module_module_registration_hook(count))
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handle in handles:
            handle.remove()
        torch.set_default_dtype(before)
        log.setLevel(level)


def _freeze(model: nn.Module, entries: Sequence[str]) -> int:
    """Freeze the parameters that the entries name; return how many tensors."""
    named = dict(model.named_parameters())
    frozen = set()
    for entry in entries:
        whole = compile_regex(entry, "freeze", named)
        matching = {name for name in named if f".{entry}." in f".{name}." or whole.fullmatch(name)}
        if not matching:
            words = {word for name in named for word in name.split(".") if not word.isdigit()}
            raise ValueError(
                f"freeze={shown(entry)} matches no parameter of {type(model).__name__}{nearest(entry, words)} "
                f"(names are like {next(iter(named))!r})"
            )
        frozen |= matching
    for name in frozen:
        named[name].requires_grad_(False)
    if len(frozen) == len(named):
        raise ValueError(f"freeze={shown(list(entries))} leaves no parameter of {type(model).__name__} to train")
    return len(frozen)


def _quantizable(model: nn.Module) -> list[int]:
    """Return ids of the weights that transformers would load in 4 bits: linear layers except the head."""
    head = cast(Any, model).get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [id(m.weight) for m in modules if id(m.weight) not in embeddings]
