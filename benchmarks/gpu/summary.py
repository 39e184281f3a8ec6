"""The tables of a file that run_all.py has written: python benchmarks/gpu/summary.py gpu.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OTHERS = ("dequantize", "tinygemm", "marlin", "autoawq", "autoawq-fast", "gptqmodel")
Key = tuple[int, int, int, int, str]


def by_case(whole: dict[str, Any], step: str) -> dict[Key, dict[str, Any]]:
    results = whole["steps"].get(step, {}).get("results", [])
    return {tuple(r[name] for name in ("n", "k", "group", "m", "dtype")): r for r in results}


def linears(whole: dict[str, Any]) -> list[str]:
    """A line for each case of step linear: times as fast as the dense product and as each other contestant."""
    ours, dense = by_case(whole, "linear"), by_case(whole, "dense")
    others = {name: found for name in OTHERS if (found := by_case(whole, name))}
    if not ours:
        return []
    head = f"{'n x k, group, dtype':28} {'m':>5} {'us':>8} {'TB/s':>6} {'error':>8} {'x dense':>8}"
    lines = ["", head + "".join(f" {'x ' + name:>14}" for name in others) + "  kernel"]
    for key, of in ours.items():
        n, k, group, m, dtype = key
        own = of["seconds"]["median"]
        line = f"{f'{n}x{k}, {group}, {dtype}':28} {m:5} {own * 1e6:8.1f} {of['bytes_per_second'] / 1e12:6.2f}"
        line += f" {of['error']:8.1e}"
        # Dense products do not depend on groups; a peer's dtype is the one that it has.
        beside = dense.get((n, k, 128, m, dtype))
        line += f" {beside['seconds']['median'] / own:8.2f}" if beside else f" {'':8}"
        for found in others.values():
            same = next((r for (*case, _), r in found.items() if case == [n, k, group, m]), None)
            line += f" {same['seconds']['median'] / own:14.2f}" if same else f" {'':14}"
        lines.append(f"{line}  {of.get('plan', {}).get('kernel', '')}")
    return lines


def sweeps(whole: dict[str, Any]) -> list[str]:
    """A line for each case of a sweep: the plan of awq_ext beside the fastest one."""
    lines = []
    for step in ("decode", "gemm_sm80", "gemm_sm90"):
        cases: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
        for r in whole["steps"].get(step, {}).get("results", []):
            cases.setdefault((r["n"], r["k"], r["m"]), []).append(r)
        if cases:
            lines += ["", f"{step:16} {'m':>5} {'own us':>8} {'best us':>8} {'TB/s':>6}  best plan"]
        for (n, k, m), results in cases.items():
            own, best = results[0], min(results, key=lambda r: r["seconds"])
            cut = ", ".join(f"{name} {best[name]}" for name in ("tile_n", "tile_m", "splits", "cluster", "stages"))
            line = f"{f'{n}x{k}':16} {m:5} {own['seconds'] * 1e6:8.1f} {best['seconds'] * 1e6:8.1f}"
            lines.append(f"{line} {best['bytes_per_second'] / 1e12:6.2f}  {cut}")
    return lines


def bandwidth(whole: dict[str, Any]) -> list[str]:
    results = whole["steps"].get("bandwidth", {}).get("results", [])
    best: dict[tuple[str, int], float] = {}
    for r in results:
        key = (r["how"], r["bytes_in_flight_per_sm"])
        best[key] = max(best.get(key, 0.0), r["bytes_per_second"])
    lines = [f"{how:6} {size / 1024:6.0f} KiB {rate / 1e12:6.2f} TB/s" for (how, size), rate in sorted(best.items())]
    return ["", "bytes in flight of a multiprocessor, and bandwidth", *lines] if lines else []


def stack(whole: dict[str, Any]) -> list[str]:
    lines = [
        f"{r['name']:8} {r['dtype']:9} m {r['m']:3} {r['seconds']['median'] * 1e3:8.3f} ms "
        f"{r['tokens_per_second']:9.0f} tokens/s" + (f"  x {x:.2f}" if (x := r.get("awq_ext_times_as_fast")) else "")
        for r in whole["steps"].get("stack", {}).get("results", [])
    ]
    return ["", "the linears of a 7B model, one step of decoding", *lines] if lines else []


def show(whole: dict[str, Any]) -> None:
    for line in [*bandwidth(whole), *linears(whole), *sweeps(whole), *stack(whole)]:
        print(line)


if __name__ == "__main__":
    show(json.loads(Path(sys.argv[1]).read_text()))
