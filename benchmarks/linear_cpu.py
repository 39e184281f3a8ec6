"""awq_ext::linear on a CPU against torch's dense linear, torch's int4 kernel and the machine's read bandwidth."""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from common import take_turns, write

from awq_ext import AwqLinear

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (576, 1536)]  # out_features, in_features
ROWS = [1, 2, 4, 8, 16, 32, 128, 512]
ROTATE_BYTES = 512 << 20


def int4_torch(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weight for torch's own int4 CPU kernel: (packed words, scales and zeros), bfloat16."""
    n, k = weight.shape
    groups = weight.view(n, k // group_size, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).int().view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    zeros = low + 8 * scale  # that kernel's weight is (code - 8) * scale + zero
    return packed, torch.stack([scale, zeros], -1).transpose(0, 1).contiguous().bfloat16()


def measure(n: int, k: int, m: int, group_size: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    weight = torch.randn(n, k) * 0.02
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    layer = AwqLinear.from_linear(linear, group_size)
    exact = layer.dequantize(torch.float32).double()
    x = torch.randn(m, k)
    torch.testing.assert_close(layer(x).double(), x.double() @ exact.T, rtol=1e-4, atol=1e-4)

    copies = lambda tensor: max(2, ROTATE_BYTES // tensor.nbytes) if m <= 16 else 2  # noqa: E731
    layers = [copy.deepcopy(layer) for _ in range(copies(layer.qweight))]
    dense32 = [weight.clone() for _ in range(copies(weight))]
    dense16 = [weight.bfloat16() for _ in range(copies(weight) * 2 if m <= 16 else 2)]
    packed, scales = int4_torch(weight, group_size)
    packs = [packed.clone() for _ in range(copies(packed))]
    half = x.bfloat16()
    read = [torch.randn(layer.qweight.numel()) for _ in range(len(layers))]
    return take_turns(
        {
            "awq_ext float32": lambda i: layers[i % len(layers)](x),
            "awq_ext bfloat16": lambda i: layers[i % len(layers)](half),
            "torch dense float32": lambda i: F.linear(x, dense32[i % len(dense32)]),
            "torch dense bfloat16": lambda i: F.linear(half, dense16[i % len(dense16)]),
            "torch int4 bfloat16": lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
                half, packs[i % len(packs)], group_size, scales
            ),
            "read probe": lambda i: read[i % len(read)].sum(),  # as many bytes as the 4-bit weight has
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    results = []
    for n, k in SHAPES[: args.shapes]:
        for m in args.rows:
            times = measure(n, k, m, args.group_size)
            ours = times["awq_ext bfloat16"]["median"]
            results.append({"n": n, "k": k, "m": m, "group_size": args.group_size, "seconds": times})
            ratios = ", ".join(f"{name} {t['median'] / ours:.2f}x" for name, t in times.items())
            print(f"[{n}, {k}] m={m}: {ours * 1e6:.0f} us; time relative to it: {ratios}", flush=True)
    print(write(f"linear_cpu_{args.threads}t", results))


if __name__ == "__main__":
    main()
