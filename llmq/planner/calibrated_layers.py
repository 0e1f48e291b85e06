"""Layers quantized with calibration data, one for each unit and format that a plan may choose.

Each unit is quantized for the inputs that the original model gives it, as the formats of the layers
before it are not known yet. One block is in memory at a time. Scales (SmoothQuant, Xiao et al.,
arXiv:2211.10438; AWQ, Lin et al., arXiv:2306.00978) divide what makes the unit's input: a norm, or
rows of a linear layer. Rows have scales of their own, so the codes of that linear layer stay the
same. Each format of a unit can therefore be combined with each format of another.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmq.calibrate import folding
from llmq.calibrate.blockwise import still
from llmq.calibrate.stages import Call, Stage, stages
from llmq.calibrate.statistics import Statistics, gather
from llmq.evaluation.sensitivity import Unit
from llmq.models.targets import Target
from llmq.nn import QuantLinear, linear_weight
from llmq.planner.layer_format import LayerFormat, fits, parse
from llmq.quantization import rounding
from llmq.quantization.smoothquant_awq import Scaling
from llmq.storage.resume import Store

_SCALE = "scale"
_DIVISION = "division"


class Division(NamedTuple):
    """What makes a unit's input, divided by the unit's scales.

    Args:
        writer: name of a norm, or of a linear layer.
        by: float32, one number for each entry of the norm's weight or each row of the layer's.
        offset: what the norm adds to its weight.
    """

    writer: str
    by: Tensor
    offset: float = 0.0

    def of(self, writer: nn.Module) -> nn.Module:
        """Return a divided copy of the norm, `Linear` or `Conv1D`."""
        made = copy.copy(writer)
        made._parameters = dict(writer._parameters)
        for name, offset in (("weight", self.offset), ("bias", 0.0)):
            parameter = writer._parameters.get(name)
            if parameter is not None:
                by = self.by.to(parameter.device)
                value = folding.divided(writer, parameter.detach().float(), by, offset)
                changed = nn.Parameter(value.to(parameter.dtype), parameter.requires_grad)
                made._parameters[name] = changed
        return made

    def target(self, model: nn.Module) -> Target:
        """Return the writer, and where it stands in `model`."""
        parent, _, attribute = self.writer.rpartition(".")
        places = [(model.get_submodule(parent), attribute)]
        return Target(self.writer, model.get_submodule(self.writer), "writer", places)


Divisions = dict[str, Division]  # by the writer's name


class CalibratedUnit(NamedTuple):
    """What calibration made of one unit.

    Args:
        tensors: `"LAYER:NAME"` of each layer's canonical storage without bias, and `"scale"`,
            float32 [K], by which the weights were multiplied, if they were.
        division: by that scale; None if there is none.
    """

    tensors: dict[str, Tensor]
    division: Division | None = None

    def layers(
        self, name: str, linears: dict[str, nn.Module], divisions: Divisions
    ) -> dict[str, QuantLinear]:
        """Return the layers in format `name` in place of `linears`, divided already, by name."""
        scheme = parse(name).scheme
        assert scheme is not None
        made: dict[str, QuantLinear] = {}
        for layer, linear in linears.items():
            weight, bias = linear_weight(linear)
            prefix = f"{layer}:"
            own = {
                name.removeprefix(prefix): tensor.to(weight.device)
                for name, tensor in self.tensors.items()
                if name.startswith(prefix)
            }
            if layer in divisions:
                by = divisions[layer].by.to(weight.device)
                own["weight_scale"] = own["weight_scale"] / by[:, None]
            if bias is not None:
                own["bias"] = bias
            coded = QuantLinear(weight.shape[1], weight.shape[0], scheme, own)
            made[layer] = coded.train(linear.training)
        return made

    def unscaled(self, weight: Tensor) -> Tensor:
        """Return a weight [N, K] of the layers' as it was before it was multiplied."""
        scale = self.tensors.get(_SCALE)
        return weight if scale is None else weight / scale.to(weight.device)


def divisions_of(made: Iterable[CalibratedUnit | None]) -> Divisions:
    """Return what units, if data made them, ask of the makers of their inputs."""
    found = [each.division for each in made if each is not None and each.division is not None]
    return {division.writer: division for division in found}


class CalibratedLayers:
    """What calibration made of all units, by unit and weight format.

    Args:
        model: that the units are of.
        store: where they are kept. In memory, those of `plan.CALIBRATED` take about as much as the
            float32 weights they are made of.
    """

    def __init__(self, model: nn.Module, store: Store | None = None) -> None:
        self.model = model
        self.store = Store(None) if store is None else store

    def get(self, unit: Unit, name: str) -> CalibratedUnit | None:
        """Return what `unit` is in format `name`, None if calibration made nothing of it."""
        entry = self.store.get(_key(unit, _stored_as(parse(name))))
        if entry is None or not entry.tensors:
            return None
        tensors = dict(entry.tensors)
        by, info = tensors.pop(_DIVISION, None), entry.info
        division = None if by is None else Division(info["writer"], by, info["offset"])
        return CalibratedUnit(tensors, division)

    def calibrate(self, units: list[Unit], formats: Sequence[str], calls: list[Call]) -> None:
        """Code each of `units` in those of `formats` that need data, for inputs from `calls`.

        Raises:
            ValueError: if the data gives a block NaN or infinite inputs.
        """
        wanted = {_stored_as(w): w for f in formats if (w := parse(f)).calibrated}
        own = [unit for unit in units if unit.calls and len(unit.distinct()) == len(unit.targets)]
        left = [unit for unit in own if not all(_key(unit, each) in self.store for each in wanted)]
        if not left:
            return
        names = {id(module): name for name, module in self.model.named_modules()}
        with still(self.model):
            for stage in stages(self.model, calls, "plan: calibrate"):
                inside = [unit for unit in left if _inside(unit, stage.name)]
                left = [unit for unit in left if unit not in inside]
                writers = [unit for unit in own if _inside(unit, stage.name)]
                candidates = _code(stage, inside, writers, wanted, names) if inside else ()
                for unit, key, made in candidates:
                    self._put(unit, key, made)
                if not left:
                    return

    def _put(self, unit: Unit, stored_as: str, made: CalibratedUnit) -> None:
        tensors, info = dict(made.tensors), {}
        if made.division is not None:
            tensors[_DIVISION] = made.division.by
            info = {"writer": made.division.writer, "offset": made.division.offset}
        self.store.put(_key(unit, stored_as), tensors, info)


def _key(unit: Unit, stored_as: str) -> str:
    # Names of many layers are longer than a file's may be.
    digest = hashlib.sha256(f"{unit.name} {stored_as}".encode()).hexdigest()[:16]
    return f"{stored_as.replace(' ', '-')}-{digest}"


def _stored_as(wanted: LayerFormat) -> str:
    """Name what is stored: 4-bit codes are the same whatever the activations are."""
    scheme = wanted.scheme
    assert scheme is not None
    if wanted.scaling is None:
        scheme = replace(scheme, activations=None, activation_group_size=None)
    return f"{scheme.name} {wanted.algorithm}"


def _inside(unit: Unit, block: str) -> bool:
    return not block or all(target.name.startswith(f"{block}.") for target in unit.targets)


def _code(
    stage: Stage,
    units: list[Unit],
    writers: list[Unit],
    wanted: dict[str, LayerFormat],
    names: dict[int, str],
) -> Iterator[tuple[Unit, str, CalibratedUnit]]:
    """Give each of a block's units in each of the formats wanted; nothing where one cannot be.

    `writers` are all of the block's units, which may make the inputs of one another.
    """
    groups = [[target] for unit in units for target in unit.targets]
    scales = any(form.scaling for form in wanted.values())
    gathered = gather(stage, groups, full=True, sample=scales)
    by_name = {group[0].name: stats for group, stats in zip(groups, gathered, strict=True)}
    folds: dict[frozenset[str], folding.Fold] = {}
    if scales and stage.name:
        linears = [[target] for unit in writers for target in unit.targets]
        for fold in folding.find_folds(stage.module, stage.calls[0], linears):
            folds.setdefault(frozenset(target.name for target in fold.readers), fold)
    for unit in units:
        statistics = by_name[unit.targets[0].name]
        place = folds.get(frozenset(target.name for target in unit.targets))
        shapes = [linear_weight(target.module)[0].shape for target in unit.targets]
        for key, form in wanted.items():
            assert form.scheme is not None
            fitting = all(fits(key, *shape) for shape in shapes)
            if not fitting or not statistics.rows or (form.scaling and place is None):
                made = CalibratedUnit({})
            else:
                made = _made(unit, form, statistics, place if form.scaling else None, names)
            yield unit, key, made


def _made(
    unit: Unit,
    form: LayerFormat,
    statistics: Statistics,
    fold: folding.Fold | None,
    names: dict[int, str],
) -> CalibratedUnit:
    scheme, scale = form.scheme, None
    assert scheme is not None
    if fold is not None and form.scaling is not None:
        schemes = {target.name: scheme for target in unit.targets}
        scale = Scaling(form.scaling, schemes).choose_scales(fold, statistics)
    if scale is not None:
        statistics = replace(statistics)  # others go on with those of the inputs as they come
        statistics.scale(scale)
    tensors: dict[str, Tensor] = {}
    for target in unit.targets:
        weight = linear_weight(target.module)[0]
        if scale is not None:
            weight = (weight.float() * scale).to(weight.dtype)
        encoded = rounding.encode(weight, scheme, form.rounding, statistics.moments)
        for name, tensor in encoded._asdict().items():
            if tensor is not None:
                tensors[f"{target.name}:{name}"] = tensor
    if fold is None or scale is None:
        return CalibratedUnit(tensors)
    tensors[_SCALE] = scale.to(torch.float32)
    by = fold.divisor(tensors[_SCALE])
    return CalibratedUnit(tensors, Division(names[id(fold.writer)], by, fold.offset))
