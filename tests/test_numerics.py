"""Numbers that break quantizers: dead, constant and outlying channels, what is not finite, Gram matrices without a
factor, experts that nobody asked. Each by itself, through every method and quality."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import vlm
from torch import Tensor, nn

from mmq.export.artifact import open_artifact
from mmq.export.make import make
from mmq.export.view import view
from mmq.quantize import awq, gptq
from mmq.quantize.family import LLAMA, Group
from mmq.quantize.gather import collect_grams
from mmq.quantize.grid import Grid, Quantized, dequantize, quantize
from mmq.quantize.lockstep import Lockstep, Stop
from mmq.quantize.method import Problem, Solution, output_squares, restored
from mmq.quantize.pull import drift_of
from mmq.quantize.steps import STEPS, UNREACHED, solve
from mmq.recipes.calibration import drawn
from mmq.recipes.hub import fetch
from mmq.recipes.progress import Step
from mmq.recipes.recipe import Recipe

WIDTH, TOKENS, HEAD = 256, 1024, 64
ATTENTION, OUT = LLAMA[0], LLAMA[1]  # q, k, v behind a norm; o behind v
EVERY = pytest.mark.parametrize("asked", STEPS, ids="-".join)


@dataclasses.dataclass
class Case:
    """Attention's four linears, the norm before them, and what they are fed: `x` before the norm's weight, `y` by o."""

    weights: dict[str, Tensor]
    x: Tensor
    y: Tensor

    def fed(self) -> Tensor:
        return self.x * self.weights["input_layernorm.weight"]

    def grams(self) -> dict[Group, Tensor]:
        return {g: x.T @ x / len(x) for g, x in ((ATTENTION, self.fed()), (OUT, self.y))}

    def problem(self, *, stored: torch.dtype = torch.bfloat16) -> Problem:
        return Problem(self.weights, (ATTENTION, OUT), self.grams(), stored, HEAD)


@pytest.fixture
def case() -> Case:
    """Trained-like: energies and weights that differ from channel to channel, correlated inputs."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    heights = {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "o_proj": WIDTH}
    weights = {f"self_attn.{n}.weight": 0.05 * normal(h, WIDTH).bfloat16().float() for n, h in heights.items()}
    weights["self_attn.v_proj.bias"] = normal(WIDTH // 2)
    weights["input_layernorm.weight"] = (1 + 0.2 * normal(WIDTH)).bfloat16().float()
    mixing = torch.eye(WIDTH) + 0.3 * normal(WIDTH, WIDTH) / WIDTH**0.5
    energy = torch.exp(0.7 * normal(WIDTH))
    x, y = (normal(TOKENS, WIDTH) @ mixing * energy for _ in range(2))
    return Case(weights, x, y)


def outputs(case: Case, solution: Solution | None = None) -> dict[str, Tensor]:
    """What q and k put out, and o after v's scale: of the original weights, or of what a solution stands for."""
    weights = dict(case.weights)
    undone = torch.ones(WIDTH // 2)
    if solution is not None:
        weights |= solution.changed
        weights |= {f"{n}.weight": restored(q) for n, q in solution.quantized.items()}
        if "self_attn.v_proj.bias" in solution.changed:  # v / s comes in, o * s goes on
            undone = case.weights["self_attn.v_proj.bias"] / solution.changed["self_attn.v_proj.bias"]
    heads = undone.view(-1, HEAD).repeat_interleave(2, 0).flatten()
    fed = case.x * weights["input_layernorm.weight"]
    made = {n: fed @ weights[f"self_attn.{n}.weight"].T for n in ("q_proj", "k_proj")}
    return made | {"o_proj": (case.y / heads) @ weights["self_attn.o_proj.weight"].T}


def check(case: Case, solution: Solution, *, grid: Grid, limit: float = 0.02) -> None:
    """Every number finite, every output near its original, and no linear further from it than plain rounding is."""
    grams = case.grams()
    for group in (ATTENTION, OUT):
        for name in group.linears:
            q = solution.quantized[name]
            assert isinstance(q, Quantized)
            assert q.scale.isfinite().all()
            assert int(q.q.max()) <= 15
            weight = case.weights[f"{name}.weight"]
            before = float(output_squares(weight, grams[group]).sum())
            plain = float(output_squares(dequantize(quantize(weight, grid)) - weight, grams[group]).sum())
            assert solution.errors[name] <= 1.001 * plain / max(before, 1e-30) + 1e-9
    assert all(t.isfinite().all() for t in solution.changed.values())
    want, got = outputs(case), outputs(case, solution)
    for name, out in want.items():
        loss = float((got[name] - out).square().sum() / out.square().sum().clamp_min(1e-30))
        assert loss <= limit, (name, loss)
        assert loss == pytest.approx(solution.errors[f"self_attn.{name}"], rel=0.1, abs=2e-5)  # as it says itself


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_ordinary_layer(case: Case, asked: tuple[str, str], dtype: torch.dtype) -> None:
    grid = Grid(128, scale_dtype=dtype)
    solution = solve(case.problem(stored=dtype), grid, STEPS[asked])
    check(case, solution, grid=grid)
    assert not solution.fallbacks


@EVERY
def test_a_dead_channel(case: Case, asked: tuple[str, str]) -> None:
    """Channels whose input is always 0, a whole group of them among them."""
    case.x[:, :130] = 0
    case.y[:, 5] = 0
    solution = solve(case.problem(), Grid(), STEPS[asked])
    check(case, solution, grid=Grid())
    q = solution.quantized["self_attn.q_proj"]
    assert isinstance(q, Quantized)
    assert float(restored(q)[:, :128].norm()) > 0  # dead on these samples only


@EVERY
def test_a_column_of_zeros(case: Case, asked: tuple[str, str]) -> None:
    case.weights["self_attn.q_proj.weight"][:, 7] = 0
    case.weights["self_attn.o_proj.weight"][:, 128:] = 0
    case.weights["self_attn.k_proj.weight"][3] = 0
    solution = solve(case.problem(), Grid(), STEPS[asked])
    check(case, solution, grid=Grid())
    assert not restored(solution.quantized["self_attn.k_proj"])[3].any()


@EVERY
def test_a_norm_weight_of_zero(case: Case, asked: tuple[str, str]) -> None:
    case.weights["input_layernorm.weight"][[0, 200]] = 0
    solution = solve(case.problem(), Grid(), STEPS[asked])
    check(case, solution, grid=Grid())
    changed = solution.changed.get("input_layernorm.weight")
    if STEPS[asked].scale:
        assert changed is not None
        assert changed[[0, 200]].tolist() == [0, 0]


@EVERY
def test_constant_channels(case: Case, asked: tuple[str, str]) -> None:
    """Channels that say the same for every token: their rows of H are multiples of each other."""
    case.x[:, 10:40] = 3.0
    case.y[:, :64] = -0.5
    check(case, solve(case.problem(), Grid(), STEPS[asked]), grid=Grid())


@EVERY
@pytest.mark.parametrize("symmetric", [False, True])
def test_channels_with_outliers_of_1e4(case: Case, asked: tuple[str, str], symmetric: bool) -> None:
    """Two channels ten thousand times the others, as real models have behind their first norm."""
    case.x[:, [3, 150]] *= 1e4
    case.y[:, 77] *= 1e4
    grid = Grid(128, symmetric)
    solution = solve(case.problem(), grid, STEPS[asked])
    check(case, solution, grid=grid)
    if STEPS[asked].scale:  # the outliers' columns get a finer grid
        plain = solve(case.problem(), grid, STEPS["rtn", "default"])
        assert all(solution.errors[n] < 0.5 * plain.errors[n] for n in solution.errors)


@EVERY
def test_fewer_tokens_than_channels(case: Case, asked: tuple[str, str]) -> None:
    """H of rank 20: not positive definite."""
    few = dataclasses.replace(case, x=case.x[:20], y=case.y[:20])
    check(few, solve(few.problem(), Grid(), STEPS[asked]), grid=Grid())


@EVERY
def test_duplicated_channels(case: Case, asked: tuple[str, str]) -> None:
    case.x[:, 128:] = case.x[:, :128]
    case.y[:] = case.y[:, :1]
    check(case, solve(case.problem(), Grid(), STEPS[asked]), grid=Grid())


@EVERY
def test_all_inputs_zero(case: Case, asked: tuple[str, str]) -> None:
    """An H of zeros says nothing: no weight is moved further than rounding moves it, by its squares."""
    problem = case.problem()
    for gram in problem.grams.values():
        gram.zero_()
    solution = solve(problem, Grid(), STEPS[asked])
    for name, q in solution.quantized.items():
        w = case.weights[f"{name}.weight"]
        assert (restored(q) - w).square().sum() <= (dequantize(quantize(w, Grid())) - w).square().sum()
    assert set(solution.errors.values()) == {0.0}


@pytest.mark.parametrize("asked", [k for k, v in STEPS.items() if v.feedback], ids="-".join)
def test_a_gram_matrix_without_a_factor(case: Case, asked: tuple[str, str]) -> None:
    """Not even damped: no inputs make such an H, but arithmetic might. No error feedback then, and it is said."""
    problem = case.problem()
    problem.grams[ATTENTION] -= 5 * problem.grams[ATTENTION].diagonal().mean() * torch.eye(WIDTH)
    solution = solve(problem, Grid(), STEPS[asked])
    assert {n: "no Cholesky factor" in why for n, why in solution.fallbacks.items()} == dict.fromkeys(
        ATTENTION.linears, True
    )
    for name in ATTENTION.linears:
        assert restored(solution.quantized[name]).isfinite().all()


@pytest.mark.parametrize("asked", [k for k, v in STEPS.items() if v.feedback], ids="-".join)
def test_a_linear_that_error_feedback_made_worse(
    case: Case, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, str]
) -> None:
    """Feedback with its signs the wrong way round loses more than rounding does: rounding is taken, and it is said."""
    true_feedback = gptq.feedback

    def reversed_feedback(gram: Tensor, order: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        follow, pivots = true_feedback(gram, order, *args, **options)
        return 2 * torch.eye(len(gram)) - follow, pivots

    monkeypatch.setattr(gptq, "feedback", reversed_feedback)
    solution = solve(case.problem(), Grid(), STEPS[asked])
    check(case, solution, grid=Grid())
    assert set(solution.fallbacks) == {n for g in (ATTENTION, OUT) for n in g.linears}
    assert all("the search lost" in why for why in solution.fallbacks.values())


@EVERY
def test_an_expert_that_no_token_reached(case: Case, asked: tuple[str, str]) -> None:
    """No H at all for q, k and v: rounded to nearest, no scale moved into their norm, and listed."""
    problem = case.problem()
    del problem.grams[ATTENTION]
    solution = solve(problem, Grid(), STEPS[asked])
    assert solution.fallbacks == dict.fromkeys(ATTENTION.linears, UNREACHED)
    assert "input_layernorm.weight" not in solution.changed
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        weight = case.weights[f"{name}.weight"]
        plain = dequantize(quantize(weight, Grid()))
        assert torch.equal(restored(solution.quantized[name]), plain)
        want = float((plain - weight).square().sum() / weight.square().sum())
        assert solution.errors[name] == pytest.approx(want, rel=1e-4)


def test_scales_stay_inside_float16(case: Case) -> None:
    """A norm and a bias near the ends of float16's range take no scale that would carry them over."""
    case.weights["input_layernorm.weight"][:64] = 60000.0
    case.weights["input_layernorm.weight"][64:128] = 6e-8
    case.x[:, :128] /= case.weights["input_layernorm.weight"][:128]
    case.weights["self_attn.v_proj.bias"][5] = 65000.0
    case.y[:, 64:] *= torch.linspace(0.01, 3, WIDTH - 64)
    problem = case.problem(stored=torch.float16)
    moved = awq.scale(problem, Grid(scale_dtype=torch.float16))
    folded = moved.changed["input_layernorm.weight"]
    assert torch.equal(folded, folded.half().float())
    assert folded.isfinite().all()
    assert (folded != 0).all()
    before = case.weights["input_layernorm.weight"]
    torch.testing.assert_close(folded * moved.columns["self_attn.q_proj"], before, rtol=1e-6, atol=0)
    assert "self_attn.v_proj" not in moved.rows
    assert "self_attn.o_proj" not in moved.columns


def test_a_norms_bias_stays_inside_float16(case: Case) -> None:
    """Where it would leave, its channel takes no scale; the others do."""
    case.weights["input_layernorm.bias"] = torch.full((WIDTH,), 60000.0)
    case.x *= torch.linspace(0.01, 3, WIDTH)
    for asked in (("awq", "fast"), ("awq", "default")):
        solution = solve(case.problem(stored=torch.float16), Grid(scale_dtype=torch.float16), STEPS[asked])
        bias, weight = (solution.changed[f"input_layernorm.{n}"] for n in ("bias", "weight"))
        assert bias.isfinite().all()
        same = weight == case.weights["input_layernorm.weight"]
        assert 20 < int(same.sum()) < WIDTH - 20
        torch.testing.assert_close(
            bias / 60000, weight / case.weights["input_layernorm.weight"], rtol=1e-3, atol=0
        )  # both are divided by one scale


class Experts(nn.Module):
    """A decoder layer with two experts, of which the second is asked for tokens that begin with a large number."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.two = nn.Linear(64, 64)

    def forward(self, hidden: Tensor) -> Tensor:
        asked = hidden[..., 0] > 100
        out = hidden.clone()
        out[~asked] = self.one(hidden[~asked])
        if asked.any():
            out[asked] = self.two(hidden[asked])
        return out


GROUPS = (Group(("one",), None), Group(("two",), None))


def gathered(inputs: list[Tensor], watched: Callable[[Stop], Any]) -> Any:
    """What `watched` makes of a halted layer of experts that is fed `inputs`."""
    torch.manual_seed(0)
    layers = nn.ModuleList([Experts().requires_grad_(False)])
    with Lockstep(layers, [lambda x=x: layers[0](x) for x in inputs]) as steps:
        stop = next(iter(steps))
        found = watched(stop)
        stop.calls.clear()
    return found


def test_an_expert_nobody_asked_has_no_gram_matrix() -> None:
    x = torch.randn(1, 50, 64)
    grams, left_out = gathered([x], lambda stop: collect_grams(stop, GROUPS))
    assert set(grams) == {GROUPS[0]}
    assert left_out == 0
    torch.testing.assert_close(grams[GROUPS[0]], x[0].T @ x[0] / 50)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_tokens_that_are_not_finite_are_left_out(bad: float) -> None:
    """Or whose squares are not. The others count as if those had never been."""
    good, spoilt = torch.randn(1, 50, 64), torch.randn(1, 20, 64)
    spoilt[0, 3:8, 7] = bad
    grams, left_out = gathered([good, spoilt], lambda stop: collect_grams(stop, GROUPS))
    assert left_out == 5
    fine = torch.cat([good[0], spoilt[0, :3], spoilt[0, 8:]])
    torch.testing.assert_close(grams[GROUPS[0]], fine.T @ fine / 65)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", [0, 1])
def test_drift_leaves_out_what_is_not_finite(bad: float, where: int) -> None:
    """In either of the two streams, squares too."""
    streams = [torch.randn(1, 30, 64), torch.randn(1, 30, 64)]
    streams[where][0, 4:7, 9] = bad

    def watched(stop: Stop) -> Any:
        now = dict(stop.layer.named_parameters())
        return drift_of(stop, [(stop.calls[0], stop.calls[1])], GROUPS[0], now=now, original=now, columns=None)

    h, c = gathered(streams, watched)
    x, y = (torch.cat([s[0, :4], s[0, 7:]]) for s in streams)
    torch.testing.assert_close(h, x.T @ x / 27)
    torch.testing.assert_close(c, (y - x).T @ x / 27, rtol=1e-4, atol=1e-5)


def test_nothing_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="the inputs of one in decoder layer 0 are not finite"):
        gathered([torch.full((1, 5, 64), float("nan"))], lambda stop: collect_grams(stop, GROUPS))


def spoil(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_sample_that_is_not_finite(tmp_path: Path, method: str, bad: float) -> None:
    """A word whose embedding is no number, said in one sample: what it spoils is left out, counted and told, and the
    model comes out as well as without that sample."""
    from mmq.recipes.samples import Sample

    checkpoint = vlm("qwen2_vl", tmp_path / "model")
    good = drawn(6)
    odd = "ꙮ"
    ids = fetch_ids(checkpoint, odd)
    used = {i for s in good for i in fetch_ids(checkpoint, s)}
    assert not set(ids) <= used  # bytes that no other sample has

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][[i for i in ids if i not in used]] = bad

    spoil(checkpoint, change)
    messages = [{"role": "user", "content": f"What is {odd}?"}, {"role": "assistant", "content": "A letter."}]
    recipe = Recipe(name="tiny", model=str(checkpoint), method=method, samples=7)
    heard: list[Step] = []
    base = fetch(str(checkpoint))
    made = make(
        recipe, base, tmp_path / "out", samples=[*good, Sample(messages)], calibration="drawn", tell=heard.append
    )
    alone = make(recipe, base, tmp_path / "alone", samples=good, calibration="drawn")
    left_out = [layer["left_out"] for layer in made.manifest["layers"]]
    assert all(0 < n <= 40 for n in left_out)
    assert [layer["left_out"] for layer in alone.manifest["layers"]] == [0, 0, 0]
    assert any(f"{left_out[0]} tokens left out" in s.note for s in heard)
    assert "NaN" not in json.dumps(made.manifest)
    tensors = view(open_artifact(made.path, verify=True).path)
    assert all(tensors.get(name).isfinite().all() for name in tensors.metas if "layers" in name)
    for spoilt, whole in zip(made.manifest["layers"], alone.manifest["layers"], strict=True):
        assert spoilt["errors"] == pytest.approx(whole["errors"], rel=0.25)
        assert spoilt["fallbacks"] == {}


def fetch_ids(checkpoint: Path, said: Any) -> list[int]:
    """The token ids of a text or a sample."""
    from mmq.quantize.inputs import encode
    from mmq.quantize.skeleton import build

    skeleton = build(checkpoint)
    if isinstance(said, str):
        return skeleton.words(said)["input_ids"]
    return encode(skeleton, said)["input_ids"].flatten().tolist()


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    checkpoint = vlm("qwen2_vl", tmp_path / "model")
    spoil(checkpoint, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"][0, :1].fill_(float("nan")))
    recipe = Recipe(name="tiny", model=str(checkpoint), samples=4)
    with pytest.raises(ValueError, match=r"the weights of mlp\.down_proj in decoder layer 1 are not finite"):
        make(recipe, fetch(str(checkpoint)), tmp_path / "out", samples=drawn(4), calibration="drawn")
