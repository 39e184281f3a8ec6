"""The slow definition of the layouts, held to files that the peers wrote and to itself; the page, held to both."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import slow_formats as slow

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
GENUINE = {
    "autoawq-gemm": "gemm",
    "autoawq-gemv": "gemv",
    "autoawq-gemv_fast": "gemv_fast",
    "autoround-awq-gemm": "gemm",
    "gptqmodel-awq-gemm": "gemm",
    "gptqmodel-gptq-v1": "gptq",
    "llmcompressor-pack-quantized": "compressed-tensors",
}
WITH_ZEROS = [layout for layout in slow.LAYOUTS if layout != "marlin"]

# n, k and group sizes that a layout can hold: n of 8, 24 and 64, one group and several, groups of 16 where they exist.
SHAPES = {
    "gemm": [(8, 20, -1), (24, 96, 32), (64, 48, 16)],
    "gemv": [(8, 40, -1), (24, 96, 32), (64, 192, 64), (8, 1152, 128)],
    "gemv_fast": [(8, 64, -1), (24, 192, 64), (64, 64, 32)],
    "llm-awq": [(8, 64, -1), (24, 192, 64), (64, 1152, 128)],
    "marlin": [(64, 16, -1), (64, 48, 16), (192, 64, 32)],
    "gptq": [(8, 40, -1), (24, 96, 32), (64, 48, 16)],
    "gptq_v2": [(8, 40, -1), (24, 96, 32), (64, 48, 16)],
    "compressed-tensors": [(1, 7, -1), (13, 20, -1), (24, 96, 32), (64, 48, 16)],
}
CASES = [(layout, *shape) for layout, shapes in SHAPES.items() for shape in shapes]


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, bfloat16 as uint16."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    dtypes = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def random_linear(layout: str, n: int, k: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, z and s that the layout can hold; zeros of 0 and 15 are among z wherever the layout has them."""
    generator = np.random.default_rng([n, k, group_size + 1])
    groups = slow.group_count(k, group_size)[1]
    q = generator.integers(0, 16, (n, k), dtype=np.uint8)
    z = generator.integers(0, 16, (n, groups), dtype=np.uint8)
    z[0], z[-1] = 15, 0
    if layout == "marlin":
        z[:] = 8
    if layout == "gptq":
        z = np.maximum(z, np.uint8(1))
    return q, z, np.exp(generator.normal(-5, 2, (n, groups))).astype(np.float16)


# --- the peers' files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", GENUINE)
def test_the_definition_reads_and_writes_what_the_peers_wrote(folder: str, shared: Path) -> None:
    layout = GENUINE[folder]
    path = shared / "data" / "checkpoints" / folder
    tensors = read_safetensors(path / "model.safetensors")
    expected = json.loads((path / "reference.json").read_text())["weight_float32_sha256"]
    suffix = ".weight_packed" if layout == "compressed-tensors" else ".qweight"
    assert {name.removesuffix(suffix) + ".weight" for name in tensors if name.endswith(suffix)} == set(expected)
    for weight_name, sha256 in expected.items():
        linear = weight_name.removesuffix("weight")
        stored = {name.removeprefix(linear): value for name, value in tensors.items() if name.startswith(linear)}
        assert hashlib.sha256(slow.dequantize(layout, stored, 64).astype("<f4").tobytes()).hexdigest() == sha256
        written = slow.encode(layout, *slow.decode(layout, stored, 64), 64)
        assert written.keys() == stored.keys()
        for name, value in written.items():
            assert value.dtype == stored[name].dtype and value.shape == stored[name].shape, name
            assert value.tobytes() == stored[name].tobytes(), name


# --- the definition itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "n", "k", "group_size"), CASES)
def test_decoding_gives_back_what_was_encoded(layout: str, n: int, k: int, group_size: int) -> None:
    q, z, s = random_linear(layout, n, k, group_size)
    tensors = slow.encode(layout, q, z, s, group_size)
    decoded = slow.decode(layout, tensors, group_size)
    for got, expected in zip(decoded, (q, z, s), strict=True):
        assert got.dtype == expected.dtype and np.array_equal(got, expected)

    repeats = k // s.shape[1]
    exact = (q.astype(np.float64) - z.repeat(repeats, axis=1)) * s.astype(np.float64).repeat(repeats, axis=1)
    weight = slow.dequantize(layout, tensors, group_size)
    assert weight.dtype == np.float32
    if layout in ("gemv_fast", "llm-awq"):
        # What is stored of the zeros is s z rounded to float16; q s and the sum are exact in float32.
        bound = np.maximum(2.0**-11 * z.astype(np.float64) * s, 0).repeat(repeats, axis=1)
        assert (np.abs(weight - exact) <= bound).all() and (weight != exact).any()
    else:
        assert np.array_equal(weight, exact)


@pytest.mark.parametrize(("layout", "n", "k", "group_size"), CASES)
def test_every_code_has_one_place(layout: str, n: int, k: int, group_size: int) -> None:
    places = slow.weight_places(layout, n, k)
    assert np.array_equal(np.sort(places[places >= 0]), np.arange(n * k))
    assert (places >= 0).all() or layout == "compressed-tensors"


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(0, 0x7F800000, 10000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, -x, np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], dtype=np.float32)])
    bits = slow.round_like(x, np.zeros(0, dtype=np.uint16))
    assert np.array_equal(bits, torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(slow.to_float32(bits), torch.from_numpy(x).bfloat16().float().numpy())


def test_symmetric_is_a_zero_of_eight() -> None:
    q, z, s = random_linear("marlin", 64, 32, 16)
    for layout in ("gemm", "marlin", "gptq", "gptq_v2"):
        symmetric, eights = (slow.encode(layout, q, zeros, s, 16) for zeros in (None, z))
        assert all(np.array_equal(symmetric[name], eights[name]) for name in eights)
    assert "weight_zero_point" not in slow.encode("compressed-tensors", q, None, s, 16)
    assert "weight_zero_point" in slow.encode("compressed-tensors", q, z, s, 16)


def test_the_widths_of_padded_zeros() -> None:
    """AutoAWQ's own figures for k = 4096, and a single group of more and of fewer than 128."""
    widths = {128: 4, 64: 8, 32: 16}
    assert {group: slow.zeros_width(group, 4096 // group) for group in widths} == widths
    assert [slow.zeros_width(k, 1) for k in (4096, 128, 64, 32)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("layout", "n", "k", "group_size", "reason"),
    [
        ("gemm", 12, 32, 32, "n must be a multiple of 8, got 12"),
        ("gemm", 8, 48, 32, "32 does not divide k = 48"),
        ("gemv", 8, 36, -1, "k must be a multiple of 8, got 36"),
        ("gemv", 8, 64, 16, "group size of 16 is below 32"),
        ("gemv_fast", 8, 96, 32, "k must be a multiple of 64, got 96"),
        ("llm-awq", 12, 64, 64, "n must be a multiple of 8, got 12"),
        ("llm-awq", 8, 64, 16, "group size of 16 is below 32"),
        ("marlin", 32, 32, 32, "n must be a multiple of 64, got 32"),
        ("marlin", 64, 24, -1, "k must be a multiple of 16, got 24"),
        ("gptq", 8, 20, -1, "k must be a multiple of 8, got 20"),
        ("gptq_v2", 20, 16, 16, "n must be a multiple of 8, got 20"),
    ],
)
def test_shapes_that_a_layout_cannot_hold(layout: str, n: int, k: int, group_size: int, reason: str) -> None:
    groups = k // (k if group_size == -1 else group_size)
    s = np.ones((n, groups), dtype=np.float16)
    with pytest.raises(ValueError, match=reason):
        slow.encode(layout, np.zeros((n, k), dtype=np.uint8), None, s, group_size)


def test_zeros_that_a_layout_cannot_hold() -> None:
    q, z, s = random_linear("gemm", 64, 64, 32)
    with pytest.raises(ValueError, match="every zero must be 8"):
        slow.encode("marlin", q, z, s, 32)
    with pytest.raises(ValueError, match="a zero of 0 cannot be stored"):
        slow.encode("gptq", q, z, s, 32)
    with pytest.raises(ValueError, match="too large for the dtype"):
        slow.encode("gemv_fast", q, z, np.full_like(s, 4368), 32)
    slow.encode("gemv_fast", q, z, np.full_like(s, 4364), 32)


def test_padding_and_zeros_are_checked() -> None:
    def damaged(layout: str, tensor: str, index: tuple[int, int], value: float) -> None:
        q, z, s = random_linear(layout, 8, 128, 64)
        tensors = slow.encode(layout, q, z, s, 64)
        tensors[tensor][index] = value
        slow.decode(layout, tensors, 64)

    for layout, tensor, index in [
        ("gemv", "qzeros", (3, 1)),
        ("gemv", "scales", (3, 2)),
        ("llm-awq", "scales", (2, 3)),
    ]:
        with pytest.raises(ValueError, match="padding must be 0"):
            damaged(layout, tensor, index, 1)
    with pytest.raises(ValueError, match="not the rounded product"):
        damaged("gemv_fast", "qzeros", (1, 7), -1e-7)
    with pytest.raises(ValueError, match=r"outside 0\.\.15"):
        damaged("gemv_fast", "qzeros", (1, 7), 1)
    with pytest.raises(ValueError, match="a scale is 0"):
        damaged("gemv_fast", "scales", (1, 7), 0)
    with pytest.raises(ValueError, match="a stored 15 stands for 16 or for 0"):
        damaged("gptq", "qzeros", (0, 0), -1)


def test_negative_zero_in_padding_is_zero() -> None:
    """llm-awq's repacker from v1 to v2 negates the padding too (tinychat/offline-weight-repacker.py)."""
    q, z, s = random_linear("llm-awq", 8, 128, 64)
    tensors = slow.encode("llm-awq", q, z, s, 64)
    tensors["scaled_zeros"][2:] = -0.0
    assert np.array_equal(slow.decode("llm-awq", tensors, 64)[1], z)


# --- traps that the page describes ----------------------------------------------------------------------------------


def test_the_exllama_zero_point_trap() -> None:
    """Taking 1 from each zero, and taking 1 from each nibble of the word, are different when a zero is 0."""
    zeros = np.array([0, 8, 0, 15, 7, 0, 3, 1], dtype=np.int64)
    places = slow.places_along_n(8, 1, list(range(8)))
    masked = slow.pack(((zeros - 1) & 15).astype(np.uint8)[:, None], places).view(np.uint32).item()
    summed = (
        int(((zeros - 1) << 4 * np.arange(8)).sum()) & 0xFFFFFFFF
    )  # AutoAWQ awq/utils/packing_utils.py pack_exllama
    assert (masked, summed) == (0x02F6EF7F, 0x01F6DF6F)
    read = [((summed >> 4 * i & 15) + 1) & 15 for i in range(8)]
    assert read == [0, 7, 0, 14, 7, 0, 2, 1]
    page = PAGE.read_text(encoding="utf-8")
    assert f"{masked:#010x}" in page and f"{summed:#010x}" in page and ", ".join(map(str, read)) in page


def test_a_square_linear_in_gemm_and_in_gemv_differs_in_the_scales_only() -> None:
    q, z, s = random_linear("gemm", 64, 64, 32)
    gemm, gemv = (slow.encode(layout, q, z, s, 32) for layout in ("gemm", "gemv"))
    assert gemm["qweight"].shape == gemv["qweight"].shape and gemm["qweight"].dtype == gemv["qweight"].dtype
    assert gemm["scales"].shape == (2, 64) and gemv["scales"].shape == (64, 32)


def test_zeros_of_gemv_fast_are_told_apart() -> None:
    """The largest error of a zero that is read back, in units of the scale: the page's figures."""
    z = np.arange(1, 16, dtype=np.uint8)[:, None]
    largest = {}
    for name, s in {
        "float16": np.arange(0x3C00, 0x4000, dtype=np.uint16).view(np.float16)[None],
        "bfloat16": np.arange(0x3F80, 0x4000, dtype=np.uint16)[None],
    }.items():
        zeros = slow.to_float32(slow.scaled_zeros(np.broadcast_to(s, (15, s.shape[1])), z))
        largest[name] = float(np.abs(-zeros.astype(np.float64) / slow.to_float32(s) - z).max())
    assert largest["float16"] <= 15 * 2.0**-11 and largest["bfloat16"] <= 15 * 2.0**-8 < 0.5
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"{value:.4f}" in page for value in largest.values()), largest


# --- the page -------------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """The text under each heading of the page that is a layout's name."""
    parts = re.split(r"^## `?([^`\n]+)`?$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name in slow.LAYOUTS}


def tensor_table(text: str) -> dict[str, tuple[str, str]]:
    """The dtype and the shape that a section's table of tensors gives, by the tensor's name."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| `(\[[^`]*\])` \|", text, flags=re.M)
    return {name: (dtype.strip(), shape) for name, dtype, shape in rows}


def test_the_page_describes_every_layout() -> None:
    assert set(sections()) == set(slow.LAYOUTS)


@pytest.mark.parametrize(("layout", "n", "k", "group_size"), CASES)
def test_the_page_gives_the_names_dtypes_and_shapes_of_the_tensors(
    layout: str, n: int, k: int, group_size: int
) -> None:
    q, z, s = random_linear(layout, n, k, group_size)
    group, groups = slow.group_count(k, group_size)
    tensors = slow.encode(layout, q, z, s, group_size)
    table = tensor_table(sections()[layout])
    assert set(table) - {"bias"} == set(tensors)
    sizes: dict[str, object] = {"n": Fraction(n), "k": Fraction(k), "G": Fraction(groups), "ceil": math.ceil}
    if "ZW" in "".join(shape for _, shape in table.values()):
        sizes["ZW"] = Fraction(slow.zeros_width(group, groups))
    for name, tensor in tensors.items():
        dtype, shape = table[name]
        assert eval(shape, {"__builtins__": {}}, dict(sizes)) == list(tensor.shape), (name, shape)
        assert tensor.dtype.name in dtype.split(", "), (name, dtype)


@pytest.mark.parametrize(("layout", "n", "k", "group_size"), CASES)
def test_the_page_gives_the_place_of_each_code(layout: str, n: int, k: int, group_size: int) -> None:
    """Where q[r, c], z[r, t] and marlin's s[r, t] are by the page's formulas, against the peers' steps."""
    group, groups = slow.group_count(k, group_size)
    names = {"NIBBLE": [slow.AWQ_ORDER.index(i) for i in range(8)]}
    found: dict[str, dict[tuple[int, ...], tuple[int, int]]] = {}
    line = r"^`([qzs])\[r, [ct]\]` is (?:nibble `(.+)` of )?`\w+(\[.+?\])`(?: if G ([=>]) 1)?\.$"
    for letter, nibble, word, one in re.findall(line, sections()[layout], flags=re.M):
        if one == ("=" if groups > 1 else ">"):
            continue
        for r in range(n):
            for c in range(k if letter == "q" else groups):
                variables = {**names, "r": r, "c": c, "t": c}
                place = [
                    *eval(word, {"__builtins__": {}}, variables),
                    eval(nibble or "0", {"__builtins__": {}}, variables),
                ]
                found.setdefault(letter, {})[tuple(place)] = (r, c)
    expected = {"q": slow.weight_places(layout, n, k)}
    if layout in ("gemm", "gemv", "gptq", "gptq_v2", "compressed-tensors"):
        expected["z"] = slow.zero_places(layout, n, groups, group)
    if layout == "marlin":
        numbers = np.arange(n * groups).reshape(n, groups)
        order = slow.marlin_scale_order(groups)
        expected["s"] = numbers.T.reshape(-1, len(order))[:, order].reshape(groups, n, 1)
    assert found.keys() >= expected.keys()
    for letter, places in expected.items():
        columns = k if letter == "q" else groups
        assert len(found[letter]) == n * columns
        for place, (r, c) in found[letter].items():
            assert places[place] == r * columns + c, (letter, r, c)


@pytest.mark.parametrize("layout", slow.LAYOUTS)
def test_the_page_draws_the_first_word(layout: str) -> None:
    """Each nibble of the drawing, from the highest, as the output channel and the input that it adds."""
    n, k, _ = SHAPES[layout][-1]
    drawing = next(line for line in sections()[layout].splitlines() if re.match(r" +\| +[rc]", line) or "| r+8" in line)
    drawn = []
    for cell in drawing.strip().strip("|").split("|"):
        offsets = dict(re.findall(r"([rc])(?:\+(\d+))?", cell))
        drawn.append((int(offsets.get("r") or 0), int(offsets.get("c") or 0)))
    first = slow.weight_places(layout, n, k)[0, 0]
    assert drawn[::-1] == [divmod(int(code), k) for code in first]


def told_apart(shapes: dict[str, tuple[int, ...]], words: str) -> set[str]:
    """The page's rules, from the shapes of a linear's tensors and the dtype of its words."""
    if "weight_packed" in shapes:
        return {"compressed-tensors"}
    if words == "int16":
        return {"llm-awq" if "scaled_zeros" in shapes else "gemv_fast"}
    (rows, columns), (scale_rows, scale_columns) = shapes["qweight"], shapes["scales"]
    if "qzeros" not in shapes:
        return {"marlin"} if columns == 2 * scale_columns else set()
    if scale_rows == rows and scale_columns == 8 * shapes["qzeros"][1]:
        return {"gemv"}
    if scale_columns == columns:
        return {"gptq", "gptq_v2"}
    return {"gemm"} if scale_columns == 8 * columns else set()


def test_the_rules_of_the_page_tell_layouts_apart() -> None:
    """For every shape of up to 256 channels, and for the shapes of real models."""
    sizes = [(n, k) for n in (8, 16, 24, 32, 64, 96, 128, 256) for k in (16, 32, 64, 96, 128, 192, 256)]
    told = 0
    for n, k in [*sizes, (4096, 4096), (11008, 4096), (4096, 11008), (1024, 5120)]:
        for group_size in (-1, 16, 32, 64, 128):
            for layout in slow.LAYOUTS:
                try:
                    group, groups = slow.group_count(k, group_size)
                    width = slow.zeros_width(group, groups) if layout in ("gemv", "gemv_fast", "llm-awq") else 0
                    slow.weight_places(layout, min(n, 256), min(k, 256))
                except ValueError:
                    continue
                names = {
                    "n": Fraction(n),
                    "k": Fraction(k),
                    "G": Fraction(groups),
                    "ZW": Fraction(width),
                    "ceil": math.ceil,
                }
                table = tensor_table(sections()[layout])
                shapes = {name: tuple(eval(shape, {"__builtins__": {}}, names)) for name, (_, shape) in table.items()}
                words = "int16" if layout in ("gemv_fast", "llm-awq") else "int32"
                assert layout in told_apart(shapes, words), (layout, n, k, group_size)
                told += 1
    assert told > 1000
