"""What compressed layers share: canonical tensors to the outside, the device's layout inside.

A layer's parameters are either canonical (the storage of `llmq/formats`, which `state_dict`,
pickling and other devices see) or in the layout that the kernel of its device wants; it holds one
of the two, never both, and a tensor's number of dimensions tells which.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from llmq.formats.activation import SMALLEST
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

_FLOAT32_TENSORS = ("weight_scale", "weight_codebook", "input_scale")

# A tied pair shares its Parameters; pickled, both must find the same canonical twin of each.
_twins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """Return `tensor` as a Parameter that takes no gradient."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast asks for on its device, as nn.Linear would."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def wrong_width(op: str, x: Tensor, K: int) -> ValueError:
    """Return the error of inputs x that are not [..., K].

    Layers check it: panels, filled up to whole blocks, do not tell an op how many inputs there are.
    """
    got = x.shape[-1] if x.dim() else "a scalar"
    return ValueError(f"llmq.{op}: expected {K} input features, got {got}")


def call(op: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """Return op(x, …), below autograd where no gradient is wanted.

    Asking autograd costs some 4 us of Python a call, as much as all else around a small layer.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():  # as torch.library does it
        return op(x, *arguments)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's `Conv1D`: a linear layer with weight [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [N, K] and bias [N] or None of a `Linear`, or of a `Conv1D` as in GPT-2.

    Raises:
        TypeError: if `linear` is neither.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if is_conv1d(linear):
        conv1d: Any = linear
        return conv1d.weight.detach().T.contiguous(), conv1d.bias.detach()
    raise TypeError(f"expected nn.Linear or transformers' Conv1D, got {type(linear).__name__}")


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight [N, K] that a linear layer, compressed or not, stands for."""
    return layer.dequantize() if isinstance(layer, CompressedLayer) else linear_weight(layer)[0]


def linear_bytes(linear: nn.Module) -> int:
    """Return the bytes of the weight and bias of what `linear_weight` takes."""
    return sum(t.numel() * t.element_size() for t in linear_weight(linear) if t is not None)


def input_scale_of(
    scheme: Scheme | None, given: Tensor | float | None, device: torch.device
) -> dict[str, Tensor]:
    """Return the tensor `input_scale`, float32 [1], of a layer of `scheme`; none if dynamic.

    Raises:
        ValueError: if a scheme with static activations is given no scale, another scheme is given
            one, or the scale is not finite and above 1e-30.
    """
    if scheme is None or scheme.activations != "static":
        if given is not None:
            name = "a layer without a scheme" if scheme is None else scheme.name
            raise ValueError(f"input_scale goes with static activations, not with {name}")
        return {}
    if given is None:
        raise ValueError(
            f"{scheme.name} needs input_scale, the step of its inputs' codes; "
            f"llmq.quantize(model, scheme={scheme.name!r}, data=...) measures it"
        )
    scale = torch.as_tensor(given, dtype=torch.float32, device=device).reshape(-1)
    if scale.numel() != 1 or not SMALLEST < float(scale) < float("inf"):
        raise ValueError(f"input_scale must be one finite number above {SMALLEST}, got {given!r}")
    return {"input_scale": scale}


class CompressedLayer(nn.Module):
    """Keeps canonical tensors to the outside and the device's layout inside."""

    _resizable: tuple[str, ...] = ()  # tensors whose first size changes with the mask

    def canonical(self) -> dict[str, Tensor]:
        """Return the canonical tensors by name, as `state_dict` holds them, bias included."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """Return the weight that the canonical tensors stand for."""
        raise NotImplementedError

    def _panels(self) -> dict[str, Tensor] | None:
        """Return the tensors of the device's layout, or None where canonical is what runs."""
        raise NotImplementedError

    def _set(self, tensors: dict[str, Tensor]) -> None:
        """Hold exactly `tensors`; Parameters that stay keep their identity (tied layers)."""
        for name in list(self._parameters):
            if name not in tensors:
                self._parameters[name] = None
        for name, tensor in tensors.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                self._parameters[name] = frozen(tensor)
            elif parameter.data is not tensor:
                parameter.data = tensor

    def _pack(self) -> None:
        packed = self._panels()
        if packed is not None:
            self._set(packed)

    def _unpack(self) -> None:
        self._set(self.canonical())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._unpack()
        exact = {
            name: parameter.data
            for name in _FLOAT32_TENSORS
            if (parameter := self._parameters.get(name)) is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype != torch.float32:  # .to(bfloat16) is for activations, not scales
                parameter.data = before.to(parameter.device)
        self._pack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._unpack()
        for name, parameter in self._parameters.items():
            given = state_dict.get(prefix + name)
            if parameter is None or not isinstance(given, Tensor):
                continue
            # As many rows but other non-zeros: the same layer with another mask.
            other_mask = name in self._resizable and given.shape[1:] == parameter.shape[1:]
            if parameter.is_meta and (other_mask or given.shape == parameter.shape):
                empty = torch.empty(given.shape, dtype=parameter.dtype, device=given.device)
                self._parameters[name] = frozen(empty)
            elif other_mask:
                parameter.data = parameter.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        twins: dict[str, nn.Parameter | None] = dict.fromkeys(self._parameters)
        for name, tensor in self.canonical().items():
            parameter = self._parameters.get(name)
            # A panel of a single group is a view of its canonical twin, but of other shape.
            if (
                parameter is not None
                and parameter.shape == tensor.shape
                and parameter.data_ptr() == tensor.data_ptr()
            ):
                twins[name] = parameter
                continue
            twin = _twins[parameter]() if parameter is not None and parameter in _twins else None
            if twin is None or twin.shape != tensor.shape or not torch.equal(twin, tensor):
                twin = nn.Parameter(tensor, requires_grad=False)
                if parameter is not None:
                    _twins[parameter] = weakref.ref(twin)
            twins[name] = twin
        state["_parameters"] = twins
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()

    def bytes(self) -> int:
        """Bytes of the canonical tensors: what the layer takes in a checkpoint."""
        return sum(t.numel() * t.element_size() for t in self.canonical().values())
