"""TorchScript: modules and functions that use the operators script, save, and run where awq_ext is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from awq_ext import AwqLinear, _library

pytestmark = [
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript is not supported on Python 3.14 and later"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]

# What a process without the Python package does: load the operators, load the module, run it.
RUN_MODULE = """
import sys, torch
library, module, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
with torch.no_grad():
    torch.save([torch.jit.load(module)(x) for x in torch.load(inputs)], outputs)
assert "awq_ext" not in sys.modules
"""


class Mlp(nn.Module):
    """An AwqLinear among ordinary modules, used twice, once without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = AwqLinear.from_linear(nn.Linear(64, 96), group_size=32)
        self.norm = nn.LayerNorm(96)
        self.down = AwqLinear.from_linear(nn.Linear(96, 64, bias=False), group_size=-1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


def every_op(w: Tensor, x: Tensor) -> list[Tensor]:
    """Each operator of the schema page once, as packets, which is what TorchScript can call."""
    gram = x.t() @ x / x.size(0)
    scale, losses = torch.ops.awq_ext.search_scale(w, x.abs().mean(0), gram, group_size=32, grid=3)
    range = torch.ops.awq_ext.search_clip(w, gram, group_size=32, grid=3)
    q, scales, zeros = torch.ops.awq_ext.quantize(w, group_size=32, range=range)
    qweight = torch.ops.awq_ext.pack(q)
    qzeros = torch.ops.awq_ext.pack(zeros)
    gptq = torch.ops.awq_ext.repack(qweight, src="gemm", dst="gptq")
    codes = torch.ops.awq_ext.unpack(gptq, layout="gptq")
    scales = scales.t().contiguous()
    y = torch.ops.awq_ext.linear(x, qweight, scales, qzeros, group_size=32)
    weight = torch.ops.awq_ext.dequantize(qweight, scales, qzeros, group_size=32, dtype=torch.float32)
    return [scale, losses, range, q, qweight, qzeros, gptq, codes, scales, y, weight]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scripted_module_gives_the_same_bytes(bias: bool, dtype: torch.dtype) -> None:
    layer = AwqLinear.from_linear(nn.Linear(64, 72, bias=bias), group_size=32)
    scripted = torch.jit.script(layer)
    for shape in [(64,), (1, 64), (7, 64), (2, 3, 64), (0, 64)]:
        x = torch.randn(shape).to(dtype)
        assert torch.equal(scripted(x), layer(x))


def test_saved_module_runs_where_only_the_library_is_loaded(tmp_path: Path) -> None:
    model = Mlp().eval()
    inputs = [torch.randn(1, 64), torch.randn(9, 64), torch.randn(2, 5, 64)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    paths = [tmp_path / name for name in ("module.pt", "inputs.pt", "outputs.pt")]
    torch.jit.script(model).save(str(paths[0]))
    torch.save(inputs, paths[1])
    library = _library.loaded()[_library.OPS_LIBRARY]
    subprocess.run([sys.executable, "-c", RUN_MODULE, library, *paths], check=True, timeout=300, cwd=tmp_path)
    outputs = torch.load(paths[2])
    assert len(outputs) == len(expected)
    assert all(torch.equal(output, y) for output, y in zip(outputs, expected, strict=True))


def test_frozen_module_gives_the_same_bytes() -> None:
    model = Mlp().eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(torch.jit.freeze(torch.jit.script(model))(x), model(x))


def test_traced_module_takes_other_batch_sizes() -> None:
    model = Mlp().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 64))
        x = torch.randn(11, 64)
        assert torch.equal(traced(x), model(x))


def test_scripted_function_calls_every_op() -> None:
    w, x = torch.randn(16, 64), torch.randn(10, 64)
    expected = every_op(w, x)
    got = torch.jit.script(every_op)(w, x)
    assert len(got) == len(expected)
    for index, (mine, eager) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, eager), f"result {index}"


def test_errors_keep_their_text() -> None:
    scripted = torch.jit.script(AwqLinear.from_linear(nn.Linear(64, 72), group_size=32))
    with pytest.raises(RuntimeError, match=r"awq_ext::linear: x must be \[\.\.\., in_features\] = \[\.\.\., 64\]"):
        scripted(torch.randn(3, 65))
