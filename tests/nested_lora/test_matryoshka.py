"""MatryoshkaLora on stock peft: what is computed at each rank, trained, saved, merged and refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from hf_lowmem_optim import MatryoshkaLora, RankEvaluationCallback, aurac
from hf_lowmem_optim.nested_lora.layers import WeighComponents
from tests.nested_lora import jobs
from tests.reference import matryoshka as reference
from tests.sharding.processes import launch
from tests.trainer.tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, token_rows, with_lora

R, ALPHA, RANKS = 8, 6, (1, 2, 5)


class Small(nn.Module):
    """Two linear layers and two convolutions: one of a kernel, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4 * 6 * 6)
        self.conv, self.point = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x)))).view(-1, 4, 6, 6)
        out = self.point(torch.tanh(self.conv(x)))
        assert isinstance(out, Tensor)
        return out


def base(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype)


def adapted(dtype: torch.dtype = torch.float32, *, fresh: bool = False, **settings: Any) -> Any:
    """The base with an adapter that was trained, as it were."""
    given = {"r": R, "lora_alpha": ALPHA, "target_modules": ["first", "second", "conv", "point"], **settings}
    torch.manual_seed(1)
    model = get_peft_model(base(dtype), LoraConfig(**given), autocast_adapter_dtype=False)
    for name, param in model.named_parameters():
        if "lora_B" in name and not fresh:
            nn.init.normal_(param, std=0.2)
    return model


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


@torch.no_grad()
def output(model: Any, *, train: bool = False) -> Tensor:
    out = model.train(train)(data(next(model.parameters()).dtype))
    assert isinstance(out, Tensor)
    return out


def loss_of(model: Any) -> Tensor:
    out = model.train()(data(next(model.parameters()).dtype))
    assert isinstance(out, Tensor)
    return out.square().mean()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_every_rank_and_the_gradients_are_those_of_the_definition(scaling: Any) -> None:
    model = adapted(torch.float64, target_modules=["first"])
    nested = MatryoshkaLora(model, RANKS, scaling)
    layer = model.base_model.model.first
    A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    x, probe = data(torch.float64), torch.randn(5, 16, dtype=torch.float64)

    def check(wanted: Tensor) -> None:
        got = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
        pairs = [torch.autograd.grad((each * probe).sum(), (A, B)) for each in (got, wanted)]
        torch.testing.assert_close(*pairs, rtol=1e-13, atol=1e-13)

    check(reference.summed(x, A, B, ALPHA, scaling, RANKS))
    for rank in range(1, R + 1):
        nested.set_rank(rank)
        check(reference.at_rank(x, A, B, ALPHA, scaling, rank))
        nested.set_rank(rank, "nested")
        check(reference.summed(x, A, B, ALPHA, scaling, [r for r in RANKS if r <= rank]))
        assert (nested.rank, nested.rule) == (rank, "nested")
    nested.set_rank(None)
    torch.testing.assert_close(
        nested._layers[0].hook.diagonal * layer.scaling["default"],
        reference.diagonal(ALPHA, R, scaling, RANKS),
        rtol=1e-15,
        atol=0,
    )


@pytest.mark.parametrize("settings", [{}, {"mode": "lora", "ranks": RANKS}, {"use_rslora": True}])
def test_one_rank_is_plain_lora_to_the_bit(settings: dict[str, Any]) -> None:
    settings = {"ranks": (R,), **settings}
    config = {"use_rslora": settings.pop("use_rslora", False), "lora_dropout": 0.1}
    plain, model = adapted(**config), adapted(**config)
    keys = model.state_dict().keys()
    nested = MatryoshkaLora(model, **settings)
    assert model.state_dict().keys() == keys and nested.trained_ranks == (R,)
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (plain, model)]
    for _ in range(3):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            torch.manual_seed(3)
            loss_of(each).backward()
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)
    nested.set_rank(R)
    assert torch.equal(output(plain), output(model))


#: Adapters: peft's settings and ours.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "peft's scale": ({}, {}),
    "rslora": ({"use_rslora": True}, {}),
    "none": ({}, {"scaling": "none"}),
    "patterns": ({"rank_pattern": {"first": 12, "conv": 3}, "alpha_pattern": {"second": 2}}, {"ranks": (4, 10)}),
    "bias": ({"lora_bias": True}, {}),
    "dora": ({"use_dora": True, "target_modules": ["first", "second"]}, {}),
    "other name": ({}, {"adapter": "mine"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_saved_as_a_stock_adapter_and_merged(kind: str, tmp_path: Path) -> None:
    """Trained a little; loaded by peft alone; merged by us and by peft from what was saved."""
    config, given = KINDS[kind]
    adapter = given.get("adapter", "default")
    model = adapted(**config)
    if adapter != "default":
        model.add_adapter(adapter, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["first", "conv"]))
        model.set_adapter(adapter)
    nested = MatryoshkaLora(model, **{"ranks": RANKS, **given})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    for _ in range(4):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = []
    ranks = range(1, R + 1) if kind == "peft's scale" else (3, nested.full_rank)
    for rule in ("paper", "nested"):
        for rank in ranks if rule == "paper" else (nested.ranks[0], 4, R):
            nested.set_rank(rank, rule)  # type: ignore[arg-type]
            expected = output(model)
            seen.append(expected)
            folder = nested.save_pretrained(tmp_path / f"{rule}{rank}", rank, rule, safe_serialization=rank % 2 == 0)  # type: ignore[arg-type]
            saved = json.loads((folder / "adapter_config.json").read_text())
            assert saved["r"] == min(rank, R) and saved["lora_alpha"] == model.peft_config[adapter].lora_alpha
            assert all(each <= rank for each in saved["rank_pattern"].values())
            loaded = PeftModel.from_pretrained(base(), folder)
            torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
            if kind != "dora" and rank >= 3:
                twin = copy.deepcopy(nested)
                merged = twin.merge_and_unload(rank, rule)  # type: ignore[arg-type]
                assert not any("lora" in name for name, _ in merged.named_parameters())
                torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen[0], seen[-1], rtol=1e-3, atol=1e-3)
    if kind == "peft's scale":  # the very rows
        row = PeftModel.from_pretrained(base(), tmp_path / "paper3").base_model.model.first.lora_A["default"].weight
        assert torch.equal(row, model.base_model.model.first.lora_A["default"].weight[:3])


def test_a_whole_adapter_is_saved_and_loaded_to_train_on(tmp_path: Path) -> None:
    model = adapted()
    nested = MatryoshkaLora(model, RANKS, "none", "losses", seed=5)
    nested.set_rank(2)
    assert nested.save_pretrained(tmp_path) == tmp_path
    assert json.loads((tmp_path / "matryoshka.json").read_text()) == nested.settings()
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    again = MatryoshkaLora.from_pretrained(loaded, tmp_path)
    assert again.settings() == nested.settings() and again.rank is None
    again.set_rank(2)
    assert torch.equal(output(loaded), output(model))
    nested.save_pretrained(tmp_path, is_main_process=False)
    nested.save_pretrained(tmp_path, rank=2)
    assert not (tmp_path / "matryoshka.json").exists()  # of what was there before
    with pytest.raises(FileNotFoundError, match=r"matryoshka\.json"):
        MatryoshkaLora.from_pretrained(loaded, tmp_path)


GOOD: dict[str, Any] = {"ranks": [1, 2], "scaling": "sqrt", "mode": "lora", "seed": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ([], "not an object"),
        ({**GOOD, "ranks": [2, 1]}, "must ascend"),
        ({**GOOD, "ranks": []}, "must begin"),
        ({**GOOD, "ranks": [1, True]}, "not a count"),
        ({**GOOD, "ranks": [1, 2**40]}, "is above 8"),
        ({**GOOD, "ranks": None}, "not a list"),
        ({**GOOD, "mode": "\x1b[2J"}, "not a line of text"),
        ({**GOOD, "mode": "lorra"}, "did you mean 'lora'"),
        ({**GOOD, "scaling": "log"}, "scaling='log' is none of"),
        ({**GOOD, "more": 1}, "unknown key 'more'"),
        ({**GOOD, "seed": -1}, "not a count"),
    ],
)
def test_a_file_of_settings_is_checked(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "matryoshka.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        MatryoshkaLora.from_pretrained(adapted(), tmp_path)


def test_components_above_the_largest_rank_never_train() -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    MatryoshkaLora(model, RANKS)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if "lora" in name:
            same = (p == before[name]).transpose(0, int("lora_B" in name)).flatten(1).all(1)
            assert same.tolist() == [False] * 5 + [True] * 3, name


def test_layers_of_a_smaller_rank() -> None:
    """Larger trained ranks drop out there, and a layer below all of them trains whole."""
    model = adapted(target_modules=["first", "second"], rank_pattern={"second": 3})
    nested = MatryoshkaLora(model, (2, 4, 8), "rank")
    second = nested._layers[1]
    assert [second.weights(None, "paper"), second.weights(8, "nested")] == [[3.0, 3.0, 0.0]] * 2
    assert second.weights(8, "paper") == [2.0] * 3 == second.weights(3, "paper")
    assert second.weights(1, "nested") == [0.0] * 3
    nested.remove()
    nested = MatryoshkaLora(model, (4, 8), "rank")
    assert nested._layers[1].weights(None, "paper") == [2.0] * 3
    nested.remove()
    assert MatryoshkaLora(model).ranks == (1, 2, 4, 8)
    assert MatryoshkaLora(adapted(r=1)).ranks == (1,) and MatryoshkaLora(adapted(r=6)).ranks == (1, 2, 4, 6)


def test_the_rule_of_the_paper_is_not_what_was_trained() -> None:
    """At R neither; the norms of docs/nested-lora.md, of components that are random and so of the same size."""
    model = adapted(r=4, use_rslora=True, target_modules=["first"])
    (layer,) = MatryoshkaLora(model, (1, 2, 4))._layers
    trained, at_full_rank = (math.hypot(*layer.weights(rank, "paper")) for rank in (None, 4))
    assert at_full_rank / trained == pytest.approx(0.38, abs=0.005)
    assert "has 0.38 of the other's norm" in (Path(__file__).parents[2] / "docs/nested-lora.md").read_text()


def test_draws_are_of_the_step_and_their_mean_is_that_of_the_paper() -> None:
    model = adapted(torch.float64)
    nested = MatryoshkaLora(model, RANKS, mode="dylora", seed=4)
    at_rank = {}
    for rank in RANKS:
        with nested.at(rank):
            at_rank[rank] = output(model)

    def drawn(count: int) -> list[int]:
        outs = [output(model, train=True) for _ in range(count)]
        # one rank for all layers: the function is that of one of the ranks
        return [next(rank for rank in RANKS if torch.equal(out, at_rank[rank])) for out in outs]

    nested.begin_step(7)
    first = drawn(30)
    assert set(first) == set(RANKS)
    nested.begin_step(8)
    assert drawn(30) != first
    nested.begin_step(7)
    assert drawn(10) == first[:10]
    assert torch.equal(output(model), at_rank[5])  # in evaluation the largest, and no draw
    assert drawn(20) == first[10:]
    draws = 600
    nested.begin_step(0)
    layer, total = nested._layers[0], torch.zeros(R, dtype=torch.float64)
    for _ in range(draws):
        nested._begin_forward()
        assert layer.hook.drawn is not None
        total += layer.hook.drawn
    mean = total / draws * layer.factor
    torch.testing.assert_close(mean, reference.diagonal(ALPHA, R, "rank", RANKS) / 3, rtol=0.15, atol=0)
    other = MatryoshkaLora(adapted(torch.float64), RANKS, mode="dylora", seed=5)
    other.begin_step(7)
    model = other.model
    assert drawn(30) != first


def test_losses_are_those_at_each_rank_and_a_pass_without_rank_is_refused() -> None:
    model = adapted(torch.float64)
    nested = MatryoshkaLora(model, RANKS, mode="losses")
    for rank in nested.ranks:
        with nested.at(rank):
            (loss_of(model) / len(nested.ranks)).backward()
    got = gradients(model)
    total = torch.zeros(())
    for rank in RANKS:
        with nested.at(rank):
            total = total + loss_of(model) / 3
    total.backward()
    torch.testing.assert_close(got, gradients(model), rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError, match="attach_nested_lora"):
        loss_of(model)
    assert torch.equal(output(model), output_at(nested, 5))
    with pytest.raises(ZeroDivisionError), nested.at(2):
        raise ZeroDivisionError
    assert nested.rank is None


def output_at(nested: MatryoshkaLora, rank: int) -> Tensor:
    with nested.at(rank):
        return output(nested.model)


@pytest.mark.parametrize("mode", ["matryoshka", "dylora"])
def test_copies_and_pickles_carry_the_hooks(mode: Any) -> None:
    nested = MatryoshkaLora(adapted(), RANKS, mode=mode)
    nested.set_rank(2)
    expected = output(nested.model)
    for twin in (copy.deepcopy(nested), pickle.loads(pickle.dumps(nested))):
        assert torch.equal(output(twin.model), expected)
        twin.set_rank(None)
        assert torch.equal(output(nested.model), expected)
        assert not torch.equal(output(twin.model), expected)
        twin.begin_step(3)
        assert not torch.equal(output(twin.model, train=True), expected)
        twin.remove()
        assert not any(len(module._forward_pre_hooks) for module in twin.model.modules())
        assert torch.equal(output(nested.model), expected)
    model = copy.deepcopy(nested.model)  # without the object
    assert torch.equal(output(model), expected)


def test_every_adapter_has_its_own_and_others_are_not_touched() -> None:
    model = adapted()
    nested = MatryoshkaLora(model, RANKS)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["first", "conv"], init_lora_weights=False))
    first, bare = output(model), output(base())
    with model.disable_adapter():
        assert torch.equal(output(model), bare)
    model.set_adapter("second")
    plain = output(model)
    other = MatryoshkaLora(model, adapter="second")
    assert other.ranks == (1, 2, 4) and not torch.equal(output(model), plain)
    other.set_rank(4)
    assert torch.equal(output(model), plain)
    other.set_rank(1)
    second = output(model)
    model.base_model.set_adapter(["default", "second"])
    both = output(model)
    model.set_adapter("default")
    assert torch.equal(output(model), first) and not any(torch.equal(both, each) for each in (first, second, plain))
    other.remove()
    model.set_adapter("second")
    assert torch.equal(output(model), plain)
    with pytest.raises(ValueError, match="already"):
        MatryoshkaLora(model, RANKS)
    nested.remove()
    MatryoshkaLora(model, RANKS)


def llama_batch() -> dict[str, Tensor]:
    rows = torch.stack([row["input_ids"] for row in token_rows(3)])
    return {"input_ids": rows, "labels": rows}


def test_one_batch_with_several_adapters() -> None:
    model: Any = with_lora(init_lora_weights=False)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    nested = MatryoshkaLora(model, (1, 2))
    nested.set_rank(1)
    inputs = {"input_ids": llama_batch()["input_ids"]}
    model.eval()
    mixed = model(**inputs, adapter_names=["default", "second", "__base__"]).logits
    one = model(**inputs).logits
    torch.testing.assert_close(mixed[0], one[0])
    model.set_adapter("second")
    torch.testing.assert_close(mixed[1], model(**inputs).logits[1])
    assert not torch.allclose(mixed[0], model(**inputs).logits[0])


@pytest.mark.parametrize("mode", ["matryoshka", "dylora"])
def test_gradients_under_checkpointing_are_the_same_bits(mode: Any) -> None:
    def run(reentrant: bool | None) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = with_lora(init_lora_weights=False)
        MatryoshkaLora(model, (1, 2, 6), mode=mode)
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        losses = []
        for _ in range(3):
            loss = model(**llama_batch()).loss
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses), gradients(model)

    expected = run(None)
    for reentrant in (False, True):
        losses, grads = run(reentrant)
        assert torch.equal(losses, expected[0])
        assert all(torch.equal(grad, expected[1][name]) for name, grad in grads.items())


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "dora", "4-bit", "bias"])
def test_a_hook_is_what_scaled_rows_are(kind: str, tmp_path: Path) -> None:
    """Powers of two, so that scaling A gives the same bits: weights p of a = r = 8, ranks 4 and 8: 3 and 1."""

    def make() -> Any:
        config: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_dora": kind == "dora", "init_lora_weights": False}
        model: Any = tiny_llama(hidden_size=64)
        if kind == "4-bit":
            model = quantized(tmp_path)
        elif kind == "bias":
            return adapted(lora_bias=True, r=8, lora_alpha=8)
        elif kind == "bfloat16":
            model = model.to(torch.bfloat16)
        torch.manual_seed(5)
        return get_peft_model(
            model, LoraConfig(target_modules=["q_proj", "down_proj"], **config), autocast_adapter_dtype=False
        )

    def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = loss_of(model) if kind == "bias" else model.train()(**llama_batch()).loss
        loss.backward()
        return loss.detach(), {name: grad for name, grad in gradients(model).items() if "lora_B" in name}

    hooked, scaled = make(), make()
    MatryoshkaLora(hooked, (4, 8), "rank")
    for name, param in scaled.named_parameters():
        if "lora_A" in name:
            param.data[:4] *= 3
    got, wanted = run(hooked), run(scaled)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if kind in ("bfloat16", "autocast") else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(got, wanted, **tolerance)
    assert len(got[1]) >= 4


def quantized(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return prepare_model_for_kbit_training(model)


def test_the_authors_initialization() -> None:
    model = adapted(fresh=True, target_modules=["second"])
    MatryoshkaLora(model, init="authors")
    a = model.base_model.model.second.lora_A["default"].weight
    assert 0.9 * R**-0.5 < a.abs().max() <= R**-0.5
    with pytest.raises(ValueError, match="the adapter was trained"):
        MatryoshkaLora(adapted(), init="authors")


def grouped() -> Any:
    return get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))


def attention() -> Any:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))


def experts() -> Any:
    return get_peft_model(tiny_mixtral(), LoraConfig(target_parameters=["experts.gate_up_proj"], target_modules=[]))


def twice() -> Any:
    model = adapted()
    MatryoshkaLora(model)
    return model


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (adapted, {"ranks": (2, 1)}, ValueError, "must ascend"),
    (adapted, {"ranks": (2, 2)}, ValueError, "must ascend"),
    (adapted, {"ranks": (0, 1)}, ValueError, "must begin with 1"),
    (adapted, {"ranks": ()}, ValueError, "must begin with 1"),
    (adapted, {"ranks": (1, 9)}, ValueError, "9 is above 8"),
    (adapted, {"ranks": (1, 2.0)}, TypeError, "sequence of integers"),
    (adapted, {"ranks": 4}, TypeError, "sequence of integers"),
    (adapted, {"mode": "losse"}, ValueError, "did you mean 'losses'"),
    (adapted, {"scaling": "srt"}, ValueError, "did you mean 'sqrt'"),
    (adapted, {"init": "author"}, ValueError, "did you mean 'authors'"),
    (adapted, {"adapter": "defalt"}, ValueError, "did you mean 'default'"),
    (adapted, {"seed": -1}, ValueError, "seed: -1 is not a count"),  # nor would the file be one
    (adapted, {"seed": 0.5}, ValueError, "seed: 0.5 is not a count"),
    (twice, {}, ValueError, "already"),
    (base, {}, TypeError, "Small is no PeftModel"),
    (lambda: nn.DataParallel(adapted()), {}, TypeError, "before anything else wraps it"),
    (lambda: get_peft_model(tiny_gpt2(), IA3Config()), {}, ValueError, "of type .*IA3"),
    (lambda: adapted(init_lora_weights="orthogonal", target_modules=["first"]), {}, ValueError, "'orthogonal' begins"),
    (lambda: with_lora(target_modules=["q_proj", "embed_tokens"]), {}, ValueError, r"embeddings \(.*embed_tokens"),
    (lambda: adapted(use_dora=True), {}, ValueError, r"convolutions with Dora.*\(.*conv, .*point"),
    (lambda: adapted(lora_alpha=0), {}, ValueError, r"lora_alpha=0 \(.*first"),
    (experts, {}, ValueError, r"target_parameters \(.*experts"),
    (grouped, {}, ValueError, "grouped convolutions"),
    (attention, {}, ValueError, "MultiheadAttention"),
]


@pytest.mark.parametrize(("make", "given", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    make: Callable[[], Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MatryoshkaLora(make(), **given)


def test_wrong_ranks_rules_and_merges_are_refused(tmp_path: Path) -> None:
    model = adapted(use_dora=True, target_modules=["first"])
    nested = MatryoshkaLora(model, RANKS)
    for call in (nested.set_rank, nested.merge_and_unload, lambda rank: nested.save_pretrained(tmp_path, rank)):
        for rank, error in ((0, ValueError), (9, ValueError), (2.0, TypeError), (True, TypeError)):
            with pytest.raises(error, match="rank="):
                call(rank)  # type: ignore[operator]
    with pytest.raises(ValueError, match="did you mean 'nested'"):
        nested.set_rank(1, "nestd")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="DoRA"):
        nested.merge_and_unload(2)
    nested.remove()
    nested = MatryoshkaLora(model, (4, 6))
    for call in (
        lambda: nested.set_rank(3, "nested"),
        lambda: nested.save_pretrained(tmp_path, 3, "nested"),
        lambda: nested.merge_and_unload(3, "nested"),
        lambda: RankEvaluationCallback(nested, (3, 6), rule="nested"),
    ):
        with pytest.raises(ValueError, match=r"rank=3 is the base model by rule='nested'.*take one of 4, 6, or rule"):
            call()
    assert (nested.rank, nested.rule) == (None, "paper") and not list(tmp_path.iterdir())
    model = adapted()
    nested, expected = MatryoshkaLora(model, RANKS), output(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        nested.merge_and_unload(2)
    with pytest.raises(ValueError, match="merged already"):
        nested.set_rank(2)
    nested.set_rank(None)
    model.unmerge_adapter()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError):
        nested.merge_and_unload(2, unknown=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(output(model), expected)


def test_aurac() -> None:
    assert aurac([0.5], [4]) == 0.5
    assert aurac([3.0] * 4, [1, 3, 4, 9]) == pytest.approx(3.0, rel=1e-15)
    # log2: widths 1 and 1; linear: 1 and 2
    assert aurac([0.5, 0.7, 0.8], [1, 2, 4]) == pytest.approx((0.6 + 0.75) / 2, rel=1e-15)
    assert aurac([0.5, 0.7, 0.8], [1, 2, 4], "linear") == pytest.approx((0.6 + 2 * 0.75) / 3, rel=1e-15)
    for scores, ranks, scale, message in (
        ([1.0, 2.0], [1], "log2", "2 scores for 1 ranks"),
        ([1.0, 2.0], [2, 1], "log2", "must ascend"),
        ([], [], "log2", "must begin"),
        ([1.0], [1], "log", "did you mean 'log2'"),
    ):
        with pytest.raises(ValueError, match=message):
            aurac(scores, ranks, scale)  # type: ignore[arg-type]


def test_no_hook_is_left_where_a_constructor_fails() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="is above"):
        MatryoshkaLora(model, (1, 9))
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(isinstance(hook, WeighComponents) for hook in hooks)


def test_processes_draw_alike_and_send_gradients_once(tmp_path: Path) -> None:
    [(first, second)] = launch([("tests.nested_lora.jobs:train", 2)], tmp_path, timeout=300)
    alone = jobs.train(0, 1, tmp_path)
    for mode, (values, num_sent) in first.items():
        assert all(torch.equal(value, second[mode][0][name]) for name, value in values.items())
        for name, value in values.items():
            torch.testing.assert_close(value, alone[mode][0][name], rtol=1e-4, atol=1e-5)
        assert num_sent == 3, mode  # buckets, of which there is one, in three steps
