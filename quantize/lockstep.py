"""Many forward passes, halted together at every decoder layer.

Each call runs in a greenlet of its own, through the model's own code: its loop over layers, its masks, its position
embeddings, whatever it passes along. A decoder layer's forward is replaced by a halt, so that when all calls stand
before layer i, that one layer can be loaded, measured, changed and run for all of them, and let go. One layer in memory
serves every sample, whatever the model class; `generate` works the same way, one round of layers a token.

Knows nothing of weights, files or methods. Greenlets and not threads: all run on one thread, so torch keeps one
pool of workers and one gradient mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn


class Seen(Exception):
    """A forward pass has come to what was wanted of it, and need not go on: raise it in a hook under `Stop.look`."""


@dataclass
class Call:
    """One sample halted before a decoder layer: what that layer is being called with."""

    number: int  # which of the calls given to Lockstep
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    thread: greenlet = field(repr=False)
    parked: Tensor | None = field(default=None, repr=False)  # the hidden states while they are on the host

    @property
    def hidden(self) -> Tensor:
        """The hidden states going into the layer, [1, tokens, hidden]."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def park(self) -> None:
        """Move the hidden states to the host. The tensor stays what the model's frames hold; its memory is given back.
        A tensor that shares its memory with others stays where it is."""
        hidden = self.hidden
        memory = hidden.untyped_storage()
        if not hidden.is_cuda or memory.nbytes() != hidden.numel() * hidden.element_size():
            return
        if self.parked is None:
            self.parked = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            self.parked.copy_(hidden)
        memory.resize_(0)

    def unpark(self) -> None:
        """Bring the hidden states back, if they are away."""
        if self.parked is not None:
            memory = self.hidden.untyped_storage()
            if not memory.nbytes():
                memory.resize_(self.parked.numel() * self.parked.element_size())
                self.hidden.copy_(self.parked, non_blocking=True)

    def kept(self, x: Tensor) -> Tensor:
        """`x` to be read after the layer has run: a copy where it lies in hidden states that go back to the host, as
        the inputs of a linear do that no norm stands before."""
        away = self.parked is not None and x.untyped_storage().data_ptr() == self.hidden.untyped_storage().data_ptr()
        return x.clone() if away else x


@dataclass
class Stop:
    """All calls stand before layer `index`. Load the layer, look at `calls`, then `advance()`."""

    index: int
    layer: nn.Module
    calls: list[Call]
    _forward: Callable[..., Any] = field(repr=False)
    _resume: Callable[[Stop, Callable[[Call], None]], None] = field(repr=False)

    def run(self, call: Call) -> Any:
        """What the layer makes of one call, which stays where it is."""
        call.unpark()
        out = self._forward(*call.args, **call.kwargs)
        if call.parked is not None:
            call.park()
        return out

    def look(self, call: Call) -> None:
        """Run the layer for one call, for its hooks' sake, until one of them raises Seen."""
        try:
            self.run(call)
        except Seen:
            if call.parked is not None:
                call.park()

    def advance(self, before: Callable[[Call], None] = lambda call: None) -> None:
        """Run the layer for every call and let each go on to its next halt or its end; `before` each is called."""
        self._resume(self, before)


class Lockstep:
    """Iterate to meet each Stop in turn; afterwards `results[i]` is what call i returned.

    Use as a context manager: on the way out the layers' own forwards are put back and unfinished calls are ended.
    """

    def __init__(self, layers: nn.ModuleList, calls: Iterable[Callable[[], Any]], *, park: bool = False):
        """`calls` is asked for the next one when the last has come to its first halt. With `park` the hidden states of
        a halted call wait on the host, which takes a copy each way a layer."""
        self.layers = layers
        self._park = park
        self.results: list[Any] = []
        self._calls = calls
        self._halted: dict[int, list[Call]] = {}
        self._threads: list[greenlet] = []
        self._forwards: list[Callable[..., Any]] = []

    def __enter__(self) -> Lockstep:
        for index, layer in enumerate(self.layers):
            self._forwards.append(layer.forward)
            layer.forward = _halt(index)
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            if thread and not thread.dead:
                thread.throw()  # GreenletExit unwinds the sample's own frames
        self._halted.clear()
        for layer in self.layers:
            del layer.forward  # the instance attribute; the class's method shows again

    def __iter__(self) -> Iterator[Stop]:
        for number, call in enumerate(self._calls):
            thread = greenlet(call)
            self.results.append(None)
            self._threads.append(thread)
            self._record(number, thread, thread.switch())
        while self._halted:
            index = min(self._halted) if len(self._halted) == 1 else self._only()
            stop = Stop(index, self.layers[index], self._halted.pop(index), self._forwards[index], self._advance)
            yield stop
            if stop.calls:
                raise RuntimeError(f"layer {index} was left without advance()")

    def _only(self) -> int:
        raise RuntimeError(f"samples stand before different layers: {sorted(self._halted)}")

    def _advance(self, stop: Stop, before: Callable[[Call], None]) -> None:
        calls, stop.calls = stop.calls, []
        calls.reverse()
        while calls:
            call = calls.pop()  # drop our hold on its inputs before the next one runs
            before(call)
            out = stop.run(call)
            thread, number = call.thread, call.number
            del call
            self._record(number, thread, thread.switch(out))
            del out

    def _record(self, number: int, thread: greenlet, value: Any) -> None:
        if thread.dead:
            self.results[number] = value
        else:
            index, args, kwargs = value
            call = Call(number, args, kwargs, thread)
            if self._park:
                call.park()
            self._halted.setdefault(index, []).append(call)


def _halt(index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        parent = greenlet.getcurrent().parent
        assert parent is not None, "a decoder layer ran outside Lockstep"
        return parent.switch((index, args, kwargs))

    return forward
