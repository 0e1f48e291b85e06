"""transformers' cache layers, appending in place where `DynamicLayer` copies all that it has."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_SPARE = 64  # tokens of room beyond what is asked for, or a quarter of it if that is more


class _Room:
    """Buffers [B, heads, room, D]; `filled` tokens of them have been written, each once.

    Views of the buffers that were given out stay as they are: a cache that was cropped or copied,
    and so would write a place anew, moves to buffers of its own.
    """

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        self.keys = keys
        self.values = values
        self.filled = filled


def growing(layer: Any) -> Any:
    """Return `layer` as one that grows in place from now on; None if it is of an unknown class.

    A layer with a sliding window grows until the window is full (`fits`).
    """
    kind = type(layer)
    if hasattr(kind, "extend"):
        return layer
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
        return None
    state = layer.__dict__
    state["_keys"], state["_values"] = state.pop("keys", None), state.pop("values", None)
    state["_room"], state["_length"] = None, 0
    layer.__class__ = _growing_kind(kind)  # type: ignore[arg-type]
    return layer


@functools.cache
def _growing_kind(kind: Any) -> Any:
    class GrowingLayer(kind):  # type: ignore[misc]
        """Has room to grow; `keys` and `values` are views of what is filled."""

        _room: _Room | None
        _length: int

        @property
        def keys(self) -> Any:
            room = self._room
            return self._keys if room is None else room.keys[:, :, : self._length]

        @keys.setter
        def keys(self, tensor: Any) -> None:
            self._leave()
            self._keys = tensor

        @property
        def values(self) -> Any:
            room = self._room
            return self._values if room is None else room.values[:, :, : self._length]

        @values.setter
        def values(self, tensor: Any) -> None:
            self._leave()
            self._values = tensor

        def _leave(self) -> None:
            """Hold plain tensors from now on."""
            if self._room is not None:
                self._keys, self._values, self._room = self.keys, self.values, None

        def get_seq_length(self) -> int:
            if self._room is not None:
                return self._length
            length: int = super().get_seq_length()
            return length

        def fits(self, tokens: int) -> bool:
            """Whether `tokens` more make no other token leave the cache."""
            if not self.is_sliding:
                return True
            return not self.record_past and self.get_seq_length() + tokens < self.sliding_window

        def extend(self, tokens: int, like: Tensor, heads: int, D: int) -> tuple[Any, Any, int]:
            """Count `tokens` more as filled; return both buffers and where the tokens are to go.

            Args:
                tokens: that the caller writes.
                like: [B, …] a tensor of the cache's batch size, dtype and device.
                heads: of keys and values.
                D: their size.

            Raises:
                ValueError: if the cache holds tokens of another shape or dtype.
            """
            start, room = self.get_seq_length(), self._room
            if room is None or room.filled != start or room.keys.shape[2] < start + tokens:
                held = (self.keys, self.values) if start else None
                shape = (like.shape[0], heads, start, D)
                if any(t.shape != shape or t.dtype != like.dtype for t in held or ()):
                    raise ValueError(f"the cache holds no {like.dtype} {list(shape)}")
                size = start + tokens + max(_SPARE, (start + tokens) // 4)
                keys = like.new_empty(like.shape[0], heads, size, D)
                values = torch.empty_like(keys)
                if held:
                    keys[:, :, :start], values[:, :, :start] = held
                self._keys = self._values = None
                self._room = room = _Room(keys, values, start)
                self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
            self._length = room.filled = start + tokens
            if self.is_sliding:
                self.cumulative_length = start + tokens
            return room.keys, room.values, start

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            # What other code appends is copied out, as the base class does, with its checks.
            self._leave()
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return updated

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Copy and pickle as the plain layer, which anybody can load."""
            hidden = ("_room", "_length", "_keys", "_values")
            state = {name: v for name, v in self.__dict__.items() if name not in hidden}
            state.update(keys=_own(self.keys), values=_own(self.values))
            return _blank, (kind,), state

    return GrowingLayer


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)
