"""``MatryoshkaLora``: nested ranks on stock peft."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hf_lowmem_optim.json_file import check_shape, read_json
from hf_lowmem_optim.nested_lora.layers import NestedLayer, find_layers, lora_config
from hf_lowmem_optim.nested_lora.ranks import (
    MODES,
    RULES,
    SCALINGS,
    Mode,
    Rule,
    Scaling,
    check_choice,
    check_rank,
    check_ranks,
    doubling_ranks,
)
from hf_lowmem_optim.words import shown

__all__ = ["SETTINGS_NAME", "MatryoshkaLora", "read_settings"]

#: Beside a saved adapter of all components.
SETTINGS_NAME = "matryoshka.json"
_SHAPE = {"ranks": [int], "scaling?": str, "mode": str, "seed": int}


class MatryoshkaLora:
    """Trains a LoRA adapter of rank R so that its first r components are an adapter of rank r.

    For stock peft models, after ``get_peft_model`` or ``PeftModel.from_pretrained``: forward pre-hooks on every
    ``lora_B`` of the adapter multiply its input, A·x, by a diagonal. Nothing of peft is replaced, nothing is added to
    the ``state_dict``, and no memory is used but R numbers a layer. It works on quantized models, with rsLoRA, DoRA
    (merging is refused: save a rank and merge what you load), gradient checkpointing, DDP and every optimizer. Each
    adapter of a model takes its own.

    What is trained, with scale s(r) of a rank (a = ``lora_alpha``; a/r, or a/√r with ``use_rslora``):

    - ``mode="matryoshka"``, the paper's: W₀x + Σ_j s(r_j)·B[:, :r_j]·A[:r_j]·x over all trained ranks r_j, in one pass.
    - ``mode="losses"``, ours: the mean of the losses at each rank. One forward and backward pass per rank, so that a
      step takes as many times as long: :func:`~hf_lowmem_optim.attach_nested_lora` does that in a Trainer, and in a
      loop of your own ``for rank in nested.ranks: with nested.at(rank): (loss() / len(nested.ranks)).backward()``.
    - ``mode="dylora"``: a rank drawn anew for each forward pass of the model in training, the same for all layers. The
      draws depend on ``seed`` and the step: a loop that is to resume exactly calls :meth:`begin_step`. With gradient
      checkpointing, let each forward pass have its backward pass before the next.
    - ``mode="lora"``: plain LoRA of all R components, to be truncated.

    What a rank r is, where it is evaluated, saved or merged:

    - ``rule="paper"``: W₀x + s(r)·B[:, :r]·A[:r]·x, any r up to R. In the mode ``"matryoshka"`` it is *not* what was
      trained, at r = R neither.
    - ``rule="nested"``, ours: W₀x + Σ s(r_j)·B[:, :r_j]·A[:r_j]·x over the trained r_j ≤ r, of which there must be one:
      at the largest of them what the mode ``"matryoshka"`` trained.

    Components above the largest trained rank never train. In layers of a smaller rank (``rank_pattern``) larger trained
    ranks drop out; where all would, the layer trains whole. In evaluation without a rank the model is what was trained;
    in the modes ``"dylora"`` and ``"losses"``, which train no single function, that is the largest trained rank.

    ``model.merge_and_unload()`` of peft knows nothing of all this: it gives r = R by ``rule="paper"`` with peft's own
    scale. Merge by :meth:`merge_and_unload`.

    Args:
        model: A ``PeftModel``.
        ranks: The ranks that are trained (in the mode ``"lora"`` those that are evaluated), ascending; None for 1, 2,
            4, … and R.
        scaling: s(r): ``"none"`` for a, ``"rank"`` for a/r, ``"sqrt"`` for a/√r; None for peft's own, so that a saved
            rank has the very rows of the adapter.
        mode: ``"matryoshka"``, ``"losses"``, ``"dylora"`` or ``"lora"``.
        adapter: Its name.
        seed: Of the ranks that ``"dylora"`` draws; 0 or more.
        init: ``"authors"`` draws A anew from ±1/√R, as the authors' code does, in place of peft's ±1/√inputs.

    Attributes:
        ranks: As given.
        trained_ranks: The same; (R,) in the mode ``"lora"``.
        rank: The rank of inference, or None.

    Raises:
        TypeError: The model is none of peft's, or ranks are no integers.
        ValueError: Ranks do not ascend from 1 to R at most; a value or the adapter's name is unknown; the adapter is no
            LoRA, has one of these already, or has layers without components to weigh (embeddings,
            ``target_parameters``); A is to be drawn anew for an adapter that was trained.

    Example:
        >>> model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        >>> nested = MatryoshkaLora(model, ranks=(1, 2, 4, 8, 16))
        >>> Trainer(model, args, train_dataset=data).train()
        >>> nested.set_rank(4)
        >>> nested.save_pretrained("rank-4", rank=4)  # any peft loads it
    """

    def __init__(
        self,
        model: Any,
        ranks: Sequence[int] | None = None,
        scaling: Scaling | None = None,
        mode: Mode = "matryoshka",
        adapter: str = "default",
        seed: int = 0,
        init: Literal["peft", "authors"] = "peft",
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("scaling", scaling, (None, *SCALINGS))
        check_choice("init", init, ("peft", "authors"))
        check_shape(seed, int, "seed")  # as in the file
        lora_config(model, adapter)
        layers = find_layers(model, adapter)
        self.full_rank: int = max(layer.r[adapter] for layer in layers.values())
        self.ranks = doubling_ranks(self.full_rank) if ranks is None else check_ranks(ranks, self.full_rank)
        self.trained_ranks = (self.full_rank,) if mode == "lora" else self.ranks
        self.model, self.scaling, self.mode, self.adapter, self.seed = model, scaling, mode, adapter, seed
        if init == "authors":
            _init_like_authors(layers, adapter)
        self._layers = [NestedLayer(name, each, adapter, self.trained_ranks, scaling) for name, each in layers.items()]
        self._step, self._num_draws = 0, 0
        self.rank: int | None = None
        self.rule: Rule = "paper"
        self._handle = None
        if mode in ("dylora", "losses"):
            self._handle = model.register_forward_pre_hook(_BeginForward(self))
        self.set_rank(None)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | Path, adapter: str = "default") -> MatryoshkaLora:
        """Return what :meth:`save_pretrained` wrote, on a model into which peft has loaded the adapter.

        Args:
            model: From ``PeftModel.from_pretrained(base_model, folder, is_trainable=True)``.
            folder: Where ``adapter_config.json`` and ``matryoshka.json`` are.
            adapter: The name that it was loaded by.

        Raises:
            FileNotFoundError: There is no ``matryoshka.json``: the adapter is a plain LoRA.
            ValueError: The file is none of ours, or its ranks do not fit the adapter.
        """
        return cls(model, **read_settings(folder), adapter=adapter)

    def settings(self) -> dict[str, Any]:
        """Return what ``matryoshka.json`` holds."""
        return {"ranks": list(self.ranks), "scaling": self.scaling, "mode": self.mode, "seed": self.seed}

    def set_rank(self, rank: int | None, rule: Rule = "paper") -> None:
        """Have the model compute an adapter of that rank from now on; None: what is trained.

        Args:
            rank: From 1 to R, in layers of a smaller rank that.
            rule: ``"paper"`` or ``"nested"``; see the class.

        Raises:
            ValueError: There is no such rank or rule, the rule has no term up to that rank, or peft has merged the
                adapter, so that no hook is called.
        """
        check_choice("rule", rule, RULES)
        if rank is not None:
            self.check_rank(rank, rule)
            self._check_not_merged()
        self.rank, self.rule = rank, rule
        if rank is None and self.mode in ("dylora", "losses"):  # which train no single function
            rank = self.trained_ranks[-1]
        for layer in self._layers:
            layer.set_rank(rank, rule)

    def check_rank(self, rank: Any, rule: Rule) -> None:
        """Raise for what is no rank of the adapter, or has no term by the rule.

        Raises:
            TypeError: It is no integer.
            ValueError: It is out of range.
        """
        check_rank(rank, self.full_rank)
        if rule == "nested" and rank < self.trained_ranks[0]:
            raise ValueError(
                f"rank={rank} is the base model by rule='nested', which has no term below the smallest trained rank: "
                f"take one of {', '.join(map(str, self.trained_ranks))}, or rule='paper'"
            )

    @contextmanager
    def at(self, rank: int | None, rule: Rule = "paper") -> Iterator[None]:
        """Set a rank for a ``with`` block, and the former one after it."""
        before = self.rank, self.rule
        self.set_rank(rank, rule)
        try:
            yield
        finally:
            self.set_rank(*before)

    def begin_step(self, step: int) -> None:
        """Say which training step begins: the ranks that ``mode="dylora"`` draws depend on it and on nothing before."""
        self._step, self._num_draws = step, 0

    def save_pretrained(self, folder: str | Path, rank: int | None = None, rule: Rule = "paper", **kwargs: Any) -> Path:
        """Save the adapter: of a rank, as a stock adapter of that rank that any peft loads; or whole.

        With peft's own scale and ``rule="paper"`` the matrices are the first rows and columns. Else what the components
        are multiplied by goes into the rows of A.

        Args:
            folder: Of the adapter; with another name than ``"default"`` a folder of that name in it, as peft does.
            rank: From 1 to R; None for the whole adapter with ``matryoshka.json`` beside it, to train on.
            rule: ``"paper"`` or ``"nested"``.
            **kwargs: For ``PeftModel.save_pretrained``: ``is_main_process``, ``state_dict`` of sharded models, ...

        Returns:
            The adapter's folder.
        """
        check_choice("rule", rule, RULES)
        target = self._folder(folder)
        if rank is None:
            self.model.save_pretrained(str(folder), selected_adapters=[self.adapter], **kwargs)
        else:
            self.check_rank(rank, rule)
            state = dict(kwargs.pop("state_dict", None) or self.model.state_dict())
            for layer in self._layers:
                state.update(layer.saved_tensors(state, rank, rule))
            configs = self.model.peft_config
            config = configs[self.adapter]
            configs[self.adapter] = _config_at(config, rank)
            try:
                self.model.save_pretrained(str(folder), selected_adapters=[self.adapter], state_dict=state, **kwargs)
            finally:
                configs[self.adapter] = config
        if kwargs.get("is_main_process", True):
            if rank is None:
                self.save_settings(folder)
            else:  # of the adapter that was there
                (target / SETTINGS_NAME).unlink(missing_ok=True)
        return target

    def save_settings(self, folder: str | Path) -> None:
        """Write ``matryoshka.json`` into the folder where ``model.save_pretrained(folder)`` puts the adapter."""
        (self._folder(folder) / SETTINGS_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n")

    def merge_and_unload(self, rank: int, rule: Rule = "paper", **kwargs: Any) -> nn.Module:
        """Merge the adapter at a rank into the base weights, and return the base model.

        Args:
            rank: From 1 to R.
            rule: ``"paper"`` or ``"nested"``: with that and ``ranks[-1]``, what ``mode="matryoshka"`` trained.
            **kwargs: For peft's ``merge_and_unload``.

        Raises:
            NotImplementedError: The adapter is a DoRA.
            ValueError: It is merged already.
        """
        check_choice("rule", rule, RULES)
        self.check_rank(rank, rule)
        if self.model.peft_config[self.adapter].use_dora:
            raise NotImplementedError(
                "a DoRA is not merged at a rank: save_pretrained(folder, rank=...), load that with peft, and merge it"
            )
        self._check_not_merged()
        before = [(layer.a.weight, layer.fold_(rank, rule)) for layer in self._layers]
        try:
            merged: nn.Module = self.model.merge_and_unload(adapter_names=[self.adapter], **kwargs)
        except BaseException:
            for weight, values in before:
                weight.data.copy_(values)
            raise
        self.remove()
        return merged

    def remove(self) -> None:
        """Take the hooks off the model: what is left is a plain LoRA."""
        for layer in self._layers:
            layer.handle.remove()
        if self._handle is not None:
            self._handle.remove()

    def _check_not_merged(self) -> None:
        if any(self.adapter in layer.layer.merged_adapters for layer in self._layers):
            raise ValueError(f"adapter {self.adapter!r} is merged already: call unmerge_adapter() first")

    def _folder(self, folder: str | Path) -> Path:
        return Path(folder) if self.adapter == "default" else Path(folder) / self.adapter

    def _begin_forward(self) -> None:
        """Draw a rank for a forward pass in training, or refuse one that nobody chose a rank for."""
        if self.rank is not None or not self.model.training or self.adapter not in self.model.active_adapters:
            return
        if self.mode == "losses":
            raise RuntimeError(
                "mode='losses' trains at one rank after the other: call attach_nested_lora(trainer, nested), or in a "
                "loop of your own write 'with nested.at(rank):' around forward and backward pass for each of "
                "nested.ranks"
            )
        # of the numbers alone: equal in all processes and on all machines
        chance = random.Random(f"{self.seed} {self._step} {self._num_draws}")
        self._num_draws += 1
        rank = chance.choice(self.trained_ranks)
        for layer in self._layers:
            layer.draw(rank)


class _BeginForward:
    """Calls a MatryoshkaLora before each forward pass of its model: a hook that deepcopy and pickle carry."""

    def __init__(self, nested: MatryoshkaLora) -> None:
        self._nested = nested

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Begin the pass."""
        self._nested._begin_forward()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return what ``matryoshka.json`` in a folder holds, as arguments of :class:`MatryoshkaLora`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is none of ours.
    """
    path = Path(folder) / SETTINGS_NAME
    settings = read_json(path)
    check_shape(settings, _SHAPE, SETTINGS_NAME)
    known = {key.removesuffix("?") for key in _SHAPE}
    if unknown := settings.keys() - known:
        raise ValueError(f"{SETTINGS_NAME}: unknown key {shown(min(unknown))}")
    check_choice(f"{SETTINGS_NAME}: mode", settings["mode"], MODES)
    check_choice(f"{SETTINGS_NAME}: scaling", settings.get("scaling"), (None, *SCALINGS))
    return dict(settings)


def _config_at(config: Any, rank: int) -> Any:
    """Return an adapter's configuration at a rank: ``lora_alpha`` and ``use_rslora`` stay."""
    changed = copy.deepcopy(config)
    changed.r = min(rank, config.r)
    changed.rank_pattern = {key: min(rank, each) for key, each in (config.rank_pattern or {}).items()}
    return changed


def _init_like_authors(layers: Mapping[str, Any], adapter: str) -> None:
    """Draw A anew from ±1/√R: kaiming_uniform of a matrix that is stored as (inputs, R)."""
    for name, layer in layers.items():
        if layer.lora_B[adapter].weight.any():
            raise ValueError(f"init='authors' draws A anew, but the adapter was trained: lora_B of {name} is not zero")
    for layer in layers.values():
        bound = layer.r[adapter] ** -0.5
        nn.init.uniform_(layer.lora_A[adapter].weight, -bound, bound)
