"""LoRDO against a float64 simulation of its workers, in one process and in two, and what it refuses."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import LoRDO, get_entry, layerwise, measure_state, plan_memory, plan_optimizer
from hf_lowmem_optim.engine.workers import sync_bytes
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.communication import SyncTraffic
from hf_lowmem_optim.optimizers.lordo import LoRDOOptions, lordo_state, lordo_update_, new_basis, transport_
from tests.local_updates.jobs import warnings_of_the_package
from tests.reference.lordo import ReferenceLoRDO
from tests.sharding.processes import launch

SHAPES = [(12, 40), (40, 12), (24, 24), (10,)]
RANK, K, STEPS, RATE = 4, 4, 14, 1e-2
#: Of one period more than is compared, with every option of the update and of the sync.
SETTINGS: dict[str, dict[str, Any]] = {
    "sketch": {},
    "svd": {"projection": "svd", "weight_decay": 0.1},
    "basis alone": {"omega": 1.0},
    "no basis": {"omega": 0.0, "mu": 2.0, "betas": (0.8, 0.95)},
    "clipped": {"clip_norm": 0.5, "omega": 0.5},
    "with error": {"error_feedback": "fp32"},
}

Gradients = list[list["np.ndarray[Any, Any] | None"]]


def start() -> list[Any]:
    random = np.random.default_rng(0)
    return [0.05 * random.normal(size=shape).astype(np.float32) for shape in SHAPES]


def gradients(steps: int, workers: int, *, equal: bool = False, seed: int = 6) -> Iterator[Gradients]:
    """Directions of decreasing strength, common to all workers, that turn slowly, and noise of each worker.

    Singular values that are nearly equal, or second moments that nearly cancel in their transport, would magnify
    rounding; here there are none.
    """
    random = np.random.default_rng(seed)
    strength = [0.7 ** np.arange(shape[0])[:, None] if len(shape) == 2 else 1.0 for shape in SHAPES]
    turns = [np.linalg.qr(random.normal(size=(shape[0], shape[0])))[0] for shape in SHAPES]
    base = [random.normal(size=shape) for shape in SHAPES]
    for _ in range(steps):
        base = [0.9 * b + 0.4 * random.normal(size=b.shape) for b in base]
        whole = [turn @ (s * b) for turn, s, b in zip(turns, strength, base, strict=True)]
        own = [[0.1 * g + 0.02 * random.normal(size=g.shape) for g in whole] for _ in range(workers)]
        single = [[g.astype(np.float32) for g in each] for each in own]
        yield [single[0]] * workers if equal else single  # type: ignore[list-item]


def build(params: Sequence[nn.Parameter], **options: Any) -> LoRDO:
    return LoRDO(params, **{"lr": RATE, "rank": RANK, "sync_every": K, **options})


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(each).to(dtype)) for each in start()]


def reference(workers: int, options: dict[str, Any]) -> ReferenceLoRDO:
    own = {**options, "error_feedback": "error_feedback" in options}
    return ReferenceLoRDO(start(), workers, rank=RANK, sync_every=K, **own)


def step(optimizer: LoRDO, params: Sequence[nn.Parameter], own: Sequence[Any]) -> None:
    for param, gradient in zip(params, own, strict=True):
        param.grad = None if gradient is None else torch.tensor(gradient).to(param.dtype)
    optimizer.step()


def distance(params: Sequence[nn.Parameter], expected: ReferenceLoRDO, rank: int = 0) -> float:
    """The largest error of a tensor, relative to the way that it has travelled."""
    pairs = zip(params, expected.weights(rank), start(), strict=True)
    return max(np.linalg.norm(p.detach().double().numpy() - W) / np.linalg.norm(W - begin) for p, W, begin in pairs)


# ---------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", SETTINGS)
def test_one_worker_is_the_float64_transcription(name: str) -> None:
    params = parameters()
    optimizer, expected = build(params, **SETTINGS[name]), reference(1, SETTINGS[name])
    for own in gradients(STEPS, 1):
        step(optimizer, params, own[0])
        expected.step(own, RATE)
    assert distance(params, expected) <= 1e-5
    assert optimizer.communicated_bytes == 0
    for param, Q in list(zip(params, expected.Q, strict=True))[:3]:
        # signs of columns are free
        overlap = np.abs(Q.T @ optimizer.state[param]["basis"].double().numpy())
        assert np.abs(overlap - np.eye(RANK)).max() < 1e-4


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_a_full_basis_is_adam_in_rotated_coordinates(shape: tuple[int, int]) -> None:
    random, (p, q) = torch.Generator().manual_seed(0), sorted(shape)
    Q = torch.linalg.qr(torch.randn(p, p, generator=random))[0]
    W, rotated = torch.randn(shape, generator=random), nn.Parameter(torch.empty(p, q))
    turned: Callable[[Tensor], Tensor] = lambda each: each.mT if shape[0] > shape[1] else each  # noqa: E731
    rotated.data = Q.mT @ turned(W)
    options = LoRDOOptions(lr=0.05, rank=p, omega=1.0, weight_decay=0.1, sync_every=1)
    adam = torch.optim.AdamW([rotated], lr=0.05, betas=options.betas, weight_decay=0.1)
    state = {"basis": Q[None], "exp_avg": torch.zeros(1, p, q), "exp_avg_sq": torch.zeros(1, p, q)}
    for t in range(1, 9):
        gradient = torch.randn(shape, generator=random)
        rotated.grad = Q.mT @ turned(gradient)
        lordo_update_([W], [gradient], state, t, options)
        adam.step()
    torch.testing.assert_close(Q.mT @ turned(W), rotated.detach(), rtol=1e-5, atol=1e-5)


def test_the_basis_alone_never_leaves_its_first_span_and_the_full_rank_term_does() -> None:
    for omega, most in ((1.0, 1e-5), (0.9, 1.0)):
        params = parameters()
        optimizer = build(params, omega=omega)
        for own in gradients(STEPS, 1):
            step(optimizer, params, own[0])
        for param, begin in list(zip(params, start(), strict=True))[:3]:
            sizes = np.linalg.svd(param.detach().numpy() - begin, compute_uv=False)
            assert sizes[RANK] <= most * sizes[0] and (sizes[RANK] > 1e-2 * sizes[0]) == (omega < 1)


def test_no_share_of_the_basis_needs_no_first_moment() -> None:
    params = parameters()
    optimizer = build(params, omega=0.0)
    for own in gradients(3, 1):
        step(optimizer, params, own[0])
    assert set(optimizer.state[params[0]]) == {"step", "basis", "exp_avg_sq", "anchor_sketch"}
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    optimizer.param_groups[0]["omega"] = 0.5  # the state follows
    step(optimizer, params, next(gradients(1, 1))[0])
    assert optimizer.state[params[0]]["exp_avg"].any() and measure_state(optimizer) == plan_optimizer(optimizer)


def test_a_signed_permutation_carries_moments_exactly() -> None:
    random, options = torch.Generator().manual_seed(0), LoRDOOptions(rank=4)
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    u = torch.randn(4, 20, generator=random)
    v = u.square() * 0.2 + torch.rand(4, 20, generator=random)
    basis = torch.eye(10, 4)
    state = {"basis": basis.clone(), "exp_avg": u.clone(), "exp_avg_sq": v.clone()}
    transport_(state, basis[:, order] * signs, 7, options)
    assert torch.equal(state["exp_avg"], u[order] * signs[:, None])
    torch.testing.assert_close(state["exp_avg_sq"], v[order], rtol=1e-6, atol=0)


def test_directions_of_the_old_basis_fill_up_what_the_change_has_not() -> None:
    random = torch.Generator().manual_seed(0)
    whole, old = torch.randn(30, 12, generator=random), torch.linalg.qr(torch.randn(30, 4, generator=random))[0]
    assert new_basis(torch.zeros(30, 12), whole, old) is old
    # what averaging three equal numbers leaves is no change
    assert new_basis(whole * 2.0**-25, whole, old) is old
    assert new_basis(torch.full((30, 12), float("nan")), whole, old) is old
    left = torch.linalg.qr(torch.randn(30, 2, generator=random))[0]
    for known in (left, old[:, :2]):  # beside the old basis, and within
        found = new_basis(known @ torch.randn(2, 12, generator=random), whole, old)
        torch.testing.assert_close(found.mT @ found, torch.eye(4), rtol=0, atol=1e-5)
        both = torch.cat((known, old), dim=1)
        # in the span of both, and all of what is known in it
        inside = torch.linalg.lstsq(both, found, driver="gelsd").solution
        torch.testing.assert_close(both @ inside, found, rtol=0, atol=1e-4)
        torch.testing.assert_close(found @ (found.mT @ known), known, rtol=0, atol=1e-4)
    params = parameters()
    optimizer = build(params, lr=0.0)
    step(optimizer, params, next(gradients(1, 1))[0])
    before = optimizer.state[params[0]]["basis"].clone()
    for own in gradients(K, 1):
        step(optimizer, params, own[0])
    assert torch.equal(optimizer.state[params[0]]["basis"], before)


@pytest.mark.parametrize("projection", ["sketch", "svd"])
def test_the_state_takes_what_the_table_says(projection: str) -> None:
    p, q, r = 64, 96, 16
    weight = nn.Parameter(torch.zeros(q, p, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = LoRDO([weight], projection=projection)
    optimizer.step()
    anchor = 2 * p * q if projection == "svd" else 4 * p * (r + 8)
    assert measure_state(optimizer).total_bytes == 4 * p * r + 2 * 4 * r * q + anchor
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    large = lordo_state((4096, 4096), torch.float32, LoRDOOptions())
    assert large is not None
    assert sum(spec.nbytes for spec in large.values()) / 4096**2 == 4 * (16 + 2 * 16 + 24) / 4096


def test_the_plan_says_what_a_sync_sends_beside_ddp_and_fsdp2() -> None:
    r, n, model = 16, 4, nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    plan = plan_memory(model, "lordo", optim_args="sync_every=8", gpus=n)
    matrices, vectors = 2 * (64 * 96 + 2 * r * 96), 96 + 64
    expected = (n - 1) * (2 * 4 * (matrices + 3 * vectors) + 2 * 4 * 64 * r) // n
    assert plan["lordo"].sync == SyncTraffic(8, expected) and plan["lordo"].sync.bytes_per_step == expected // 8
    weights = 4 * (2 * 64 * 96 + vectors)
    said = f"DDP itself {format_bytes(2 * 3 * weights // 4)} a step, FSDP2 itself {format_bytes(3 * 3 * weights // 4)}"
    text = " ".join(str(plan).split())
    assert (
        f"sends every 8 steps, per GPU: {format_bytes(expected)}, {format_bytes(expected // 8)} a step; {said}" in text
    )
    sharded = plan_memory(model, "lordo", gpus=n, sharding="fsdp")["lordo"]
    assert sharded.sync is None and "it trains under DDP" in str(sharded.problem)
    assert plan_memory(model, "lordo")["lordo"].sync is None


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    why = "a sync averages all tensors at once"
    with pytest.raises(NotImplementedError, match=f"'lordo' has no layer-wise mode: {why}"):
        layerwise(LoRDO)
    with pytest.raises(NotImplementedError, match="no layer-wise mode"):
        get_entry("lordo_layerwise")
    first, second = parameters()[:2]
    with pytest.raises(ValueError, match=r"sync_every=5 of a parameter group differs from sync_every=4 of another"):
        build([{"params": [first]}, {"params": [second], "rank": None, "sync_every": 5}])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------- two processes


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the bytes of all-reduces and broadcasts, apart from the package."""
    sent, originals = [0], (torch.distributed.all_reduce, torch.distributed.broadcast)

    def note(original: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **others: Any) -> Any:
            sent[0] += tensor.numel() * tensor.element_size()
            return original(tensor, *args, **others)

        return call

    torch.distributed.all_reduce, torch.distributed.broadcast = map(note, originals)
    try:
        yield sent
    finally:
        torch.distributed.all_reduce, torch.distributed.broadcast = originals


def digest(optimizer: LoRDO, *, without: Sequence[str] = ()) -> str:
    """A hash of weights and state."""
    found = hashlib.sha256()
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            tensors = [
                v for k, v in sorted(state.items()) if isinstance(v, Tensor) and not k.startswith(tuple(without) or "-")
            ]
            for tensor in (param.detach(), *tensors):
                found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            found.update(str(state.get("step")).encode())
    return found.hexdigest()


def all_equal(value: Any) -> bool:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return all(each == values[0] for each in values)


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def saved(optimizer: LoRDO) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def follow(rank: int, world: int, options: dict[str, Any], absent: Sequence[int] = ()) -> dict[str, Any]:
    """Train as one of several workers beside the simulation of all of them."""
    params = parameters()
    optimizer, expected, equal, by_hand = build(params, **options), reference(world, options), [], []
    with counted() as sent:
        for number, own in enumerate(gradients(STEPS, world), 1):
            own[1] = [None if number in absent and i < 2 else g for i, g in enumerate(own[1])]
            step(optimizer, params, own[rank])
            expected.step(own, RATE)
            if optimizer.steps_since_sync == 0:
                equal.append(all_equal(digest(optimizer, without=["error"])))
            by_hand.append(sent[0])
    r, matrices = RANK, [sorted(shape) for shape in SHAPES if len(shape) == 2]
    first = sum(4 * (p * q + p * r) for p, q in matrices)
    planned = sum(sync_bytes(LoRDO.method, optimizer.param_groups))
    moments = 1 if options.get("omega") == 0 else 2
    each = sum(4 * (p * q + moments * r * q + p * r) for p, q in matrices) + 4 * 3 * 10
    return {
        "distance": distance(params, expected, rank),
        "equal": equal,
        "between": all_equal(digest(optimizer)),
        "bytes": [sent[0], optimizer.communicated_bytes, first + planned * (STEPS // K), first + each * (STEPS // K)],
        "quiet": by_hand[0] == by_hand[2] == first and by_hand[3] == by_hand[6],
    }


def limits(rank: int, world: int) -> dict[str, Any]:
    """Equal data, permuted workers, resume on another number of workers, a sync out of turn."""
    alone = [torch.distributed.new_group([each]) for each in range(world)][rank]
    found: dict[str, Any] = {}
    runs = []
    for group in (None, alone):
        params = parameters()
        optimizer = build(params, process_group=group)
        with warnings_of_the_package() as told:
            for own in gradients(STEPS, world, equal=True):
                step(optimizer, params, own[rank])
        # as under a DDP that averages
        assert [each.partition(":")[0] for each in told] == ["all workers have the same gradients"] * (group is None)
        runs.append(digest(optimizer))
    found["equal data"] = runs[0] == runs[1] and optimizer.communicated_bytes == 0

    ends = []
    for place in (rank, world - 1 - rank):
        params = parameters()
        optimizer = build(params)
        for own in gradients(2 * K, world):
            step(optimizer, params, own[place])
        ends.append(torch.cat([param.detach().view(-1) for param in params]))
    found["permuted"] = float(
        (ends[0] - ends[1]).norm() / (ends[0] - torch.tensor(np.concatenate([each.ravel() for each in start()]))).norm()
    )

    # one worker alone goes on from what two have saved, and two from that, as two that were not stopped
    steps = list(gradients(4 * K, world, equal=True))
    straight = parameters()
    whole = build(straight)
    for own in steps:
        step(whole, straight, own[rank])
    for name, groups in (("resume", (None, None, None)), ("other workers", (None, alone, None))):
        params = parameters()
        optimizer = build(params)
        for part, group in enumerate(groups):
            if part:
                optimizer, state = build(params, process_group=group), saved(optimizer)
                optimizer.load_state_dict(state)
            for own in steps[part * K : (part + 1) * K if part < 2 else None]:
                step(optimizer, params, own[rank])
        found[name] = digest(optimizer) == digest(whole)

    params = parameters()
    optimizer, expected = build(params), reference(world, {})
    for number, own in enumerate(gradients(STEPS, world), 1):
        step(optimizer, params, own[rank])
        expected.step(own, RATE)
        if number == K + 2:
            found["between"] = refused(optimizer.state_dict)
            optimizer.sync()
            expected.sync(renew=False)
            found["out of turn"] = all_equal(digest(optimizer)) and not refused(optimizer.state_dict)
    found["distance"] = distance(params, expected, rank)
    return found


def narrow(rank: int, world: int) -> dict[str, Any]:
    """Weights of 16 bits, and of 24, of which the mean is rounded once; what is sent in 16 bits."""
    found: dict[str, Any] = {}
    for name, dtype, options in (
        ("bf16", torch.bfloat16, {}),
        ("24 bits", torch.bfloat16, {"weight_rounding": "compensated"}),
        ("sent in bf16", torch.bfloat16, {"sync_dtype": "bf16"}),
    ):
        params = parameters(dtype)
        optimizer = build(params, **options)
        for own in gradients(2 * K, world):
            step(optimizer, params, own[rank])
        found[name] = all_equal(digest(optimizer)), optimizer.communicated_bytes
    return found


def refusals(rank: int, world: int) -> dict[str, Any]:
    """What the workers say, each for itself, and that nothing has spread."""
    found: dict[str, Any] = {}
    own = next(gradients(1, world))[rank]
    different: dict[str, Callable[[], Any]] = {
        "K": lambda: build(parameters(), sync_every=K + rank),
        "shapes": lambda: build([nn.Parameter(torch.zeros(12, 40 + rank)), *parameters()[1:]]),
        "weights": lambda: build([nn.Parameter(torch.full((12, 40), 1.0 + rank)), *parameters()[1:]]),
    }
    for name, make in different.items():
        optimizer = make()
        params = optimizer.param_groups[0]["params"]
        other = [own[0] if name != "shapes" else np.zeros((12, 40 + rank), np.float32), *own[1:]]
        found[name] = refused(partial(step, optimizer, params, other))

    params = parameters()
    optimizer = build([("first", params[0]), *[(str(i), p) for i, p in enumerate(params[1:])]])  # type: ignore[list-item]
    for number, each in enumerate(gradients(K, world), 1):
        if (number, rank) == (K - 1, 1):
            each[rank][0][3, 5] = float("nan")  # type: ignore[index]
        found["NaN"] = refused(partial(step, optimizer, params, each[rank]))
    found["finite"] = all(bool(param.isfinite().all()) for param in params)

    for name, options in (("error", {"error_feedback": "fp32"}), ("codes", {"dense_state": "8bit", "rank": 4})):
        params = parameters()
        if name == "codes":
            pytest.importorskip("bitsandbytes")
        optimizer = build(params, **options)
        # before the first step, as accelerate does
        assert not refused(optimizer.state_dict)
        if name == "error":
            for each in gradients(K, world):
                step(optimizer, params, each[rank])
        found[name] = refused(optimizer.state_dict if name == "error" else partial(step, optimizer, params, own))

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(12, 40), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(torch.ones(12, 40), mesh, [Shard(0)])
    found["sharded"] = refused(LoRDO([sharded], rank=4).step)

    found.update(later_groups(rank, own))
    # a rate that begins at 0, and a gradient that is nothing but zeros on one worker
    params = parameters()
    optimizer = build(params, lr=0.0)
    step(optimizer, params, [own[0] if rank == 0 else None, *own[1:]])
    found["steps"] = [optimizer.state[param]["step"] for param in params]
    return found


def later_groups(rank: int, own: Sequence[Any]) -> dict[str, Any]:
    """What is trained or frozen later than the rest, roundings, and a gradient scaler."""
    found: dict[str, Any] = {}
    params = parameters()
    optimizer = build(params[:3])
    for _ in range(2):
        step(optimizer, params[:3], [(rank + 1) * each for each in own[:3]])
    optimizer.add_param_group({"params": [params[3]]})
    for _ in range(2):
        step(optimizer, params, [(rank + 1) * each for each in own])
    found["added"] = optimizer.steps_since_sync == 0 and all_equal(digest(optimizer))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2 + rank))]})
    found["added otherwise"] = refused(partial(step, optimizer, params, own))

    params = parameters()
    optimizer = build(params)
    for trained, other in ((0, 1), (1, 0)):
        params[trained].requires_grad_(True)
        params[other].requires_grad_(False)
        for _ in range(2):
            optimizer.zero_grad()
            found["frozen"] = refused(partial(step, optimizer, [params[trained]], [own[trained]]))
        for param in params[2:]:
            param.requires_grad_(False)
    for name, dtype, rounding in (("float32", torch.float32, "nearest"), ("24 bits", torch.bfloat16, "compensated")):
        params = parameters(dtype)
        optimizer = build(params, sync_dtype="bf16", weight_rounding=rounding)
        found[f"{name} in bf16"] = refused(partial(step, optimizer, params, own))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    found["scaler"] = refused(partial(scaler.step, optimizer))
    return found


def workers(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """All that two processes do."""
    return {
        **{name: follow(rank, world, options) for name, options in SETTINGS.items()},
        "absent": follow(rank, world, {}, absent=(1, 3, 6, 7)),
        "limits": limits(rank, world),
        "narrow": narrow(rank, world),
        "refusals": refusals(rank, world),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes returned."""
    return launch([(f"{__name__}:workers", 2)], tmp_path_factory.mktemp("lordo"), timeout=600)[0]


@pytest.mark.parametrize("name", [*SETTINGS, "absent"])
def test_two_workers_are_the_float64_transcription(name: str, results: Any) -> None:
    """Over three periods: equal to the bit after each, different between, and sent is what the formula says."""
    for each in results:
        assert each[name]["distance"] <= 2e-4
        assert each[name]["equal"] == [True] * 3 and not each[name]["between"] and each[name]["quiet"]
        counted, told, planned, formula = each[name]["bytes"]
        assert counted == told == planned == formula


def test_exact_limits_of_two_workers(results: Any) -> None:
    for each in results:
        found = each["limits"]
        assert found["equal data"] and found["resume"] and found["other workers"] and found["out of turn"]
        assert found["permuted"] <= 1e-6 and found["distance"] <= 2e-4
        assert "2 steps after the last sync: save when a multiple of sync_every=4" in found["between"]


def test_narrow_weights_and_narrow_messages(results: Any) -> None:
    for each in results:
        found = each["narrow"]
        assert all(equal for equal, _ in found.values())
        # bases are sent in full
        bases = sum(4 * min(shape) * RANK for shape in SHAPES if len(shape) == 2)
        wide, half = found["bf16"][1], found["sent in bf16"][1]
        assert half - 3 * bases == (wide - 3 * bases) // 2 and found["24 bits"][1] == wide


def test_workers_that_differ_are_told_so(results: Any) -> None:
    for each in results:
        found = each["refusals"]
        assert (
            "not set up alike: rank 1" in found["K"] and "sync_every=4" in found["K"] and "sync_every=5" in found["K"]
        )
        assert "(12, 40)" in found["shapes"] and "(12, 41)" in found["shapes"]
        assert "bits adding up to" in found["weights"]
        assert "rank 1 has NaN or infinity in 'first'" in found["NaN"]
        assert "the error that error_feedback='fp32' keeps is each worker's own" in found["error"]
        assert "dense_state='8bit'" in found["codes"]
        assert "sharded (DTensor), and a sync averages all tensors" in found["sharded"]
        assert found["steps"] == [1, 1, 1, 1]
        assert found["added"] and "(2,)" in found["added otherwise"] and "(3,)" in found["added otherwise"]
        assert "frozen parameters have taken 2 steps" in found["frozen"]
        assert "would round weights" in found["float32 in bf16"] and "would round weights" in found["24 bits in bf16"]
        assert "a gradient scaler skips a worker's step" in found["scaler"]
    assert results[0]["refusals"]["finite"] and not results[1]["refusals"]["finite"]
