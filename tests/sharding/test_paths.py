"""Which path a sharded tensor takes, and what that sends: pure functions of shapes, which need no processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.engine.sharding.layout import Split
from hf_lowmem_optim.engine.sharding.paths import path_of_shape, sent_bytes
from hf_lowmem_optim.engine.sharding.traffic import step_traffic
from hf_lowmem_optim.memory.plan import plan_groups

#: Llama 2 7B: what a layer has, and how often; the embeddings.
LAYER = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
OTHERS = [(32000, 4096), (32000, 4096)]
LLAMA = [shape for shape, count in LAYER.items() for _ in range(32 * count)] + OTHERS


def options_of(name: str, **hyper: Any) -> Any:
    return OPTIMIZERS[name].optimizer_class.method.options(**hyper)


def path(name: str, shape: tuple[int, ...], split: Split, dtype: torch.dtype = torch.float32, **hyper: Any) -> str:
    return path_of_shape(OPTIMIZERS[name].optimizer_class.method, options_of(name, **hyper), shape, dtype, split)


def test_matrices_of_language_models_need_not_be_gathered() -> None:
    for shape in {*LLAMA}:
        for num_shards in (2, 4, 8, 16, 32):
            for name in ("microadam", "sparse_mfac", "sparse_ggt"):
                assert path(name, shape, Split(num_shards)) == "aligned", (name, shape, num_shards)
            assert path("ldadam", shape, Split(num_shards)) == "collective"
            assert path("ldadam", shape, Split(num_shards), rank=None) == "local"


@pytest.mark.parametrize(
    ("name", "shape", "split", "hyper"),
    [
        ("microadam", (4096, 11008), Split(3), {}),  # not even
        ("microadam", (8192, 4096), Split(8, 1), {}),  # columns have no whole blocks
        ("microadam", (8192, 4096), Split(8, None), {}),
        ("microadam", (4096, 4096), Split(8), {"stochastic_rounding": True}),
        ("microadam", (64, 4096), Split(64), {"min_compress_size": 8192}),  # a part alone would take AdamW
        ("microadam", (4096,), Split(8), {"dense_state": "8bit", "density": None}),
        ("sparse_mfac", (4096, 4096), Split(8), {"scope": "tensor"}),
        ("sparse_mfac", (4096,), Split(8), {}),
        ("ldadam", (4096, 4096), Split(8, 1), {}),  # an error in blocks of rows
        ("ldadam", (4096, 4096), Split(8), {"stochastic_rounding": True}),
        ("ldadam", (4096, 4096), Split(8), {"rank": 2048}),  # factors as large as the matrix
        ("ldadam", (12, 4096, 512), Split(8), {"stacked": True}),
        ("lowrank_mfac", (16, 4096, 512), Split(8), {"stacked": True}),
        ("trion", (4096, 4096), Split(8), {}),
    ],
)
def test_what_is_gathered(name: str, shape: tuple[int, ...], split: Split, hyper: dict[str, Any]) -> None:
    assert path(name, shape, split, **hyper) == "gathered"


def test_processes_have_whole_experts() -> None:
    for name in ("ldadam", "trion", "dct_adamw", "dash", "microadam"):
        assert path(name, (16, 4096, 512), Split(8), stacked=True) == "aligned"


def test_rows_or_columns_and_half_precision() -> None:
    assert path("ldadam", (4096, 4096), Split(8, 1), error_feedback="fp32") == "collective"
    assert path("ldadam", (4096, 4096), Split(8), torch.bfloat16) == "collective"
    for name in ("ldadam", "microadam"):
        assert path(name, (4096, 4096), Split(8), torch.bfloat16, weight_rounding="stochastic") == "gathered"


def test_sums_grow_with_the_number_of_processes_and_the_path_follows() -> None:
    method, options, previous = OPTIMIZERS["ldadam"].optimizer_class.method, options_of("ldadam"), "collective"
    for num_shards in (2, 16, 64, 256, 1024):
        split = Split(num_shards)
        staged, gathered = (
            sent_bytes(each, method, options, (4096, 4096), torch.float32, split) for each in ("collective", "gathered")
        )
        now = path("ldadam", (4096, 4096), split)
        assert now == ("collective" if staged < gathered else "gathered")
        assert (previous, now) != ("gathered", "collective")
        previous = now
    assert previous == "gathered"


def test_a_step_of_llama_sends_little() -> None:
    """LDAdam of rank 16 on eight processes: a few hundred megabytes each, where whole tensors would be gigabytes."""
    params = [nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16)) for shape in LLAMA]
    sent = {}
    for name in ("ldadam", "trion", "microadam", "sparse_mfac"):
        optimizer_class = OPTIMIZERS[name].optimizer_class
        group = {**optimizer_class.method.options.defaults(), "params": params}
        traffic = step_traffic(optimizer_class.method, [group], 8)
        sent[name], calls = traffic.total_bytes / 8, traffic.calls
        if name == "ldadam":
            # of 3.2 GB of parts in float32, half a gigabyte a wave
            assert calls == 4 * 7
            wide, tall = 32 * 5, 32 * 2 + 2
            assert traffic.tensors == {"collective": wide + tall}
        elif name == "sparse_mfac":
            assert (calls, traffic.total_bytes) == (1, 8 * 7 * len(LLAMA) * 32 * 8)
    assert sent["ldadam"] < 0.4e9 < 4e9 < sent["trion"] and sent["microadam"] == 0


def test_state_is_halved_on_two_processes() -> None:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in {*LLAMA}]
    for name in ("ldadam", "microadam", "sparse_mfac"):
        optimizer_class = OPTIMIZERS[name].optimizer_class
        groups = [{**optimizer_class.method.options.defaults(), "params": params}]
        one = plan_groups(optimizer_class, groups).total_bytes
        halves = [plan_groups(optimizer_class, groups, num_shards=2, rank=rank).total_bytes for rank in (0, 1)]
        assert sum(halves) >= one and max(halves) <= 0.52 * one, name
