"""How batches run through a network that is pruned layer by layer: as it was, as it is by now, and from a block on.

Where the network is a list of blocks that each get what the one before gave, a layer's inputs need its own block alone:
the network runs as always, with its masks and positions, but the blocks before return what is kept of the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["Network", "evaluating"]


class _Reached(Exception):
    """What was looked for has been called."""


class Network:
    """A model, some of its layers with the weights that they had, and the batches that run through it.

    Attributes:
        layers: The layers, by name.
        dense: Their weights before pruning.
        order: Their names in the order of their first calls. Linear layers that get the same input, one after the
            other, are together: they have one Hessian.

    Args:
        model: The model, in evaluation mode.
        layers: Its layers that are to be pruned.
        batches: What it is run on.

    Raises:
        ValueError: No batch reaches one of the layers.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Any]) -> None:
        self.layers = layers
        self._model, self._batches = model, batches
        self.order, self._repeated = _order_of(model, layers, batches)
        self.dense: dict[str, Tensor] = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self._blocks = _find_blocks(model, layers, batches)
        self.begin()

    def begin(self) -> None:
        """Forget what is kept of blocks, before another pass over the layers."""
        self._done = 0  # blocks that need not run
        # of the last of them: by dense or not, and batch
        self._kept: dict[tuple[bool, int], Tensor] = {}

    def inputs_of(self, name: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield, for each batch, what a layer is given in its calls: in the dense network and in the pruned one."""
        layer, repeated = self.layers[name], name in self._repeated
        holding = (i for i, block in enumerate(self._blocks) if layer in block.modules())
        if (place := None if repeated else next(holding, None)) is not None:
            while self._done < place:
                self._finish_block()
        for batch in range(len(self._batches)):
            dense, pruned = list[Tensor](), list[Tensor]()
            for seen in (dense, pruned):

                def see(_: str, x: Tensor, seen: list[Tensor] = seen) -> None:
                    seen.append(x.detach().clone())  # what follows may work in place
                    if not repeated:  # else it may be called again
                        raise _Reached

                with _hooked({"": layer}, see):
                    self._run(batch, dense=seen is dense, skip=place is not None)
            yield dense, pruned

    def _finish_block(self) -> None:
        """Keep what the block at hand gives, for every batch, and go on to the next."""

        def keep(output: Tensor) -> None:
            kept[dense, batch] = output
            raise _Reached

        kept: dict[tuple[bool, int], Tensor] = {}
        handle = self._blocks[self._done].register_forward_hook(lambda _, __, output: keep(output))
        try:
            for batch in range(len(self._batches)):
                for dense in (True, False):
                    self._run(batch, dense=dense, skip=True)
                    self._kept.pop((dense, batch), None)
        finally:
            handle.remove()
        self._kept, self._done = kept, self._done + 1

    def _run(self, batch: int, *, dense: bool, skip: bool) -> None:
        with ExitStack() as stack:
            if dense:
                stack.enter_context(self._as_it_was())
            if skip and self._done:
                stack.enter_context(self._skipped(self._kept[dense, batch]))
            _run(self._model, self._batches[batch])

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Exchange the layers' weights with the dense ones, without copying."""

        def exchange() -> None:
            for name, layer in self.layers.items():
                layer.weight.data, self.dense[name] = self.dense[name], layer.weight.data

        exchange()
        try:
            yield
        finally:
            exchange()

    @contextmanager
    def _skipped(self, kept: Tensor) -> Iterator[None]:
        """Let the blocks that are done return what is kept; a copy, since what follows may work in place."""
        done = self._blocks[: self._done]
        own = [vars(block).get("forward") for block in done]
        copy = kept.clone()
        for block in done:
            vars(block)["forward"] = lambda *_, **__: copy
        try:
            yield
        finally:
            for block, forward in zip(done, own, strict=True):
                if forward is None:
                    del vars(block)["forward"]
                else:
                    vars(block)["forward"] = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and let it keep no keys and values of earlier calls."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if use_cache is not None:
            config.use_cache = use_cache


def _run(model: nn.Module, batch: Any) -> None:
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    except _Reached:
        pass


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the name and the input of each layer, before it runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, given, keywords: see(name, given[0] if given else keywords[next(iter(keywords))])

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _order_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any]
) -> tuple[list[list[str]], set[str]]:
    """Return the layers in the order of their first calls, and those that a batch calls twice."""
    together: list[list[str]] = []
    known, repeated = set[str](), set[str]()
    calls: Counter[str] = Counter()
    last: Tensor | None = None

    def see(name: str, x: Tensor) -> None:
        nonlocal last
        calls[name] += 1
        if calls[name] > 1:
            repeated.add(name)
        if name not in known:
            known.add(name)
            if x is last and all(isinstance(layers[each], nn.Linear) for each in (name, together[-1][0])):
                together[-1].append(name)
            else:
                together.append([name])
            last = x

    for batch in batches:
        with _hooked(layers, see):
            _run(model, batch)
        calls.clear()
        last = None
    if missing := [name for name in layers if name not in known]:
        raise ValueError(f"no batch reaches {missing[0]!r} ({len(missing)} such layers): name others in layers")
    return together, repeated


def _find_blocks(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any]) -> list[nn.Module]:
    """Return the blocks of the list with the most of the layers; none where a block gets anything but a tensor that
    the one before gave, or is called otherwise than once and in its turn.
    """
    chosen = set(layers.values())
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    counts = [sum(module in chosen for module in each.modules()) for each in lists]
    if not max(counts, default=0):
        return []
    blocks = list(lists[counts.index(max(counts))])
    called, last, fits = 0, None, True

    def before(block: nn.Module, given: Any) -> None:
        nonlocal called, fits
        in_turn = called < len(blocks) and blocks[called] is block
        fits &= in_turn and bool(given) and (called == 0 or given[0] is last)
        called += 1

    def after(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal last, fits
        last = output
        fits &= isinstance(output, Tensor)

    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        for batch in batches:
            called = 0
            _run(model, batch)
            fits &= called == len(blocks)
    finally:
        for handle in handles:
            handle.remove()
    return blocks if fits else []
