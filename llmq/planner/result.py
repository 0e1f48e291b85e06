"""What `llmq.plan` chose: shown as a table, kept as JSON, and applied to the model."""

from __future__ import annotations

import glob
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from llmq.evaluation.sensitivity import Distance
from llmq.models.targets import Found, Target, check_weight, find, swap
from llmq.nn import CompressedLayer, linear_bytes, linear_weight
from llmq.planner.calibrated_layers import CalibratedUnit, Divisions, divisions_of
from llmq.planner.costs import FLOAT, Moments, Option, total_seconds
from llmq.planner.layer_format import make_layer, parse
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.report import Change, attach, relative_error


@dataclass(frozen=True)
class Choice:
    """What one unit becomes: `names` of its layers, the `option` taken, and the `reason`."""

    names: tuple[str, ...]
    title: str
    before: Option
    option: Option
    reason: str


@dataclass
class Plan:
    """What `llmq.plan` chose; `print` shows it as a table, `apply` does it.

    Args:
        choices: one a unit, in the order in which the model runs them.
        bound: what must hold: `"KL"` or `"perplexity"`, and the number.
        measured: on text that had no part in the choice; None if everything was left alone.
        tokens: of the calls whose time was measured.
        tries: whole choices that were measured.
        limits: seconds that the layers were to take at most in one pass, for each of `tokens`.
        validated: what `measured` is, on each further text.
        calibrated: what data made of the units that become calibrated formats, by title.
    """

    choices: list[Choice]
    bound: tuple[str, float]
    measured: Distance | None
    tokens: tuple[int, ...]
    tries: int
    skipped: list[str] = field(default_factory=list)
    limits: tuple[float, ...] = ()
    validated: dict[str, Distance] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict, repr=False)  # of units that become low-rank
    calibrated: dict[str, CalibratedUnit] = field(default_factory=dict, repr=False)

    @property
    def bytes_before(self) -> int:
        """Bytes of the layers' weights and biases as they are."""
        return sum(choice.before.bytes for choice in self.choices)

    @property
    def bytes_after(self) -> int:
        """Bytes of the layers as chosen."""
        return sum(choice.option.bytes for choice in self.choices)

    @property
    def seconds_before(self) -> tuple[float, ...]:
        """Seconds of the layers in one pass of the model as they are, for each of `tokens`."""
        return tuple(total_seconds([choice.before for choice in self.choices]))

    @property
    def seconds_after(self) -> tuple[float, ...]:
        """Seconds of the layers in one pass of the model as chosen, for each of `tokens`."""
        return tuple(total_seconds([choice.option for choice in self.choices]))

    def apply(self, model: nn.Module) -> nn.Module:
        """Compress `model` in place as planned and return it; its report is attached.

        Raises:
            ValueError: if the model's layers are not those that the plan was made for. The model is
                then as it was.
        """
        present = {
            target.name: target
            for group in find(model, (), embeddings=True).groups
            for target in group
        }
        planned = {name for choice in self.choices for name in choice.names}
        if planned - present.keys():
            raise ValueError(
                f"the plan is of another model: it names {min(planned - present.keys())}, which is "
                f"no layer here that can be compressed"
            )
        for name in planned:
            check_target(present[name])
        before = [
            (parent, attribute, child)
            for parent in model.modules()
            for attribute, child in parent._modules.items()
        ]
        try:
            self._apply(model, present)
        except BaseException:
            for parent, attribute, child in before:
                parent._modules[attribute] = child
            raise
        return model

    def _apply(self, model: nn.Module, present: dict[str, Target]) -> None:
        # What scales divide comes first, so that all formats are made of what is divided already.
        divisions = divisions_of(self.calibrated.values())
        for writer, division in divisions.items():
            target = present.get(writer) or division.target(model)
            divided = replace(target, module=division.of(target.module))
            swap(model, Found(), [(target, divided.module)])
            present = {**present, writer: divided}
        formats = {choice.option.format for choice in self.choices} - {FLOAT}
        factored: set[str] = set()
        for name in sorted(formats, key=lambda name: not parse(name).low_rank):
            taken = {n for c in self.choices if c.option.format == name for n in c.names}
            wanted = parse(name)
            if wanted.low_rank:
                self._factor(model, name, {n: present[n] for n in sorted(taken)})
                factored |= taken
                continue
            if wanted.calibrated:
                self._place(model, name, present, divisions)
                continue
            # As shell patterns, which name one layer and nothing inside or outside of it.
            skip = tuple(f"[{n[0]}]{glob.escape(n[1:])}" for n in present.keys() - taken)
            skip += tuple(f"[{n[0]}]{glob.escape(n[1:])}.*" for n in factored)
            if wanted.sparse:
                prune(model, wanted.sparse, skip=skip)
            if wanted.scheme is not None:
                quantize(model, scheme=wanted.scheme, skip=skip)

    def _factor(self, model: nn.Module, format_: str, targets: dict[str, Target]) -> None:
        titles = {name: choice.title for choice in self.choices for name in choice.names}
        changes: dict[str, Change] = {}
        for name, target in targets.items():
            layer = make_layer(target.module, format_, self.moments[titles[name]])
            weight, size = linear_weight(target.module)[0], linear_bytes(target.module)
            swap(model, Found(), [(target, layer)])
            error = relative_error(weight, layer.dequantize())
            changes[f"{name}.down"] = Change("low-rank", None, 0)
            changes[f"{name}.up"] = Change("low-rank", error, size)
        attach(model, changes, {})

    def _place(
        self, model: nn.Module, format_: str, present: dict[str, Target], divisions: Divisions
    ) -> None:
        changes: dict[str, Change] = {}
        for choice in self.choices:
            if choice.option.format != format_:
                continue
            made = self.calibrated[choice.title]
            targets = [present[name] for name in choice.names]
            layers = made.layers(format_, {t.name: t.module for t in targets}, divisions)
            for target in targets:
                weight = linear_weight(target.module)[0]
                error = relative_error(weight, made.unscaled(layers[target.name].dequantize()))
                changes[target.name] = Change(target.kind, error, linear_bytes(target.module))
            swap(model, Found(), [(target, layers[target.name]) for target in targets])
        attach(model, changes, {})

    def to_json(self) -> str:
        """Return everything as JSON, but what `apply` needs of the data."""
        totals = {
            name: getattr(self, name)
            for name in ("bytes_before", "bytes_after", "seconds_before", "seconds_after")
        }
        kept = asdict(replace(self, moments={}, calibrated={}))
        del kept["moments"], kept["calibrated"]
        return json.dumps({**kept, **totals}, indent=1)

    def __str__(self) -> str:
        rows = [("layers", "format", "KL alone", "us", "was", "bytes", "reason")]
        for choice in self.choices:
            option, before = choice.option, choice.before
            rows.append(
                (
                    choice.title,
                    option.format,
                    f"{option.kl:.5f}",
                    microseconds(option.seconds),
                    microseconds(before.seconds),
                    f"{option.bytes / max(before.bytes, 1):.3f}",
                    choice.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        kind, limit = self.bound
        lines.append(
            f"{len(self.choices)} units: {self.bytes_before / 1e6:.1f} MB -> "
            f"{self.bytes_after / 1e6:.1f} MB "
            f"({self.bytes_after / max(self.bytes_before, 1):.3f})"
        )
        parts = zip(self.tokens, self.seconds_before, self.seconds_after, strict=True)
        for i, (M, before_, after) in enumerate(parts):
            limit_ = f", at most {1e6 * self.limits[i]:.0f} asked" if self.limits else ""
            lines.append(
                f"{M} token{'s' if M > 1 else ''} through all of them: {1e6 * before_:.0f} us -> "
                f"{1e6 * after:.0f} us{limit_}"
            )
        if self.measured is not None:
            for name, found in {"held-out text": self.measured, **self.validated}.items():
                kl: Any = found.intervals.get("kl", found.kl)
                rise: Any = found.intervals.get("nll", found.nll)
                loss = "" if found.nll is None else f", nll {rise:+.5f}"
                lines.append(f"{name}: KL {kl:.5f}{loss} over {found.tokens} tokens")
            lines.append(f"bound: {kind} {limit:g}; {self.tries} choices tried")
        lines += [f"left alone: {name}" for name in self.skipped]
        return "\n".join(lines)


def microseconds(seconds: tuple[float, ...]) -> str:
    """Return times as text, in microseconds."""
    return " ".join(f"{1e6 * each:.0f}" for each in seconds)


def check_target(target: Target) -> None:
    """Raise `ValueError` naming the layer if no plan can compress it."""
    if isinstance(target.module, CompressedLayer):
        raise ValueError(f"{target.name} is compressed already; plan the original model")
    check_weight(target.name, linear_weight(target.module)[0])
