"""What one call costs before any arithmetic: the smallest linear, through the operator, the module and torch's own."""

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
    for name, t in times.items():
        print(f"{name}: {t['median'] * 1e6:.2f} us (p10 {t['p10'] * 1e6:.2f}, p90 {t['p90'] * 1e6:.2f})")
    print(write("dispatch", times))


if __name__ == "__main__":
    main()
