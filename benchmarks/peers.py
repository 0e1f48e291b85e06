"""Linear layers of other libraries and ours, each in a process of its own; run by `compare.py`.

Two thread pools in one process disturb each other, so every peer is a worker: it reads JSON lines
(`{"prepare": [N, K]}`, `{"sample": M, "seconds": s}`) and answers with JSON lines. To add a peer:
one function that makes its layer, and a row in `PEERS`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmq.planner import layer_format, timing

# What runs a layer once: from float32 x [M, K] to anything.
Call = Callable[[Tensor], Any]


class Peer(NamedTuple):
    """How to make a layer, and what it may be compared with."""

    make: Callable[[nn.Linear, int], Call]  # from a float32 layer and the number of threads
    family: str  # "float", "int8" (inputs too), "weight8" or "weight4" (floating-point inputs)
    bits: float  # of a weight in memory, scales included
    needs: tuple[str, ...] = ()  # importable names


# -- torch ---------------------------------------------------------------------------------------


def _torch(dtype: torch.dtype) -> Callable[[nn.Linear, int], Call]:
    def make(linear: nn.Linear, threads: int) -> Call:
        return linear.to(dtype) if dtype == torch.float32 else _cast(linear.to(dtype), dtype)

    return make


def _cast(linear: nn.Module, dtype: torch.dtype) -> Call:
    cast: dict[int, Tensor] = {}  # a model of that dtype has no conversion to pay for

    def call(x: Tensor) -> Any:
        if x.shape[0] not in cast:
            cast[x.shape[0]] = x.to(dtype)
        return linear(cast[x.shape[0]])

    return call


def _dynamic(engine: str) -> Callable[[nn.Linear, int], Call]:
    def make(linear: nn.Linear, threads: int) -> Call:
        torch.backends.quantized.engine = engine
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})

    return make


def _torchao(linear: nn.Linear, threads: int) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


# -- ONNX Runtime --------------------------------------------------------------------------------


def _session(nodes: list[Any], tensors: dict[str, Any], N: int, K: int, threads: int) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x.numpy()})


def _onnx_dynamic(linear: nn.Linear, threads: int) -> Call:
    """DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime fuses; scales by channel."""
    import numpy as np
    from onnx import helper

    weight = linear.weight.detach()
    N, K = weight.shape
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "x_zero", "w_zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=1),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["f", "scale"], ["p"]),
        helper.make_node("Add", ["p", "bias"], ["y"]),
    ]
    tensors = {
        "w": codes.T.contiguous().numpy(),
        "w_zero": np.zeros(N, np.int8),
        "w_scale": scale.numpy(),
        "bias": linear.bias.detach().numpy(),
    }
    return _session(nodes, tensors, N, K, threads)


def _onnx_nbits(bits: int) -> Callable[[nn.Linear, int], Call]:
    """MatMulNBits with a scale for 32 inputs, which are quantized to int8 (accuracy level 4)."""

    def make(linear: nn.Linear, threads: int) -> Call:
        import numpy as np
        from onnx import helper

        N, K = linear.weight.shape
        blocks = math.ceil(K / 32)
        generator = np.random.default_rng(0)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "w_scale"],
            ["y"],
            domain="com.microsoft",
            K=K,
            N=N,
            bits=bits,
            block_size=32,
            accuracy_level=4,
        )
        tensors = {
            "w": generator.integers(0, 256, (N, blocks, 4 * bits), np.uint8),
            "w_scale": generator.random(N * blocks, np.float32) / 1000,
        }
        return _session([node], tensors, N, K, threads)

    return make


# -- OpenVINO ------------------------------------------------------------------------------------


def _openvino(linear: nn.Linear, threads: int) -> Call:
    """int8 weights with a scale a channel, compiled with OpenVINO's defaults."""
    import openvino
    from openvino import opset13 as ops

    weight = linear.weight.detach()
    scale = (weight.abs().amax(1) / 127)[:, None]
    codes = (weight / scale).round().to(torch.int8).numpy()
    x = ops.parameter([-1, weight.shape[1]], openvino.Type.f32, name="x")
    decoded = ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scale.numpy()))
    product = ops.matmul(x, decoded, False, True)
    y = ops.add(product, ops.constant(linear.bias.detach()[None].numpy()))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)


# -- ours ----------------------------------------------------------------------------------------


def _llmq(scheme: str) -> Callable[[nn.Linear, int], Call]:
    return lambda linear, threads: layer_format.make_layer(linear, scheme)


PEERS: dict[str, Peer] = {
    "llmq w8a8": Peer(_llmq("w8a8"), "int8", 8),
    "llmq w8a8-g64": Peer(_llmq("w8a8-g64"), "int8", 8),
    "llmq sparse 50 % w8a8": Peer(_llmq("sparse 50 % w8a8"), "int8", 5),
    "llmq w8a16": Peer(_llmq("w8a16"), "weight8", 8),
    "llmq w8a16-quantile": Peer(_llmq("w8a16-quantile"), "weight8", 8),
    "llmq w4a8-g32": Peer(_llmq("w4a8-g32"), "weight4", 5.25),
    "llmq w4a16-g32": Peer(_llmq("w4a16-g32"), "weight4", 5.25),
    "llmq w4a16-quantile-g32": Peer(_llmq("w4a16-quantile-g32"), "weight4", 5),
    "torch float32": Peer(_torch(torch.float32), "float", 32),
    "torch bfloat16": Peer(_torch(torch.bfloat16), "float", 16),
    "torch dynamic x86": Peer(_dynamic("x86"), "int8", 8),
    "torch dynamic onednn": Peer(_dynamic("onednn"), "int8", 8),
    "torchao int8": Peer(_torchao, "int8", 8, ("torchao",)),
    "onnxruntime dynamic int8": Peer(_onnx_dynamic, "int8", 8, ("onnxruntime", "onnx")),
    "onnxruntime 8 bits": Peer(_onnx_nbits(8), "weight8", 9, ("onnxruntime", "onnx")),
    "onnxruntime 4 bits": Peer(_onnx_nbits(4), "weight4", 5, ("onnxruntime", "onnx")),
    "openvino int8 weights": Peer(_openvino, "weight8", 8, ("openvino",)),
}


def missing(name: str) -> str:
    """Return what to install before peer `name` runs, or nothing."""
    absent = [need for need in PEERS[name].needs if importlib.util.find_spec(need) is None]
    return f"{name}: pip install {' '.join(absent)}" if absent else ""


def serve(name: str, threads: int) -> None:
    """Answer requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    torch.set_num_threads(threads)
    peer = PEERS[name]
    layers: list[Call] = []
    K = turn = 0
    inputs: dict[int, Tensor] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            with torch.inference_mode():
                if "prepare" in request:
                    N, K = request["prepare"]
                    torch.manual_seed(0)
                    count = timing.copies(N * K * peer.bits / 8)
                    layers.clear()
                    inputs.clear()
                    layers += [peer.make(nn.Linear(K, N).eval(), threads) for _ in range(count)]
                    kernel = getattr(layers[0], "kernel", None)
                    answer["kernel"] = name if kernel is None else kernel(1).name
                else:
                    M = request["sample"]
                    x = inputs.setdefault(M, torch.randn(M, K))
                    calls, started, spent = 0, time.perf_counter(), 0.0
                    while spent < request["seconds"]:
                        layers[turn % len(layers)](x)
                        turn, calls = turn + 1, calls + 1
                        spent = time.perf_counter() - started
                    answer["seconds"] = spent / calls
        except Exception as error:  # any library may fail in any way; the others go on
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
