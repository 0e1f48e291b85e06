"""What a weight becomes: `Scheme` (how its values are coded), `Pattern` (which of them stay)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

Granularity = Literal["tensor", "channel", "group"]
Method = Literal["uniform", "quantile"]
Kind = Literal["unstructured", "2:4", "block", "structured", "layers"]


@dataclass(frozen=True)
class Scheme:
    """How the weight [N, K] of a linear layer, and its input, are coded.

        >>> llmq.Scheme(bits=4, granularity="group", group_size=32, symmetric=False).name
        'w4a16-g32'

    Args:
        bits: bits of one weight code, 8 or 4.
        method: `"uniform"` (evenly spaced levels) or `"quantile"` (a codebook fitted to weights).
        granularity: what shares one scale: the `"tensor"`, an output `"channel"` (a row of K), or
            a `"group"` of `group_size` consecutive inputs of one row.
        group_size: inputs that share one weight scale; only with granularity `"group"`.
        symmetric: whether code 0 stands for weight 0 at the middle of the range; False adds a zero
            point to each scale (uniform only).
        activations: None leaves inputs in floating point; `"dynamic"` codes each token to int8 at
            run time; `"static"` uses one scale for all tokens, measured on calibration
            data, and needs symmetric 8-bit weights by channel or tensor.
        activation_group_size: inputs that share one activation scale; None is the whole token.

    Raises:
        ValueError: if a field is out of its range or two fields contradict each other.
    """

    bits: int = 8
    method: Method = "uniform"
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["dynamic", "static"] | None = None
    activation_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Scheme.bits must be 8 or 4, got {self.bits!r}")
        if self.method not in ("uniform", "quantile"):
            raise ValueError(f'Scheme.method must be "uniform" or "quantile", got {self.method!r}')
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(
                f'Scheme.granularity must be "tensor", "channel" or "group", '
                f"got {self.granularity!r}"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f'Scheme: granularity="group" needs a group_size, and no other takes one, got '
                f"granularity={self.granularity!r}, group_size={self.group_size!r}"
            )
        for name in ("group_size", "activation_group_size"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"Scheme.{name} must be a positive integer or None, got {size!r}")
        if self.activations not in (None, "dynamic", "static"):
            raise ValueError(
                f'Scheme.activations must be None, "dynamic" or "static", got {self.activations!r}'
            )
        if self.activation_group_size is not None and self.activations != "dynamic":
            raise ValueError('Scheme.activation_group_size needs activations="dynamic"')
        if self.method == "quantile" and not self.symmetric:
            raise ValueError("Scheme: a quantile codebook has no zero point; use symmetric=True")
        if self.method == "quantile" and self.activations is not None:
            raise ValueError("Scheme: a quantile codebook takes floating-point activations only")
        if self.activations == "static" and self.op != "int8_linear":
            raise ValueError(
                "Scheme: static activations need symmetric 8-bit weights by channel or tensor"
            )
        sizes = (self.group_size, self.activation_group_size)
        if None not in sizes and sizes[0] != sizes[1] and self.activations is not None:
            group, activation_group = (int(s) for s in sizes if s is not None)
            if max(group, activation_group) % min(group, activation_group):
                raise ValueError(
                    f"Scheme: one of group_size={group} and "
                    f"activation_group_size={activation_group} must divide the other"
                )

    @property
    def op(self) -> str:
        """Name of the op in `torch.ops.llmq` that computes a dense layer of this scheme."""
        if self.method == "quantile":
            return "codebook_linear"
        if (
            self.bits == 8
            and self.symmetric
            and self.granularity != "group"
            and self.activations is not None
        ):
            return "int8_linear"
        return "weight_only_linear"

    @property
    def name(self) -> str:
        """The preset's name where one matches, else a description of the same form."""
        for name, scheme in PRESETS.items():
            if scheme == self:
                return name
        parts = [f"w{self.bits}a{8 if self.activations else 16}"]
        if self.method == "quantile":
            parts.append("quantile")
        if self.granularity == "tensor":
            parts.append("tensor")
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        if self.symmetric != (self.bits == 8 or self.method == "quantile"):
            parts.append("sym" if self.symmetric else "asym")
        if self.activation_group_size is not None:
            parts.append(f"ag{self.activation_group_size}")
        if self.activations == "static":
            parts.append("static")
        return "-".join(parts)

    def check_fits(self, out_features: int, in_features: int, name: str = "weight") -> None:
        """Raise `ValueError` if a group size does not divide the K of weight `name` [N, K]."""
        for field in ("group_size", "activation_group_size"):
            size = getattr(self, field)
            if size is not None and in_features % size:
                fitting = [g for g in (128, 64, 32, 16, 8, 4, 2) if in_features % g == 0]
                would_do = f"one of {fitting}" if fitting else 'granularity="channel"'
                raise ValueError(
                    f"{name}: {field}={size} does not divide its {in_features} inputs "
                    f"(weight is [{out_features}, {in_features}]); use {would_do}"
                )


def _presets() -> dict[str, Scheme]:
    presets = {
        "w8a8": Scheme(activations="dynamic"),
        "w8a8-g64": Scheme(activations="dynamic", activation_group_size=64),
        "w8a8-static": Scheme(activations="static"),
        "w8a16": Scheme(),
        "w8a16-quantile": Scheme(method="quantile"),
    }
    for g in (32, 64, 128):
        group = Scheme(bits=4, granularity="group", group_size=g, symmetric=False)
        presets[f"w4a16-g{g}"] = group
        presets[f"w4a8-g{g}"] = replace(group, activations="dynamic", activation_group_size=g)
        presets[f"w4a16-quantile-g{g}"] = replace(group, method="quantile", symmetric=True)
    return presets


PRESETS: dict[str, Scheme] = _presets()


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """Return the `Scheme` that a preset name stands for, or the scheme itself.

    Raises:
        ValueError: if the name is no preset.
        TypeError: if `scheme` is neither a string nor a `Scheme`.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(
            f"scheme must be a llmq.Scheme or a preset name, got {type(scheme).__name__}"
        )
    if scheme not in PRESETS:
        raise ValueError(f"unknown scheme {scheme!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[scheme]


@dataclass(frozen=True)
class Pattern:
    """Which weights may be zero: `kind`, and for `"block"` the block's rows × columns."""

    kind: Kind
    block: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The string that `parse_pattern` reads back."""
        return f"block-{self.block[0]}x{self.block[1]}" if self.block else self.kind


DEFAULT_BLOCK = (32, 32)


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """Read `"unstructured"`, `"2:4"`, `"block"` (32×32), `"block-RxC"`, `"structured"`, `"layers"`.

    Raises:
        ValueError: if the string is none of these.
        TypeError: if `pattern` is no string.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string, got {type(pattern).__name__}")
    if pattern in ("unstructured", "2:4", "structured", "layers"):
        return Pattern(cast(Kind, pattern))
    if pattern == "block":
        return Pattern("block", DEFAULT_BLOCK)
    match = re.fullmatch(r"block-([1-9]\d*)x([1-9]\d*)", pattern)
    if match:
        return Pattern("block", (int(match[1]), int(match[2])))
    raise ValueError(
        f"unknown pattern {pattern!r}; use 'unstructured', '2:4', 'block', 'block-RxC' "
        f"(R rows by C columns), 'structured' or 'layers'"
    )
