"""Small layers on every CUDA kernel, each beside its dense product: what compute-sanitizer watches.

    compute-sanitizer --tool racecheck --kernel-regex kns=llmq python -m benchmarks.gpu_sanitize

`--device cpu` runs the CPU's kernels instead. Prints which kernels ran; a wrong result raises.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import gpu_peers

# (N, K): one block of outputs, partly filled; two, and K in slices.
SHAPES = ((33, 128), (130, 1152))
# Tokens of every width that a block has; those of sparse layers go past their kernels' limit.
FEW, MANY = (1, 9, 33), (70,)
PEERS = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g128")
SPARSE = ("bitmap 50 % w8a8", "bitmap 70 % w8a8", "bitmap 50 % w8a16", "2:4 w8a8")


@torch.inference_mode()
def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    ran: dict[str, int] = {}
    for N, K in SHAPES:
        torch.manual_seed(0)
        dense = torch.nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
        for name in (*PEERS, *SPARSE):
            peer = gpu_peers.PEERS[name]
            layer = peer.make(dense)
            for M in FEW + (MANY if name in SPARSE else ()):
                x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
                gpu_peers.check(peer, dense, layer, x)
                kernel = layer.kernel(M, torch.bfloat16).name
                ran[kernel] = ran.get(kernel, 0) + 1
    print("right:", ", ".join(f"{kernel} {count}" for kernel, count in ran.items()))


if __name__ == "__main__":
    main()
