"""What one call costs before any arithmetic: the smallest linear, through the operator, the module and torch's own; and
what one call saves where three layers have the same input: q, k and v for one row, apart and concatenated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import take_turns, write

from awq_ext import AwqLinear


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    layer = AwqLinear.from_linear(torch.nn.Linear(8, 8, bias=False), 8)
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    buffers, options = (layer.qweight, layer.scales, layer.qzeros), {"group_size": 8, "layout": layer.layout}
    times = take_turns(
        {
            "torch.ops.awq_ext.linear": lambda i: torch.ops.awq_ext.linear(x, *buffers, None, **options),
            "AwqLinear": lambda i: layer(x),
            "torch.nn.functional.linear": lambda i: F.linear(x, weight),
        }
    )
    torch.set_num_threads(2)
    for k, outputs in {576: (576, 192, 192), 4096: (4096, 1024, 1024)}.items():
        layers = [AwqLinear.from_linear(torch.nn.Linear(k, n, bias=False), 64) for n in outputs]
        together, row = AwqLinear.concatenate(layers), torch.randn(1, k, dtype=torch.bfloat16)
        times |= take_turns(
            {
                f"q, k, v of {k}, apart": lambda i, layers=layers, row=row: [layer(row) for layer in layers],
                f"q, k, v of {k}, one call": lambda i, layer=together, row=row: layer(row),
            }
        )
    for name, t in times.items():
        print(f"{name}: {t['median'] * 1e6:.2f} us (p10 {t['p10'] * 1e6:.2f}, p90 {t['p90'] * 1e6:.2f})")
    print(write("dispatch", times))


if __name__ == "__main__":
    main()
