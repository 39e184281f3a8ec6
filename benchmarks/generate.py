"""Tokens a second of a model on a CPU, reading a prompt and decoding: 4 bits in both layouts, against the original.

In bfloat16 decoding is also measured compiled by torch, with a cache of fixed size (the first call compiles: a minute).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import take_turns, write

from awq_ext import AwqLinear, load_quantized, set_cpu_activation
from awq_ext.pretrained import load_float

PROMPT = 256  # tokens


def decode(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> None:
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)


def decode_compiled(model: Any, forward: Any, ids: torch.Tensor, tokens: int) -> None:
    """With ``forward`` in place of the model's own."""
    model.forward = forward
    decode(model, ids, tokens, cache_implementation="static")
    del model.forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original", metavar="ORIGINAL")
    parser.add_argument("quantized", metavar="QUANTIZED")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=16, help="to decode in one turn")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    models: dict[str, Any] = {
        "original float32": load_float(args.original, torch.float32),
        "original bfloat16": load_float(args.original, torch.bfloat16),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("gemm", "strips"):
            model = models[f"4 bits {layout} {str(dtype).removeprefix('torch.')}"] = load_quantized(
                args.quantized, dtype=dtype
            )
            for module in model.modules():
                if isinstance(module, AwqLinear):
                    module.repack(layout)
    ids = torch.randint(1000, 2000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def eight_bits(call: Callable[[int], object], turn: int) -> None:
        set_cpu_activation("int8")
        call(turn)
        set_cpu_activation("exact")

    def turns(call: Callable[[Any], object]) -> dict[str, Callable[[int], object]]:
        contestants: dict[str, Callable[[int], object]] = {}
        for name, model in models.items():
            contestants[name] = lambda _, model=model: call(model)
        contestants["4 bits strips bfloat16, int8"] = partial(eight_bits, contestants["4 bits strips bfloat16"])
        return contestants

    short = ids[:, :8]
    prompt = take_turns(turns(lambda model: model(ids)), args.rounds)
    decoding = turns(lambda model: decode(model, short, args.tokens))
    for name in ("original bfloat16", "4 bits strips bfloat16"):
        model, forward = models[name], torch.compile(models[name].forward, dynamic=False)
        decoding[f"{name}, compiled"] = lambda _, model=model, forward=forward: decode_compiled(
            model, forward, short, args.tokens
        )
    decoded = take_turns(decoding, args.rounds)
    print(f"tokens/s at {args.threads} threads: prompt of {PROMPT}, decoding")
    results: dict[str, dict[str, Any]] = {}
    for name in decoded:
        speeds = PROMPT / prompt[name]["median"] if name in prompt else None, args.tokens / decoded[name]["median"]
        results[name] = {"prompt": prompt.get(name), "decode": decoded[name], "tokens_per_second": speeds}
        print(f"{name:33} {'' if speeds[0] is None else format(speeds[0], '.1f'):>8} {speeds[1]:8.1f}")
    facts = {"original": args.original.rsplit("/", 1)[-1], "prompt_tokens": PROMPT, "decoded_tokens": args.tokens}
    print(write(f"generate_{args.threads}t", {**facts, "models": results}))


if __name__ == "__main__":
    main()
