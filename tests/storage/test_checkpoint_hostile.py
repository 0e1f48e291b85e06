"""Checkpoints made to deceive: renewed checksums, lying shapes, bombs; a ValueError for each.

One file, though long: it is one table of lies, told of one fixture.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq.storage import architecture, tensor_file
from llmq.storage.checkpoint import TENSORS
from llmq.storage.description import DESCRIPTION, digest

tf = pytest.importorskip("transformers")
from tests import families  # noqa: E402  needs transformers

LAYER = "model.layers.0.mlp.down_proj"  # [64, 128]


class Checkpoint:
    """A saved model that can be altered, its checksums renewed as a liar would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = json.loads((folder / DESCRIPTION).read_text())
        size, sha256 = (self.description[f"tensors_{n}"] for n in ("bytes", "sha256"))
        self.tensors = tensor_file.read(folder / TENSORS, size, sha256)

    @property
    def layer(self) -> dict[str, Any]:
        layer: dict[str, Any] = self.description["layers"][LAYER]
        return layer

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a tensor of LAYER, and the shape that is told of it."""
        self.tensors[f"{LAYER}.{name}"] = tensor
        self.layer["shapes"][name] = list(tensor.shape)

    def write(self, target: Path, raw: bytes | None = None) -> Path:
        """Write it to `target`, with the bytes `raw` as its tensors where given."""
        target.mkdir(exist_ok=True)
        file = target / TENSORS
        entries = {
            name: tensor_file.Entry(t.dtype, tuple(t.shape), t.detach)
            for name, t in self.tensors.items()
        }
        description = copy.deepcopy(self.description)
        description["tensors_sha256"] = tensor_file.write(file, entries)
        if raw is not None:
            file.write_bytes(raw)
            description["tensors_sha256"] = hashlib.sha256(raw).hexdigest()
        description["tensors_bytes"] = file.stat().st_size
        description["sha256"] = digest(description)
        (target / DESCRIPTION).write_text(json.dumps(description))
        return target


KINDS: dict[str, Callable[[Any], Any]] = {
    "w8a8": lambda m: llmq.quantize(m, scheme="w8a8"),
    "static": lambda m: llmq.quantize(m, scheme="w8a8-static", data=[families.inputs("llama")]),
    "static-sparse": lambda m: llmq.prune(KINDS["static"](m), 0.5),
    "w4a16-g32": lambda m: llmq.quantize(m, scheme="w4a16-g32"),
    "quantile": lambda m: llmq.quantize(m, scheme="w8a16-quantile"),
    "sparse": lambda m: llmq.prune(llmq.quantize(m, scheme="w8a8"), 0.5),
    "sparse-float": lambda m: llmq.prune(m, 0.5),
    "2:4": lambda m: llmq.prune(m, pattern="2:4"),
    "block": lambda m: llmq.prune(m, 0.5, pattern="block-16x16"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    folders: dict[str, Path] = {}

    def checkpoint(kind: str) -> Checkpoint:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("saved") / "m"
            llmq.save(KINDS[kind](families.make("llama")), folders[kind])
        return Checkpoint(folders[kind])

    return checkpoint


def test_an_honest_rewrite_loads(saved: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    for kind in KINDS:
        checkpoint = saved(kind)
        loaded = llmq.load(checkpoint.write(tmp_path / kind.replace(":", "-")))
        y = families.output(llmq.load(checkpoint.folder), "llama")
        assert torch.equal(families.output(loaded, "llama"), y)


def scale(value: float) -> Callable[[Checkpoint], None]:
    def alter(c: Checkpoint) -> None:
        c.tensors[f"{LAYER}.weight_scale"][3] = value

    return alter


def input_scale(*values: float) -> Callable[[Checkpoint], None]:
    return lambda c: c.set("input_scale", torch.tensor(values))


def describe(**fields: Any) -> Callable[[Checkpoint], None]:
    return lambda c: c.layer.update(fields)


def configure(**fields: Any) -> Callable[[Checkpoint], None]:
    return lambda c: c.description["config"].update(fields)


def rescheme(**fields: Any) -> Callable[[Checkpoint], None]:
    return lambda c: c.layer["scheme"].update(fields)


def tensor(name: str, value: torch.Tensor) -> Callable[[Checkpoint], None]:
    return lambda c: c.set(name, value)


def shift(name: str, place: int, by: int) -> Callable[[Checkpoint], None]:
    def alter(c: Checkpoint) -> None:
        c.tensors[f"{LAYER}.{name}"].view(-1)[place] += by

    return alter


def attribute(module: str, name: str, value: Any) -> Callable[[Checkpoint], None]:
    return lambda c: c.description["module_attributes"].update({module: {name: value}})


def drop(name: str) -> Callable[[Checkpoint], None]:
    return lambda c: c.description.pop(name) and None


INT8 = torch.zeros(64, 128, dtype=torch.int8)
F32 = torch.ones(64, 1)
LIES: dict[str, tuple[str, Callable[[Checkpoint], None], str]] = {
    # what a layer holds
    "NaN scale": ("w8a8", scale(float("nan")), f"{LAYER}: weight_scale has NaN or infinite"),
    "infinite scale": ("sparse", scale(float("inf")), f"{LAYER}: weight_scale has NaN or infin"),
    "NaN input scale": ("static", input_scale(float("nan")), "input_scale is .nan"),
    "infinite input scale": ("static-sparse", input_scale(float("inf")), "input_scale is .inf"),
    "input scale of zero": ("static", input_scale(0.0), r"input_scale is \[0.0\], expected a fin"),
    "negative input scale": ("static-sparse", input_scale(-0.1), "input_scale is .-0.1"),
    "input scale too small": ("static", input_scale(1e-38), "finite number above 1e-30"),
    "two input scales": ("static", input_scale(0.1, 0.2), r"input_scale has shape \[2\]"),
    "no input scale at all": ("static", input_scale(), r"input_scale has shape \[0\]"),
    "half an input scale": (
        "static",
        tensor("input_scale", torch.ones(1).half()),
        "input_scale is torch.float16",
    ),
    "an input scale for dynamic inputs": (
        "w8a8",
        input_scale(0.1),
        "unexpected .'input_scale'",
    ),
    "static inputs without a scale": (
        "w8a8",
        rescheme(activations="static"),
        "missing .'input_scale'",
    ),
    "static inputs turned dynamic": (
        "static-sparse",
        rescheme(activations="dynamic"),
        "unexpected .'input_scale'",
    ),
    "static inputs of nibbles": ("static", rescheme(bits=4), "static activations need"),
    "more inputs than codes": ("w8a8", describe(in_features=129), "weight has shape"),
    "fewer outputs than rows": ("w8a8", describe(out_features=63), "has shape"),
    "float codes": ("w8a8", tensor("weight", INT8.float()), "weight is torch.float32"),
    "int8 scales": ("w8a8", tensor("weight_scale", INT8[:, :1]), "weight_scale is torch.int8"),
    "too few scales": ("w4a16-g32", tensor("weight_scale", F32), "weight_scale has shape"),
    "too many scales": ("w8a8", tensor("weight_scale", F32.expand(64, 2)), "weight_scale has sha"),
    "no scales": ("w8a8", lambda c: c.layer["shapes"].pop("weight_scale") and None, "weight_scale"),
    "a tensor too many": ("w8a8", tensor("row_offsets", torch.zeros(65).long()), "row_offsets"),
    "bytes as nibbles": ("w8a8", rescheme(bits=4), "weight has shape"),
    "no zero points": ("w8a8", rescheme(symmetric=False), "weight_zero_point"),
    "short codebook": ("quantile", tensor("weight_codebook", torch.zeros(1, 16)), "codebook has"),
    "NaN codebook": ("quantile", tensor("weight_codebook", torch.full((1, 256), torch.nan)), "NaN"),
    "unknown scheme": ("w8a8", rescheme(method="magic"), "Scheme.method"),
    "unknown field": ("w8a8", rescheme(color="red"), "not one of llmq's"),
    "group that does not divide": (
        "w8a8",
        rescheme(activation_group_size=37),
        "activation_group_size=37 does not divide",
    ),
    "unknown type": ("w8a8", describe(type="Linear"), "unknown layer type 'Linear'"),
    "unknown pattern": ("sparse", describe(pattern="plaid"), "unknown pattern 'plaid'"),
    "another pattern": ("sparse", describe(pattern="2:4"), "missing .*, unexpected "),
    "unknown dtype": ("sparse-float", describe(dtype="Tensor"), "floating-point dtype"),
    "text for a number": ("w8a8", describe(in_features="128"), "in_features='128'"),
    "negative number": ("w8a8", describe(out_features=-1), "out_features=-1"),
    "offsets that jump": ("sparse", shift("row_offsets", 5, 1 << 40), "do(es)? not (belong|match)"),
    "offsets below zero": ("sparse", shift("row_offsets", 0, -8), "do(es)? not (belong|match)"),
    "float offsets that jump": ("sparse-float", shift("row_offsets", 5, 1), "do not match"),
    "a bit too many": ("sparse-float", shift("weight_bitmask", 0, 1), "do not match"),
    "positions out of order": ("2:4", shift("weight_meta", 0, 0x0F), "ascending|past"),
    "block out of range": ("block", shift("block_index", 0, 1 << 20), "block_index"),
    "block before the first": ("block", shift("block_index", 0, -9), "block_index"),
    "block offsets that jump": ("block", shift("block_offsets", 1, 1 << 20), "block_offsets"),
    "blocks of another size": ("block", describe(pattern="block-8x8"), "has shape"),
    # what the model is
    "no such layer": (
        "w8a8",
        lambda c: c.description["layers"].update({"model.layers.7.mlp": c.layer}),
        "other shapes|no layer",
    ),
    "a path for a name": (
        "w8a8",
        lambda c: c.tensors.update({"../../etc/passwd": torch.zeros(1)}),
        r"do not belong together: \.\./\.\./etc/passwd",
    ),
    "tensor too many": ("w8a8", lambda c: c.tensors.update({"x": F32}), "belong together: x"),
    "tensor too few": (
        "w8a8",
        lambda c: c.tensors.pop("model.norm.weight") is None,
        "belong together: model.norm.weight",
    ),
    "tensor hidden": (
        "w8a8",
        lambda c: c.description["buffers"].update({"model.norm.weight": "float32"}),
        "belong together: model.norm.weight",
    ),
    "other dimensions": (
        "w8a8",
        lambda c: c.tensors.update({"model.norm.weight": torch.ones(64, 1)}),
        "weight has shape",
    ),
    "alias of an alias": (
        "w8a8",
        lambda c: c.description["aliases"].update({"a": "lm_head.weight", "b": "a"}),
        "missing tensor",
    ),
    "attribute that is a method": ("w8a8", attribute("model", "forward", 1), "not all integers"),
    "attribute of no module": ("w8a8", attribute("model.x", "size", 1), "describes no model"),
    "attribute that is text": ("w8a8", attribute("model", "size", "1"), "not all integers"),
    "no configuration": ("w8a8", drop("config"), "config is 'missing'"),
    "layers in a list": ("w8a8", lambda c: c.description.update(layers=[]), "layers is"),
    "report of numbers": ("w8a8", lambda c: c.description.update(report={"layers": 3}), "no model"),
    "the base class": (
        "w8a8",
        lambda c: c.description.update(architecture="PreTrainedModel"),
        "no model class 'PreTrainedModel'",
    ),
    "another class": (
        "w8a8",
        lambda c: c.description.update(architecture="BertModel"),
        "describes no model: it has no layer",
    ),
    # bombs
    "a huge layer": (
        "w8a8",
        describe(in_features=1 << 40, out_features=1 << 40),
        "far larger layers than the tensors",
    ),
    "a huge empty layer": (
        "block",
        lambda c: (
            c.set("weight", torch.zeros(0, 1 << 20, 1 << 20)),
            c.set("block_index", torch.zeros(0, dtype=torch.int32)),
            c.set("block_offsets", torch.zeros(2, dtype=torch.int32)),
            c.layer.update(pattern="block-1048576x1048576"),
            c.layer.update(in_features=1 << 20, out_features=1 << 20),
        )[0],
        "far larger layers than the tensors",
    ),
    "a wide model": ("w8a8", configure(hidden_size=1 << 24), "far more than the checkpoint"),
    "a large vocabulary": ("w8a8", configure(vocab_size=1 << 40), "far more than the checkpoint"),
    "a deep model": ("w8a8", configure(num_hidden_layers=1 << 40), "num_hidden_layers is 10995"),
    "a model of many small layers": (
        "w8a8",
        configure(num_hidden_layers=1 << 16),
        "far more than the checkpoint",
    ),
    "many labels": ("w8a8", configure(num_labels=1 << 40), "num_labels is"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, saved: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    kind, alter, message = LIES[lie]
    checkpoint = saved(kind)
    alter(checkpoint)
    folder = checkpoint.write(tmp_path / "m")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        llmq.load(folder)
    assert str(folder) in str(error.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 1 << 20, f"{grown} KiB for a checkpoint of {(folder / TENSORS).stat().st_size}"


# -- files ---------------------------------------------------------------------------------------


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def one(**fields: Any) -> bytes:
    return json.dumps(
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}
    ).encode()


FILES: dict[str, bytes] = {
    "empty": b"",
    "half a length": b"\x08\0\0",
    "header longer than the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "no JSON": header(b"\x80\x02}q\x00."),
    "a list": header(b"[]"),
    "deep JSON": header(b"[" * 200_000),
    "twice the same name": header(one()[:-1] + b"," + one()[1:], bytes(8)),
    "huge shape": header(one(shape=[1 << 40]), bytes(8)),
    "overflowing shape": header(one(shape=[1 << 63, 2]), bytes(8)),
    "overflowing empty shape": header(one(shape=[0, 1 << 63], data_offsets=[0, 0])),
    "negative shape": header(one(shape=[-2]), bytes(8)),
    "shape of text": header(one(shape=["2"]), bytes(8)),
    "unknown dtype": header(one(dtype="OBJECT"), bytes(8)),
    "offsets beyond the end": header(one(data_offsets=[8, 16]), bytes(8)),
    "bytes of no tensor": header(one(), bytes(16)),
    "overlap": header(one()[:-1] + b', "y": ' + one()[6:], bytes(8)),
    "field missing": header(b'{"x": {"dtype": "F32"}}', bytes(8)),
    "a pickle": b"\x80\x04cos\nsystem\n(S'false'\ntR.",
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_safetensors(
    name: str, saved: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    folder = saved("w8a8").write(tmp_path / "m", FILES[name])
    with pytest.raises(ValueError, match=TENSORS):
        llmq.load(folder)


def test_names_that_stand_twice_in_the_description(
    saved: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    folder = saved("w8a8").write(tmp_path / "m")
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text.replace("{", '{"architecture": "BertModel", ', 1))
    with pytest.raises(ValueError, match="'architecture' stands there twice"):
        llmq.load(folder)


def test_newer_formats(saved: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    checkpoint = saved("w8a8")
    checkpoint.description["format_version"] = 99
    with pytest.raises(ValueError, match="version 99, this llmq reads 1; pip install -U"):
        llmq.load(checkpoint.write(tmp_path / "m"))


# -- any alteration ------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for name, inner in items:
        found += places(inner, (*path, name))
    return found


N_ALTERED = 150
STRANGE = (None, True, -1, 0, 1, 3, 1 << 31, 1 << 70, 0.5, float("nan"), float("inf"), "", "x")
STRANGE += ("../x", "float16", [], [1], {}, {"x": 1}, "\ud800")  # type: ignore[assignment]


def refusal(folder: Path) -> str | None:
    """Return why `folder` is not loaded; run the model if it is."""
    try:
        model = llmq.load(folder)
    except ValueError as error:
        return str(error)
    with contextlib.suppress(ValueError, TypeError, RuntimeError, LookupError, AttributeError):
        families.output(model, "llama")  # any result or error, but no access outside of tensors
    return None


@pytest.mark.parametrize("kind", ["w8a8", "sparse"])
def test_altered_descriptions_load_or_say_why(
    kind: str, saved: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Every alteration gives a model or a ValueError: no other error, no crash, no endless work."""
    generator = random.Random(kind)
    checkpoint = saved(kind)
    original = checkpoint.description
    all_places = places(original)
    refused = 0
    for _ in range(N_ALTERED):
        checkpoint.description = copy.deepcopy(original)
        *path, last = place = generator.choice(all_places)
        inner: Any = checkpoint.description
        for name in path:
            inner = inner[name]
        inner[last] = generator.choice(STRANGE)
        folder = checkpoint.write(tmp_path / "m")
        start = time.monotonic()
        message = refusal(folder)
        assert message is None or str(folder) in message, place
        refused += message is not None
        assert time.monotonic() - start < 30, place
    assert refused > 50


def test_altered_tensors_load_or_say_why(
    saved: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    generator = random.Random(0)
    checkpoint = saved("sparse")
    raw = (checkpoint.folder / TENSORS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for attempt in range(N_ALTERED):
        altered = bytearray(raw)
        end = 8 + length if attempt % 2 else len(raw)
        for _ in range(generator.choice((1, 1, 4))):
            altered[generator.randrange(end)] = generator.randrange(256)
        folder = checkpoint.write(tmp_path / "m", bytes(altered))
        message = refusal(folder)
        assert message is None or str(folder) in message


# -- nothing is fetched --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "evil/repo--modeling.Evil"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel:run"},
        {"experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"trust_remote_code": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_nothing_is_fetched(
    fields: dict[str, Any],
    saved: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    checkpoint = saved("w8a8")
    checkpoint.description["config"].update(fields)
    checkpoint.description["implementations"]["_attn_implementation"] = "evil/kernel"
    loaded = llmq.load(checkpoint.write(tmp_path / "m"))
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert getattr(loaded.config, "quantization_config", None) is None
    assert not hasattr(loaded.config, "auto_map")


def test_without_transformers(
    saved: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("w8a8").write(tmp_path / "m")
    monkeypatch.setitem(architecture.sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'llmq-kernels\[transformers\]'"):
        llmq.load(folder)
