"""torch.compile, torch.export and AOTInductor: the operators are ordinary nodes, and m is never specialised."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from awq_ext import AwqLinear, _library

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
ROWS = torch.export.Dim("rows", min=1, max=4096)

# What a process without the Python package does: load the operators, load the compiled model, run it.
RUN_PACKAGE = """
import sys, torch
library, package, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(package)
torch.save([model(x) for x in torch.load(inputs)], outputs)
assert "awq_ext" not in sys.modules
"""


def small_model() -> nn.Module:
    torch.manual_seed(0)
    up = AwqLinear.from_linear(nn.Linear(64, 96), group_size=32)
    down = AwqLinear.from_linear(nn.Linear(96, 64, bias=False), group_size=-1)
    return nn.Sequential(up, nn.SiLU(), down).eval()


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(small_model(), (torch.randn(3, 64),), dynamic_shapes=({0: ROWS},))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Inductor computes SiLU in its own way, so only the last bits may differ."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_compiled_layer_equals_eager_for_every_m() -> None:
    torch.manual_seed(0)
    layer = AwqLinear.from_linear(nn.Linear(64, 96), group_size=32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for m in (2, 3, 5, 17, 70):
            x = torch.randn(m, 64)
            assert torch.equal(compiled(x), layer(x))


def test_compiled_model_is_close_to_eager() -> None:
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((1, 64), (4, 64), (2, 3, 64)):
            x = torch.randn(shape)
            assert_close(compiled(x), model(x))


def test_symbolic_trace_keeps_the_layer_whole() -> None:
    model = nn.Sequential(AwqLinear.from_linear(nn.Linear(64, 24), 16), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"] == ["linear"]
    assert traced.state_dict().keys() == {f"0.{name}" for name in ("qweight", "scales", "qzeros", "bias")}
    for m in (1, 5):
        x = torch.randn(m, 64)
        assert torch.equal(traced(x), model(x))


def test_compiled_gradient() -> None:
    torch.manual_seed(0)
    layer = AwqLinear.from_linear(nn.Linear(64, 96), group_size=32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x, weights = torch.randn(5, 64), torch.randn(5, 96)
    gradients = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        (run(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_in_compile() -> None:
    model = small_model()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        got = compiled(x)
    assert expected.dtype == torch.bfloat16
    assert_close(got, expected)


def test_export_keeps_the_operator_and_a_dynamic_batch(exported: torch.export.ExportedProgram) -> None:
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.awq_ext.linear.default) == 2
    model = small_model()
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    with torch.no_grad():
        for program in (exported, torch.export.load(buffer)):
            for m in (1, 2, 31):
                x = torch.randn(m, 64)
                assert torch.equal(program.module()(x), model(x))


def test_aot_inductor_package_runs_where_only_the_library_is_loaded(
    exported: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    inputs = [torch.randn(1, 64), torch.randn(2, 64), torch.randn(37, 64)]
    torch.save(inputs, tmp_path / "inputs.pt")
    library = _library.loaded()[_library.OPS_LIBRARY]
    arguments = [library, package, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    subprocess.run([sys.executable, "-c", RUN_PACKAGE, *arguments], check=True, timeout=300, cwd=tmp_path)
    model = small_model()
    with torch.no_grad():
        for x, y in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
            assert_close(y, model(x))
