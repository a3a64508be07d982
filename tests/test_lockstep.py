"""Lockstep: any model's own loop over layers, halted at each, gives what it gives unhalted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmq.quantize.family import Group
from mmq.quantize.gather import collect_grams
from mmq.quantize.lockstep import Call, Lockstep
from mmq.quantize.pull import drift_of


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, *, shift: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden)) + shift


class Model(nn.Module):
    """A loop with a quirk that differs layer by layer, as real models have."""

    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor, *, rounds: int = 1) -> Tensor:
        for _ in range(rounds):
            for i, layer in enumerate(self.layers):
                x = layer(x, shift=torch.full_like(x, 0.1 * i))
                if i == 0:
                    x = x * 1.5
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def test_same_as_unhalted(model: Model) -> None:
    xs = [torch.randn(1, n, 8) for n in (3, 5, 2)]
    expected = [model(x) for x in xs]
    met = []
    with Lockstep(model.layers, [lambda x=x: model(x) for x in xs]) as steps:
        for stop in steps:
            met.append((stop.index, [c.hidden.shape[1] for c in stop.calls]))
            stop.advance()
    assert met == [(i, [3, 5, 2]) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(steps.results, expected, strict=True))
    assert torch.equal(model(xs[0]), expected[0])  # the model's own forward is back


def test_inputs_that_are_the_hidden_states_outlive_their_parking(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear reads what the layer is given, with no norm between, as in OLMo 2. What goes back to the host is
    spoilt here, as memory is that is given to others; a GPU does it in earnest."""

    def park(call: Call) -> None:
        call.parked = call.hidden.clone()
        call.hidden.fill_(float("nan"))

    def unpark(call: Call) -> None:
        if call.parked is not None:
            call.hidden.copy_(call.parked)

    monkeypatch.setattr(Call, "park", park)
    monkeypatch.setattr(Call, "unpark", unpark)
    x, y = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    group = Group(("linear",), None)
    calls = [lambda x=x: model(x.clone()) for x in (x, y)]
    with Lockstep(model.layers, calls, park=True) as steps:
        stop = next(iter(steps))
        (gram,) = collect_grams(stop, (group,))[0].values()
        now = dict(stop.layer.named_parameters())
        drift = drift_of(stop, [(stop.calls[0], stop.calls[1])], group, now=now, original=now, columns=None)
        stop.calls.clear()
    assert drift is not None
    h, c = drift
    both = torch.cat([x[0], y[0]])
    torch.testing.assert_close(gram, both.T @ both / 12)
    torch.testing.assert_close(h, x[0].T @ x[0] / 6)
    torch.testing.assert_close(c, (y - x)[0].T @ x[0] / 6)


def test_calls_of_different_length(model: Model) -> None:
    """Some answers end before others, as under `generate`."""
    x = torch.randn(1, 2, 8)
    rounds = (1, 3, 2)
    expected = [model(x, rounds=n) for n in rounds]
    with Lockstep(model.layers, [lambda n=n: model(x, rounds=n) for n in rounds]) as steps:
        counts = []
        for stop in steps:
            counts.append(len(stop.calls))
            stop.advance()
    assert counts == [3] * 3 + [2] * 3 + [1] * 3
    assert all(torch.equal(a, b) for a, b in zip(steps.results, expected, strict=True))


def test_a_changed_layer_is_felt_by_later_ones(model: Model) -> None:
    x = torch.randn(1, 2, 8)
    other = Model().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    other.get_parameter("layers.1.linear.weight").zero_()
    with Lockstep(model.layers, [lambda: model(x)]) as steps:
        for stop in steps:
            if stop.index == 1:
                stop.layer.linear.weight.zero_()
            stop.advance()
    assert torch.equal(steps.results[0], other(x))


def test_leaving_early_ends_the_calls(model: Model) -> None:
    ended = []

    def call() -> Tensor:
        try:
            return model(torch.zeros(1, 1, 8))
        finally:
            ended.append(True)

    with Lockstep(model.layers, [call, call]) as steps:
        next(iter(steps))
    assert ended == [True, True]
    assert "forward" not in vars(model.layers[0])


def test_an_error_in_a_call_is_the_callers(model: Model) -> None:
    def broken() -> Tensor:
        model(torch.zeros(1, 1, 8))
        raise ValueError("broken sample")

    def walk() -> None:
        with Lockstep(model.layers, [broken]) as steps:
            for stop in steps:
                stop.advance()

    with pytest.raises(ValueError, match="broken sample"):
        walk()
    assert "forward" not in vars(model.layers[0])


def test_a_stop_must_advance(model: Model) -> None:
    with (
        pytest.raises(RuntimeError, match="without advance"),
        Lockstep(model.layers, [lambda: model(torch.zeros(1, 1, 8))]) as steps,
    ):
        list(steps)
