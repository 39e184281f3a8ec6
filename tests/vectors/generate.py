"""Writes the test vectors beside this file: `python tests/vectors/generate.py`. README.md says how to read them.

Codes come from SHAKE-256 of the case's name, so that the files are the same on every machine and with every version.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import slow_formats as slow  # noqa: E402

DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}
NAMES = {"int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16", "uint16": "BF16", "float32": "F32"}

# Zeros that show whether a reader takes one from each zero by itself: 0 - 1 must not borrow from its neighbour.
TRAP = [0, 8, 0, 15, 7, 0, 3, 1]


@dataclass
class Case:
    name: str
    why: str
    n: int
    k: int
    group_size: int
    dtype: str = "F16"
    zeros: str = "random"  # or: trap, extreme, none


EXTREME = "codes and zeros of 0 and 15 only; the smallest, the largest and a negative scale"
ONE_GROUP = "group size -1: one group a row"
SQUARE = "n = k, where the shapes of gemm's and gemv's qweight are the same"
BF16 = "scales in bfloat16"
TRAP_WHY = "the zeros 0 8 0 15 7 0 3 1 in each word: taking 1 from the whole word borrows from neighbours"

CASES = {
    "gemm": [
        Case("plain", "as AutoAWQ writes it", 32, 64, 32),
        Case("odd", "n is no multiple of 32 and k none of 8", 24, 20, -1),
        Case("square", SQUARE, 32, 32, 32),
        Case("trap", TRAP_WHY, 8, 64, 16, zeros="trap"),
        Case("extremes", EXTREME, 16, 32, 16, zeros="extreme"),
        Case("bfloat16", BF16 + ", as GPTQModel writes them", 16, 64, 32, "BF16"),
        Case("symmetric", "every zero is 8", 8, 32, 32, zeros="none"),
    ],
    "gemv": [
        Case("plain", "two groups in a width of 2 words (group size 64)", 16, 128, 64),
        Case("odd", "five groups in a width of 4 words (group size 32)", 24, 160, 32),
        Case("square", SQUARE, 32, 32, 32),
        Case("one_group", ONE_GROUP + ", in a width of 1 word (128 or more)", 8, 128, -1),
        Case("nine_groups", "nine groups in a width of 2 words (group size 128)", 8, 1152, 128),
        Case("trap", TRAP_WHY, 8, 256, 32, zeros="trap"),
        Case("extremes", EXTREME, 16, 64, 32, zeros="extreme"),
    ],
    "gemv_fast": [
        Case("plain", "one word of zeros' width is 8 rows; group size 128", 8, 256, 128),
        Case("odd", "n is no multiple of 16, k an odd multiple of 64", 24, 192, 64),
        Case("one_group", ONE_GROUP, 8, 64, -1),
        Case("trap", "the product stored for a zero of 0 is -0", 8, 256, 32, zeros="trap"),
        Case("extremes", EXTREME, 16, 64, 32, zeros="extreme"),
    ],
    "llm-awq": [
        Case("plain", "the tensors of gemv_fast with another name for the zeros", 8, 256, 128),
        Case("bfloat16", BF16, 24, 192, 64, "BF16"),
        Case("extremes", EXTREME, 16, 64, 32, "BF16", zeros="extreme"),
    ],
    "marlin": [
        Case("plain", "two groups: scales are permuted in blocks of 64", 64, 64, 32, zeros="none"),
        Case("odd", "n is an odd multiple of 64, k of 16", 192, 16, 16, zeros="none"),
        Case("one_group", ONE_GROUP + ": scales are permuted in blocks of 32", 64, 32, -1, zeros="none"),
    ],
    "gptq": [
        Case("plain", "as AutoGPTQ writes it", 32, 64, 32),
        Case("odd", "n is no multiple of 32, k none of 32", 24, 48, 16),
        Case("one_group", ONE_GROUP, 8, 40, -1),
        Case("extremes", EXTREME + "; zeros of 1 in place of 0, which cannot be stored", 16, 32, 16, zeros="extreme"),
    ],
    "gptq_v2": [
        Case("plain", "zeros as they are", 32, 64, 32),
        Case("odd", "n is no multiple of 32, k none of 32", 24, 48, 16),
        Case("trap", TRAP_WHY, 8, 64, 16, zeros="trap"),
        Case("extremes", EXTREME, 16, 32, 16, zeros="extreme"),
    ],
    "compressed-tensors": [
        Case("plain", "asymmetric", 16, 128, 64),
        Case("symmetric", "no weight_zero_point", 16, 64, 32, zeros="none"),
        Case("odd", "neither n nor k is a multiple of 8: the last words of rows and of columns are padded", 13, 20, -1),
        Case("trap", TRAP_WHY, 8, 64, 16, zeros="trap"),
        Case("extremes", EXTREME, 16, 32, 16, zeros="extreme"),
        Case("bfloat16", BF16, 8, 64, 32, "BF16"),
        Case("float32", "scales in float32, as llm-compressor writes them for a float32 model", 8, 64, 32, "F32"),
    ],
}


def random_bytes(name: str, count: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(count), dtype=np.uint8)


def random_scales(name: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Positive and of the size of real scales, every bit of the mantissa in use."""
    size = shape[0] * shape[1]
    if dtype == "F32":
        bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * size), dtype="<u4") % 0x03000000 + 0x3A000000
        return bits.astype(np.uint32).view(np.float32).reshape(shape)
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * size), dtype="<u2")
    if dtype == "F16":
        return (bits % 0x1800 + 0x1000).astype(np.uint16).view(np.float16).reshape(shape)  # 2^-11 to 2^-5
    return (bits % 0x0300 + 0x3A00).astype(np.uint16).reshape(shape)  # 2^-11 to 2^-5


def extreme_scales(layout: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """The smallest scale, the smallest normal one, a negative one, and one so large that 15 times it is still finite:
    in float32 or, where the product with a zero is stored, in the scales' dtype."""
    if dtype == "BF16":
        return np.resize(np.array([0x0001, 0x0080, 0xBC00, 0x7D00], dtype=np.uint16), shape)
    largest = 0x6C43 if layout == "gemv_fast" else 0x7BFF  # 4364, 65504
    return np.resize(np.array([0x0001, 0x0400, 0xA400, largest], dtype=np.uint16), shape).view(np.float16)


def make(layout: str, case: Case) -> dict[str, object]:
    name = f"{layout} {case.name}"
    groups = slow.group_count(case.k, case.group_size)[1]
    shape, grouped = (case.n, case.k), (case.n, groups)
    q = random_bytes(f"{name} codes", case.n * case.k).reshape(shape) % np.uint8(16)
    s = random_scales(f"{name} scales", grouped, case.dtype)
    row, column = np.indices(grouped)
    if case.zeros == "trap":
        z = np.array(TRAP, dtype=np.uint8)[(row + column) % 8]
    elif case.zeros == "extreme":
        q = q // np.uint8(8) * np.uint8(15)
        z = ((row // 4 + column) % 2 * 15).astype(np.uint8)
        s = extreme_scales(layout, grouped, case.dtype)
    elif case.zeros == "none":
        z = np.full(grouped, slow.SYMMETRIC_ZERO, dtype=np.uint8)
    else:
        z = random_bytes(f"{name} zeros", case.n * groups).reshape(grouped) % np.uint8(16)
    if layout == "gptq":
        z = np.maximum(z, np.uint8(1))
    tensors = slow.encode(layout, q, None if case.zeros == "none" else z, s, case.group_size)
    weight = slow.dequantize(layout, tensors, case.group_size)
    return {
        "name": case.name,
        "why": case.why,
        "shape": [case.n, case.k],
        "group_size": case.group_size,
        "codes": digits(q),
        "zeros": digits(z),
        "scales": {"dtype": case.dtype, "bits": rows(s)},
        "tensors": {
            key: {
                "dtype": NAMES[value.dtype.name],
                "shape": list(value.shape),
                "data": rows(value),
                "sha256": sha256(value),
            }
            for key, value in sorted(tensors.items())
        },
        "weight_float32_sha256": sha256(weight),
    }


def digits(codes: np.ndarray) -> list[str]:
    """A string a row, a hexadecimal digit a code."""
    return ["".join(f"{code:x}" for code in row) for row in codes]


def rows(values: np.ndarray) -> list[str]:
    """A string a row, each value's bits as a hexadecimal number."""
    bits = values.view(f"u{values.itemsize}")
    return [" ".join(f"{x:0{2 * values.itemsize}x}" for x in row) for row in np.atleast_2d(bits)]


def sha256(values: np.ndarray) -> str:
    """Of the bytes as they lie in a file: row by row, each value little end first."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def files() -> dict[str, str]:
    """The text of each file, by its name."""
    contents = {
        layout: {"layout": layout, "cases": [make(layout, case) for case in cases]} for layout, cases in CASES.items()
    }
    return {f"{layout}.json": json.dumps(content, indent=1) + "\n" for layout, content in contents.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")
