"""What every 4-bit layout stores, in plain numpy: slow, obvious, and independent of awq_ext, which it never imports.

n = out_features, k = in_features, G = k / group_size (group_size -1 means k). Codes q are uint8 [n, k] and zeros z
uint8 [n, G], all in 0..15; scales s are [n, G], as float16, float32, or uint16 for the bits of bfloat16. The weight is
W[n, k] = (q[n, k] - z[n, k // group_size]) * s[n, k // group_size].

A layout's weight words are defined by their `places`: an array [rows, columns, codes per word] of indices into q's
elements, where nibble i (bits 4i to 4i+3) of word [r, c] holds the code number places[r, c, i]; -1 is padding, stored
as 0. The places come from the reshapes, transpositions and permutations that the writers of each layout apply to the
codes, here applied to the codes' numbers. `encode` and `decode` follow the same places in opposite directions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Tensors = dict[str, Array]  # by the name behind "<linear>."; bfloat16 as uint16

LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "gptq", "gptq_v2", "compressed-tensors")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SYMMETRIC_ZERO = 8


# --- numbers --------------------------------------------------------------------------------------------------------


def to_float32(x: Array) -> NDArray[np.float32]:
    """float16, float32 or bfloat16 (bits in uint16) as float32, exactly."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def round_like(x: NDArray[np.float32], like: Array) -> Array:
    """float32 rounded to nearest, ties to even, in the dtype of `like`. An infinity comes of what is too large."""
    if like.dtype == np.uint16:
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return x.astype(like.dtype)


def negated(x: Array) -> Array:
    return x ^ np.uint16(0x8000) if x.dtype == np.uint16 else -x


def group_count(k: int, group_size: int) -> tuple[int, int]:
    """Codes per group and groups per row."""
    group = k if group_size == -1 else group_size
    if group < 1 or k % group != 0:
        raise ValueError(f"a group size of {group_size} does not divide k = {k}")
    return group, k // group


def zeros_width(group: int, groups: int) -> int:
    """ZW: words of zeros in a row of gemv. AutoAWQ awq/modules/linear/gemv.py calculate_zeros_width."""
    if group >= 128:
        multiple = 1
    elif group >= 64:
        multiple = 2
    elif group >= 32:
        multiple = 4
    else:
        raise ValueError(f"a group size of {group} is below 32, where the width of the zeros is not defined")
    words = (groups + 7) // 8
    return (words + multiple - 1) // multiple * multiple


# --- places: which code each nibble holds ---------------------------------------------------------------------------


def numbered(n: int, k: int, padded_n: int = 0, padded_k: int = 0) -> NDArray[np.int64]:
    """0, 1, 2, ... as [n, k] row by row, and -1 where padding makes it larger."""
    numbers = np.full((max(n, padded_n), max(k, padded_k)), -1, dtype=np.int64)
    numbers[:n, :k] = np.arange(n * k).reshape(n, k)
    return numbers


def up_to_eight(x: int) -> int:
    return (x + 7) // 8 * 8


def need(layout: str, what: str, value: int, multiple: int) -> None:
    if value % multiple != 0:
        raise ValueError(f"{layout}: {what} must be a multiple of {multiple}, got {value}")


def places_along_n(n: int, k: int, order: list[int]) -> NDArray[np.int64]:
    """gemm's codes and zeros, GPTQ's zeros: [k, n/8, 8]. AutoAWQ awq/modules/linear/gemm.py from_linear."""
    return numbered(n, k).T.reshape(k, n // 8, 8)[:, :, order]


def places_along_k(n: int, k: int, padded_k: int = 0) -> NDArray[np.int64]:
    """gemv's codes and zeros, compressed-tensors' codes: [n, k/8, 8]. AutoAWQ awq/modules/linear/gemv.py."""
    numbers = numbered(n, k, padded_k=padded_k)
    return numbers.reshape(n, numbers.shape[1] // 8, 8)


def places_gptq(n: int, k: int) -> NDArray[np.int64]:
    """Eight rows of the transposed codes on top of one another: [k/8, n, 8]. AutoGPTQ qlinear_cuda.py pack."""
    return numbered(n, k).T.reshape(k // 8, 8, n).transpose(0, 2, 1)


def places_down_n(n: int, groups: int) -> NDArray[np.int64]:
    """compressed-tensors' zeros: [ceil(n/8), G, 8]. pack_quantized/helpers.py pack_to_int32, packed_dim=0."""
    rows = up_to_eight(n)
    return numbered(n, groups, padded_n=rows).reshape(rows // 8, 8, groups).transpose(0, 2, 1)


def places_fast(n: int, k: int) -> NDArray[np.int64]:
    """gemv_fast and llm-awq v2: [n/4, k, 4]. llm-awq awq/quantize/qmodule.py pack_intweight, step by step."""
    x = numbered(n, k)
    # Of every 32 codes, four runs of eight: first the first pair of each run, then the second pair of each, ...
    run, pair, half = 4, 4, 2
    x = x.reshape(n, k // 32, run, pair, half).swapaxes(2, 3)
    # Of the four pairs that came together: first their even members, then their odd ones.
    x = x.swapaxes(3, 4).reshape(n, k)
    # Four rows take turns, 64 codes each.
    x = x.reshape(n // 4, 4, k // 64, 64).swapaxes(1, 2)
    # Four codes a word.
    return x.reshape(n // 4, k, 4)


def places_marlin(n: int, k: int) -> NDArray[np.int64]:
    """[k/16, 2n, 8]. AutoAWQ awq/modules/linear/marlin.py, IST-DASLab/marlin marlin/__init__.py pack, step by step."""
    # Tiles of 16 x 16 of the transposed codes, each tile row by row, side by side.
    x = numbered(n, k).T.reshape(k // 16, 16, n // 16, 16).transpose(0, 2, 1, 3).reshape(k // 16, 16 * n)
    # Within four tiles, the order in which the 32 threads of a warp want them.
    order = []
    for thread in range(32):
        first = 2 * (thread % 4)
        for tile in range(4):
            eight = [
                256 * tile + 16 * row + thread // 4 + 8 * right
                for right in (0, 1)
                for row in (first, first + 1, first + 8, first + 9)
            ]
            order += [eight[i] for i in AWQ_ORDER]
    return x.reshape(-1, 1024)[:, order].reshape(k // 16, 2 * n, 8)


def marlin_scale_order(groups: int) -> list[int]:
    """Column j of a block of scales holds the channel order[j]: blocks of 64, or of 32 for one group."""
    if groups == 1:
        return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return [i + 8 * j for i in range(8) for j in range(8)]


def weight_places(layout: str, n: int, k: int) -> NDArray[np.int64]:
    """Which code each nibble of the weight's words holds. Raises ValueError for a shape that the layout cannot hold."""
    if layout == "gemm":
        need(layout, "n", n, 8)
        return places_along_n(n, k, AWQ_ORDER)
    if layout == "gemv":
        need(layout, "n", n, 8)  # the words do not ask for it, AutoAWQ does
        need(layout, "k", k, 8)
        return places_along_k(n, k)
    if layout in ("gemv_fast", "llm-awq"):
        need(layout, "n", n, 8)  # the words ask for 4, both projects for 8
        need(layout, "k", k, 64)
        return places_fast(n, k)
    if layout == "marlin":
        need(layout, "n", n, 64)
        need(layout, "k", k, 16)
        return places_marlin(n, k)
    if layout in ("gptq", "gptq_v2"):
        need(layout, "n", n, 8)  # for the zeros
        need(layout, "k", k, 8)
        return places_gptq(n, k)
    if layout == "compressed-tensors":
        return places_along_k(n, k, padded_k=up_to_eight(k))
    raise ValueError(f"no layout is called {layout!r}")


def zero_places(layout: str, n: int, groups: int, group: int) -> NDArray[np.int64]:
    """Which zero each nibble of the zeros' words holds, where zeros are words."""
    if layout == "gemm":
        return places_along_n(n, groups, AWQ_ORDER)
    if layout == "gemv":
        return places_along_k(n, groups, padded_k=8 * zeros_width(group, groups))
    if layout in ("gptq", "gptq_v2"):
        return places_along_n(n, groups, list(range(8)))
    if layout == "compressed-tensors":
        return places_down_n(n, groups)
    raise ValueError(f"the zeros of {layout!r} are not words")


# --- words ----------------------------------------------------------------------------------------------------------


def pack(codes: Array, places: NDArray[np.int64]) -> Array:
    """Words of 4 bits a code, little end first: int32, or int16 if four codes make a word."""
    nibbles = np.append(codes.reshape(-1), np.uint8(0))[places]  # place -1 is the 0 appended
    words = np.zeros(places.shape[:2], dtype=np.uint32)
    for i in range(places.shape[2]):
        words |= nibbles[:, :, i].astype(np.uint32) << np.uint32(4 * i)
    return words.astype(np.uint16).view(np.int16) if places.shape[2] == 4 else words.view(np.int32)


def unpack(words: Array, places: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The codes uint8 of that shape. Raises ValueError for words of another shape and for padding that is not 0."""
    if words.shape != places.shape[:2]:
        raise ValueError(f"words must be {places.shape[:2]}, got {words.shape}")
    bits = words.view(np.uint16 if places.shape[2] == 4 else np.uint32)
    codes = np.zeros(shape[0] * shape[1], dtype=np.uint8)
    for i in range(places.shape[2]):
        nibbles = ((bits >> (4 * i)) & 15).astype(np.uint8)
        padding = places[:, :, i] == -1
        if nibbles[padding].any():
            raise ValueError("padding must be 0")
        codes[places[:, :, i][~padding]] = nibbles[~padding]
    return codes.reshape(shape)


# --- whole linears --------------------------------------------------------------------------------------------------


def encode(layout: str, q: Array, z: Array | None, s: Array, group_size: int) -> Tensors:
    """The tensors of one linear as the layout stores them. z None: symmetric, that is, every zero is 8.

    Raises ValueError for what the layout cannot hold.
    """
    n, k = q.shape
    group, groups = group_count(k, group_size)
    weight = pack(q, weight_places(layout, n, k))
    symmetric = z is None
    if z is None:
        z = np.full((n, groups), SYMMETRIC_ZERO, dtype=np.uint8)
    if s.shape != (n, groups) or z.shape != (n, groups):
        raise ValueError(f"scales and zeros must be {(n, groups)}, got {s.shape} and {z.shape}")

    if layout == "compressed-tensors":
        tensors = {"weight_packed": weight, "weight_scale": s, "weight_shape": np.array([n, k], dtype=np.int64)}
        if not symmetric:
            tensors["weight_zero_point"] = pack(z, zero_places(layout, n, groups, group))
        return tensors
    if layout == "gemm":
        return {"qweight": weight, "qzeros": pack(z, zero_places(layout, n, groups, group)), "scales": s.T.copy()}
    if layout == "gemv":
        scales = np.zeros((n, 8 * zeros_width(group, groups)), dtype=s.dtype)
        scales[:, :groups] = s
        return {"qweight": weight, "qzeros": pack(z, zero_places(layout, n, groups, group)), "scales": scales}
    if layout in ("gemv_fast", "llm-awq"):
        if s.dtype == np.float32:
            raise ValueError(f"{layout}: scales must be float16 or bfloat16")
        rows = 8 * zeros_width(group, groups)
        scales, zeros = np.zeros((rows, n), dtype=s.dtype), np.zeros((rows, n), dtype=s.dtype)
        scales[:groups] = s.T
        zeros[:groups] = scaled_zeros(s, z).T
        if not np.isfinite(to_float32(zeros)).all():
            raise ValueError(f"{layout}: scale * zero is too large for the dtype of the scales")
        return {"qweight": weight, "scaled_zeros" if layout == "llm-awq" else "qzeros": zeros, "scales": scales}
    if layout == "marlin":
        if (z != SYMMETRIC_ZERO).any():
            raise ValueError("marlin: every zero must be 8")
        order = marlin_scale_order(groups)
        return {"qweight": weight, "scales": s.T.reshape(-1, len(order))[:, order].reshape(groups, n)}
    if layout == "gptq":
        if (z == 0).any():
            raise ValueError("gptq: a zero of 0 cannot be stored, because zeros are stored minus one")
        z = z - np.uint8(1)
    return {
        "qweight": weight,
        "qzeros": pack(z, zero_places(layout, n, groups, group)),
        "scales": s.T.copy(),
        "g_idx": (np.arange(k) // group).astype(np.int32),
    }


def scaled_zeros(s: Array, z: Array) -> Array:
    """-(s z), with s z rounded to the dtype of s; so -0 where z is 0 and s is positive."""
    return negated(round_like(to_float32(s) * z.astype(np.float32), s))


def decode(layout: str, tensors: Tensors, group_size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Array]:
    """q [n, k], z [n, G] and s [n, G] of one linear; a symmetric linear's z is 8 everywhere.

    Raises ValueError if the tensors are not what `encode` writes for any q, z and s.
    """
    if layout == "compressed-tensors":
        n, k = (int(size) for size in tensors["weight_shape"])
    elif layout in ("gemv_fast", "llm-awq"):
        n, k = 4 * tensors["qweight"].shape[0], tensors["qweight"].shape[1]
    elif layout == "marlin":
        n, k = tensors["qweight"].shape[1] // 2, 16 * tensors["qweight"].shape[0]
    elif layout == "gemm":
        n, k = 8 * tensors["qweight"].shape[1], tensors["qweight"].shape[0]
    elif layout == "gemv":
        n, k = tensors["qweight"].shape[0], 8 * tensors["qweight"].shape[1]
    else:
        n, k = tensors["qweight"].shape[1], 8 * tensors["qweight"].shape[0]
    group, groups = group_count(k, group_size)
    weight = tensors["weight_packed" if layout == "compressed-tensors" else "qweight"]
    q = unpack(weight, weight_places(layout, n, k), (n, k))
    z = np.full((n, groups), SYMMETRIC_ZERO, dtype=np.uint8)

    if layout == "compressed-tensors":
        s = tensors["weight_scale"]
        words = tensors.get("weight_zero_point")
    elif layout == "gemv":
        s = tensors["scales"][:, :groups]
        if to_float32(tensors["scales"][:, groups:]).any():
            raise ValueError("padding must be 0")
        words = tensors["qzeros"]
    elif layout in ("gemv_fast", "llm-awq"):
        zeros = tensors["scaled_zeros" if layout == "llm-awq" else "qzeros"]
        s = tensors["scales"][:groups].T
        if to_float32(tensors["scales"][groups:]).any() or to_float32(zeros[groups:]).any():
            raise ValueError("padding must be 0")
        zeros = zeros[:groups].T
        if not to_float32(s).all():
            raise ValueError("a scale is 0, so its zero cannot be told")
        ratio = np.rint(-to_float32(zeros).astype(np.float64) / to_float32(s))
        if not ((ratio >= 0) & (ratio <= 15)).all():
            raise ValueError("a zero is outside 0..15")
        z = ratio.astype(np.uint8)
        if (to_float32(scaled_zeros(s, z)) != to_float32(zeros)).any():
            raise ValueError("a scaled zero is not the rounded product of its scale and a zero")
        words = None
    elif layout == "marlin":
        order = marlin_scale_order(groups)
        stored = tensors["scales"].reshape(-1, len(order))
        s = np.empty_like(stored)
        s[:, order] = stored
        s = s.reshape(groups, n).T
        words = None
    else:
        s = tensors["scales"].T
        words = tensors["qzeros"]
    if words is not None:
        z = unpack(words, zero_places(layout, n, groups, group), (n, groups))
    if layout == "gptq":
        if (z == 15).any():
            raise ValueError("gptq: a stored 15 stands for 16 or for 0, depending on who wrote it")
        z = z + np.uint8(1)
    if layout in ("gptq", "gptq_v2") and "g_idx" in tensors and (tensors["g_idx"] != np.arange(k) // group).any():
        raise ValueError("g_idx is not k // group_size (act order), so there is no [n, G] of groups side by side")
    if s.shape != (n, groups):
        raise ValueError(f"scales must hold {(n, groups)}, got {s.shape}")
    return q, z, np.ascontiguousarray(s)


def dequantize(layout: str, tensors: Tensors, group_size: int) -> NDArray[np.float32]:
    """W float32 [n, k] as the tensors define it: (q - z) * s, or q * s + zeros where the zeros are stored scaled."""
    q, z, s = decode(layout, tensors, group_size)
    repeats = q.shape[1] // s.shape[1]
    scales = to_float32(s).repeat(repeats, axis=1)
    if layout in ("gemv_fast", "llm-awq"):
        zeros = tensors["scaled_zeros" if layout == "llm-awq" else "qzeros"][: s.shape[1]].T
        return q.astype(np.float32) * scales + to_float32(zeros).repeat(repeats, axis=1)
    return (q.astype(np.float32) - z.astype(np.float32).repeat(repeats, axis=1)) * scales
