"""The public interface: names and signatures, as text. A change to it shows in a diff of this file.

Whoever changes it on purpose changes `API` too, and says so in CHANGELOG.md.
"""

from __future__ import annotations

import inspect

import llmq

API = """
QuantEmbedding(
    num_embeddings: 'int',
    embedding_dim: 'int',
    scheme: 'Scheme',
    tensors: 'dict[str, Tensor]',
    *,
    dtype: 'torch.dtype' = torch.float32,
    padding_idx: 'int | None' = None,
    factor: 'float' = 1.0,
) -> None
QuantEmbedding.dequantize(
    self,
) -> Tensor
QuantEmbedding.from_embedding(
    embedding: 'nn.Embedding',
    scheme: 'Scheme | str',
) -> QuantEmbedding
QuantLinear(
    in_features: 'int',
    out_features: 'int',
    scheme: 'Scheme',
    tensors: 'dict[str, Tensor]',
) -> None
QuantLinear.dequantize(
    self,
) -> Tensor
QuantLinear.from_linear(
    linear: 'nn.Module',
    scheme: 'Scheme | str',
    *,
    input_scale: 'Tensor | float | None' = None,
) -> QuantLinear
Scheme(
    bits: 'int' = 8,
    method: 'Method' = 'uniform',
    granularity: 'Granularity' = 'channel',
    group_size: 'int | None' = None,
    symmetric: 'bool' = True,
    activations: "Literal['dynamic', 'static'] | None" = None,
    activation_group_size: 'int | None' = None,
) -> None
SparseLinear(
    in_features: 'int',
    out_features: 'int',
    pattern: 'Pattern',
    scheme: 'Scheme | None',
    tensors: 'dict[str, Tensor]',
) -> None
SparseLinear.dequantize(
    self,
) -> Tensor
SparseLinear.from_linear(
    linear: 'nn.Module',
    pattern: 'str | Pattern' = 'unstructured',
    *,
    scheme: 'Scheme | str | None' = None,
    mask: 'Tensor | None' = None,
    input_scale: 'Tensor | float | None' = None,
) -> SparseLinear
accelerate(
    model: 'Any',
) -> Any
compare(
    original: 'nn.Module',
    compressed: 'nn.Module',
    data: 'Any',
) -> Report
doctor() -> Diagnosis
evaluate(
    model: 'nn.Module',
    data: 'Any',
) -> Metrics
fine_tune(
    model: 'nn.Module',
    train_data: 'Iterable[Any]',
    epochs: 'int' = 1,
    *,
    steps: 'int | None' = None,
    lr: 'float | None' = None,
    teacher: 'nn.Module | None' = None,
    method: 'str' = 'full',
    teacher_weight: 'float' = 0.5,
    hidden_weight: 'float' = 0.0,
    rank: 'int' = 16,
    learn_scales: 'bool' = False,
    validation: 'Iterable[Any] | None' = None,
    validate_every: 'int | None' = None,
    accumulate: 'int' = 1,
    dtype: 'torch.dtype | None' = None,
    gradient_checkpointing: 'bool' = False,
    checkpoint_dir: 'str | os.PathLike[str] | None' = None,
) -> History
load(
    directory: 'str | os.PathLike[str]',
    device: 'str | torch.device | None' = None,
) -> nn.Module
plan(
    model: 'nn.Module',
    data: 'Any',
    *,
    max_kl: 'float | None' = None,
    max_perplexity_increase: 'float | None' = None,
    device: 'torch.device | str | None' = None,
    minimize: 'Minimize' = 'both',
    formats: 'Sequence[str] | None' = None,
    tokens: 'int | Sequence[int]' = (1, 512),
    no_slower_than: 'str | None' = '8 bits',
    calibration: 'Any' = None,
    validation: 'Any' = None,
    skip: 'tuple[str, ...] | None' = None,
    resume: 'str | os.PathLike[str] | None' = None,
) -> Plan
prune(
    model: 'nn.Module',
    pruning_rate: 'float' = 0.5,
    *,
    pattern: 'str' = 'unstructured',
    method: 'str | None' = None,
    data: 'Any' = None,
    skip: 'tuple[str, ...] | None' = None,
    allocation: 'str' = 'uniform',
    resume: 'str | os.PathLike[str] | None' = None,
) -> nn.Module
quantize(
    model: 'nn.Module',
    bits: 'int' = 8,
    *,
    scheme: 'str | Scheme | None' = None,
    data: 'Any' = None,
    algorithm: 'str' = 'rtn',
    skip: 'tuple[str, ...] | None' = None,
    resume: 'str | os.PathLike[str] | None' = None,
) -> nn.Module
restore(
    model: 'Any',
) -> Any
save(
    model: 'nn.Module',
    directory: 'str | os.PathLike[str]',
) -> None
"""


def public() -> str:
    lines = []
    for name in sorted(set(llmq.__all__) - {"__version__"}):
        thing = getattr(llmq, name)
        lines += signature(name, thing)
        if inspect.isclass(thing):
            own = {m: v for m, v in vars(thing).items() if not m.startswith("_")}
            for method in sorted(set(own) & PUBLIC_METHODS):
                lines += signature(f"{name}.{method}", getattr(thing, method))
    return "\n".join(lines)


# What the documentation names of classes; their other methods are the library's own.
PUBLIC_METHODS = {"from_linear", "from_embedding", "dequantize"}


def signature(name: str, thing: object) -> list[str]:
    """One line a parameter, so that a diff shows which one changed."""
    found = inspect.signature(thing)
    lines, star = [f"{name}("], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("    *,")
            star = True
        lines.append(f"    {parameter},")
    end = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return [*lines, f"){end}"] if len(lines) > 1 else [f"{name}(){end}"]


def test_names_and_signatures() -> None:
    assert public().splitlines() == API.strip().splitlines()
