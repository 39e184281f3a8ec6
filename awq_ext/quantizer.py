"""`quantize`: a model in, the same model with 4-bit linears out, block by block."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import awq_ext
from awq_ext import llm_awq, memory, windows
from awq_ext.block import METHODS, BlockQuantizer, BlockReport, Calibration, Settings
from awq_ext.block_files import BlockFiles
from awq_ext.calibrate import BlockInputs
from awq_ext.checkpoint import check_replaceable, load_quantized, write_checkpoint
from awq_ext.config import QuantConfig
from awq_ext.errors import CalibrationError, CheckpointError, UnsupportedModelError
from awq_ext.generated import CannotWrite, write_rows
from awq_ext.hub import resolve
from awq_ext.original import Original, open_original
from awq_ext.pretrained import is_quantized_directory, load_float
from awq_ext.progress import Progress
from awq_ext.ranks import Ranks
from awq_ext.report import LinearReport, Report
from awq_ext.storage import bytes_of
from awq_ext.swap import NEVER_CONVERTED, Decision, as_linear, decide
from awq_ext.trace import SEVERAL_TOKENS
from awq_ext.tune import JUDGES, ROWS, STEPS, TOKENS, Batch, tune
from awq_ext.windows import BUILTIN_TEXT, Windows

TOGETHER = 32  # rows to tune on that the original's blocks are run on together
SINGLE_TOKENS = 64  # windows of one token that folds are looked for on: enough to reach most experts of a mixture


def quantize(
    model: Any,
    tokenizer: Any = None,
    *,
    calibration: Any = BUILTIN_TEXT,
    samples: int | None = None,
    seq_len: int = 512,
    shuffle: bool = False,
    pack: bool | None = None,
    generated: int = 0,
    seed: int = 0,
    w_bit: int = 4,
    q_group_size: int = 128,
    zero_point: bool = True,
    modules_to_not_convert: Sequence[str] | None = None,
    method: str | None = None,
    duo_scaling: bool = True,
    apply_clip: bool = True,
    scaled_activations: bool | None = None,
    tune_steps: int | None = None,
    quant_config: Mapping[str, Any] | None = None,
    search_results: Any = None,
    allow_pickle: bool = False,
    blocks: str | None = None,
    out: Any = None,
    resume: bool = False,
    load: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantize a causal language model of any architecture to 4 bits with AWQ.

    Where scales can be folded is found by running each block (:mod:`awq_ext.trace`), and every fold is proven on it in
    float64 before it is used. Linears whose input nothing can scale are rounded with a searched range only.

    Args:
        model: a transformers model (or any module that is called with token ids and has its decoder blocks in a
            ModuleList), quantized in place, or a directory or hub name to load it from.
        tokenizer: for calibration text; None: loaded from beside the model when ``model`` is a path.
        calibration: text, a file, the name of a dataset on the hub, ``"builtin"`` (CPython's own help text: enough to
            try things, text like yours is better), or a list, dataset, loader or other iterable of texts, of token ids
            or of batches with ``input_ids`` and ``attention_mask``: all that :func:`awq_ext.windows.read` takes.
        samples, seq_len: at most ``samples`` x ``seq_len`` tokens of it are used, no more than ``seq_len`` in a row.
            samples None: 128, or the 32 that the built-in text is sure to have.
        shuffle: draw the windows or rows by ``seed``, instead of using the first.
        pack: glue rows and cut them into full windows. None: texts are, token ids are not.
        generated: so many rows more, which the model writes itself, each from the beginning of one of the others
            (:mod:`awq_ext.generated`), as long as the longest: a better model from little text. It has to be a model
            of transformers. While it writes, all of it is in memory, its blocks in 4 bits.
        seed: of what ``shuffle`` draws, of what the model writes, and of the random signs in the estimate of how much
            each linear's rows matter.
        w_bit: 4, or 2..8 to see what other numbers of bits would do. Those are only simulated: linears stay nn.Linear,
            with weights that are rounded to them and then to the model's dtype (float32 holds them exactly).
        q_group_size: input channels that share a scale and a zero; -1 is all of them.
        zero_point: asymmetric codes (AutoAWQ's default). False: every zero is in the middle of the codes.
        modules_to_not_convert: parts of names; linears whose full name contains one are not quantized. They still get
            their part of a scale that is moved out of what they read.
        method: ``"awq"``: scales and clipped ranges are searched, weights rounded to nearest. ``"awq+"``: the codes of
            a weight are chosen together, linear after linear, each for the inputs that the linears rounded before it
            produce (see :func:`awq_ext.ops.quantize_compensated`), scales are searched for such codes, and tuned in
            the end (``tune_steps``): a better model in two to three times the time. ``"gptq"``: codes are chosen
            together, nothing else. ``"rtn"``: round-to-nearest, no calibration. All write the same format. None:
            ``"awq+"``, or with ``search_results``, which are of it, ``"awq"``.
        duo_scaling: also try scales that take the weights into account.
        apply_clip: also search for the range of each group.
        scaled_activations: whether a linear behind an activation, which nothing else can scale, gets its scale from a
            :class:`awq_ext.scaled.ScaledActivation` there. None: in models of the types for which readers of
            checkpoints know them.
        tune_steps: how many steps to tune the scales of all groups and the weights of all norms for, when all blocks
            are done, by the divergence of the model's predictions from the original's on other rows that it writes
            itself (:mod:`awq_ext.tune`). For who can write, see ``generated``. In the end all of the quantized model
            is in memory. None: 20 with ``"awq+"``, 0 with other methods; 0 also, and the report says so, for a model
            that cannot write, and for one whose output head has more weights than all that is quantized: running it
            would take most of the time (Gemma-3-270M, which is made so, gains nothing).
        quant_config: AutoAWQ's dictionary; its ``w_bit``, ``q_group_size``, ``zero_point``, ``version`` and
            ``modules_to_not_convert`` win over the arguments.
        search_results: llm-awq's file of scales and clips (``--dump_awq``), or the dictionary in it. They are applied
            (see :func:`awq_ext.llm_awq.apply_search_results`) and weights rounded to nearest, as llm-awq does with
            ``--load_awq``, but in float32; nothing is searched and no calibration data is read. The model may be of
            any architecture. Clips are left out for linears that stay as they are, and without ``apply_clip``.
        allow_pickle: whether ``search_results`` may be a file: it is a pickle, read with
            ``torch.load(weights_only=True)``.
        blocks: the name of the list of decoder blocks. None: the ModuleList that holds the most weights.
        out: a directory to save the checkpoint to (see :func:`awq_ext.save_quantized`). A ``model`` that is a directory
            or hub name is read from its files one block at a time, and each block written as soon as it is quantized,
            to ``.<name of out>.blocks`` beside ``out``, so the weights of no more than one block are in memory, but for
            those in 4 bits of ``generated`` and ``tune_steps``. What the block makes of all calibration tokens is, and
            sums [k, k] of what its linears read, which are more than the weights.
        resume: go on after the last block that an interrupted call with the same arguments has finished. The result
            has the same bytes as without the interruption.
        load: False: if the result has been written to ``out`` and is not in memory, leave it there; the model that is
            returned has an ``awq_report``, but no weights.
        progress: where to show progress; None: bars on stderr if that is a terminal.

    Returns:
        The model, its linears replaced by :class:`awq_ext.AwqLinear`, with ``model.awq_report``
        (:class:`awq_ext.report.Report`). Linears that do not fit or are excluded stay and are listed there, as are
        weights in the blocks that belong to no linear (experts in one tensor, routers).

    Raises:
        UnsupportedModelError: a model without a list of blocks, or quantized already; weights that are not finite or
            not floating point.
        CalibrationError: too little calibration data, or activations that are not finite.
        CheckpointError: search results that cannot be read, do not fit the model, or are of another group size; blocks
            to be resumed of other settings; or what :func:`awq_ext.save_quantized` raises.
        ValueError: arguments that make no sense; a number of processes that does not divide 8.

    Weights are searched and rounded in float32 whatever their dtype, one block at a time. The blocks are run by
    torch, where that is faster in bfloat16 as its autocast does (:mod:`awq_ext.precision`): the last bits of
    statistics, and rarely a choice between equals, may depend on its threads.

    If torch.distributed is initialised, all its processes call this with the same arguments and share the calibration
    rows; every one gets the same model, whose bytes do not depend on their number, and rank 0 writes ``out``.
    """
    config = _merged(
        quant_config,
        w_bit=w_bit,
        q_group_size=q_group_size,
        zero_point=zero_point,
        modules_to_not_convert=modules_to_not_convert,
    )
    if method is None:
        method = "awq+" if search_results is None else "awq"
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    if search_results is not None and method != "awq":
        raise ValueError(f"quantize: search_results are of method 'awq', got method {method!r}")
    if tune_steps is None and method != "awq+":
        tune_steps = 0
    if tune_steps and (tune_steps < 0 or method == "rtn" or search_results is not None):
        raise ValueError(f"quantize: tune_steps must be 0 or more, and 0 without calibration, got {tune_steps}")
    if generated < 0 or (generated and (method == "rtn" or search_results is not None)):
        raise ValueError(f"quantize: generated must be 0 or more, and 0 without calibration, got {generated}")
    if samples is None:
        samples = 32 if isinstance(calibration, str) and calibration == BUILTIN_TEXT else 128
    start = time.perf_counter()
    progress = progress or Progress()
    results = None
    if search_results is not None:
        results = llm_awq.read_search_results(search_results, allow_pickle=allow_pickle)
    if resume and (out is None or results is not None or isinstance(model, nn.Module)):
        raise ValueError("quantize: resume takes a model given by its directory, an out, and no search_results")
    out = None if out is None else Path(out).expanduser().absolute()
    if out is not None and config["w_bit"] != 4:
        raise ValueError(
            f"quantize: w_bit {config['w_bit']} is only simulated: checkpoints hold 4 bits. Leave out the directory"
        )
    if out is not None:
        check_replaceable(out)  # before the minutes of work
    original, source = _open(model, blocks, results)

    def data() -> Windows:
        home = source if tokenizer is None else tokenizer
        return windows.read(calibration, home, samples, seq_len, seed=seed, shuffle=shuffle, pack=pack)

    settings = Settings(
        method=method,
        w_bit=config["w_bit"],
        group_size=config["q_group_size"],
        zero_point=bool(config["zero_point"]),
        modules_to_not_convert=tuple(config["modules_to_not_convert"] or ()),
        duo_scaling=duo_scaling,
        apply_clip=apply_clip,
        scaled_activations=scaled_activations,
        seed=seed,
    )
    durable = None if source is None or results is not None else out
    run = _Run(original, settings, generated, tune_steps, progress)
    with torch.no_grad():
        report = run.run(data, _Durable(durable, source, resume) if durable and source else None)
    report.seconds = time.perf_counter() - start
    if out is not None:
        saved = None if isinstance(tokenizer, str) else tokenizer
        run.ranks.first(lambda: write_checkpoint(original.model, out, saved, source=source, read=run.read))
        run.ranks.first(lambda: report.write(out))
        run.ranks.first(run.files.remove) if run.files is not None else None
    elif source is not None:
        original.complete()
    quantized = original.model
    if load and any(tensor.is_meta for tensor in quantized.state_dict().values()):
        quantized = load_quantized(out)
    quantized.awq_report = report
    return quantized


def quantize_to(model: Any, out: Any, tokenizer: Any = None, **options: Any) -> Report:
    """:func:`quantize` with the same ``options``, from a directory or hub name to the directory ``out``.

    The result is not loaded, and if the model could be read block by block, it is never in memory as a whole.
    """
    quantized: Any = quantize(model, tokenizer, out=out, load=False, **options)
    report: Report = quantized.awq_report
    return report


def _merged(quant_config: Mapping[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    """The arguments, overruled by AutoAWQ's quant_config, checked."""
    config = dict(arguments)
    for key, value in (quant_config or {}).items():
        if key == "version":
            if str(value).lower() != "gemm":
                raise ValueError(f"quantize: version must be GEMM, got {value!r}; other layouts are not written")
        elif key in config:
            config[key] = value
        else:
            raise ValueError(f"quantize: unknown key {key!r} in quant_config, expected {', '.join(config)} or version")
    bits = config["w_bit"]
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"quantize: w_bit must be a whole number of 2..8, got {bits!r}")
    if isinstance(config["modules_to_not_convert"], str):  # it would be taken letter by letter
        raise ValueError(
            f"quantize: modules_to_not_convert must be a list of names, got {config['modules_to_not_convert']!r}"
        )
    group = config["q_group_size"]
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise ValueError(f"quantize: q_group_size must be a positive whole number or -1, got {group!r}")
    return config


def _open(model: Any, blocks: str | None, results: llm_awq.SearchResults | None) -> tuple[Original, Path | None]:
    """Where the model's blocks come from, and the directory it is in (None: it is in memory)."""
    path = None
    if not isinstance(model, nn.Module):
        path = resolve(model)
        if is_quantized_directory(path):
            raise UnsupportedModelError(f"{model} is already quantized. Quantize the original, unquantized model")
        if results is None:
            return open_original(path, blocks), path
        model = load_float(path, "auto")
    _refuse_quantized(getattr(model, "config", None), type(model).__name__)
    return Original(model, blocks, None if results is None else llm_awq.plan(model, results)), path


@dataclass(frozen=True)
class _Durable:
    """Finished blocks go to files beside ``out``; the original is in the directory ``source``."""

    out: Path
    source: Path
    resume: bool

    def settings(self, settings: Settings, blocks: str, rows: Iterable[Tensor]) -> dict[str, Any]:
        """All that decides the bytes of a block."""
        digest = hashlib.sha256()
        for ids in rows:
            digest.update(len(ids).to_bytes(8, "little") + bytes_of(ids))
        files = sorted(file for file in self.source.iterdir() if file.match("*.safetensors*") or file.match("*.json"))
        return {
            "awq_ext": awq_ext.__version__,
            "torch": torch.__version__,
            "options": asdict(settings),
            "blocks": blocks,
            "calibration tokens": digest.hexdigest(),
            "original": {file.name: [(found := file.stat()).st_size, found.st_mtime_ns] for file in files},
        }


def _refuse_quantized(config: Any, name: str) -> None:
    existing = getattr(config, "quantization_config", None)
    if existing:
        method = existing.get("quant_method") if isinstance(existing, dict) else getattr(existing, "quant_method", "")
        raise UnsupportedModelError(
            f"{name} is already quantized ({method or 'unknown method'}). Quantize the original, unquantized model"
        )


class _Run:
    """One run over one model."""

    def __init__(
        self, original: Original, settings: Settings, generated: int, tune_steps: int | None, progress: Progress
    ) -> None:
        """``tune_steps`` None: as many as suit the model."""
        self.original, self.settings, self.progress = original, settings, progress
        self.generated = generated
        self.tune_steps = STEPS if tune_steps is None else tune_steps
        self.unasked = tune_steps is None  # nobody has said how many steps
        self.to_tune_on: list[Tensor] = []
        """Rows that the model wrote."""
        self.model: Any = original.model
        self.config = getattr(self.model, "config", None)  # None: it is no transformers model
        self.ranks = Ranks()
        self.files: BlockFiles | None = None
        uses = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        self.shared = {name for name, p in self.model.named_parameters(remove_duplicate=False) if uses[id(p)] > 1}
        model_type = getattr(self.config, "model_type", type(self.model).__name__)
        self.report = Report(settings.method, model_type, settings.group_size, settings.zero_point, settings.w_bit)
        if original.note is not None:
            self.report.notes.append(original.note)
        self.decisions: dict[str, Decision] = {}
        self.others: list[LinearReport] = []
        """Weights in the blocks that are of no linear."""
        for name, module in self.model.named_modules():
            if not name.startswith(original.blocks_name + "."):
                self._survey(name, module)
        with progress.task("check weights", total=len(original.blocks)) as task:
            for index in range(len(original.blocks)):
                for name, module in original.load(index).named_modules():
                    self._survey((original.prefix(index) + name).rstrip("."), module)
                original.unload(index)
                memory.give_back()
                task.advance(1)
        if all(decision.reason is not None for decision in self.decisions.values()):
            raise UnsupportedModelError(
                "no linear of this model can be quantized:\n" + "\n".join(f"  {d}" for d in self.decisions.values())
            )
        if original.plan is not None:
            self.report.search_results = original.plan.results.source
            self._check_groups(original.plan.results)

    def _survey(self, name: str, module: nn.Module) -> None:
        """Decide what happens to a module's weights, which are checked if they are in the blocks."""
        inside = name.startswith(self.original.blocks_name + ".")
        linear = as_linear(module)
        if linear is not None:
            decision = decide(name, linear, self.settings.group_size, self.settings.modules_to_not_convert)
            if not inside and decision.reason is None:
                reason = "output head" if name in NEVER_CONVERTED else "outside the decoder blocks"
                decision = Decision(name, decision.in_features, decision.out_features, reason)
            self.decisions[name] = decision
            if inside:
                _check_weight(name, linear)
        elif inside:
            self.others += _other_weights(name, module, self.original.fused.get(name))

    def _check_groups(self, results: llm_awq.SearchResults) -> None:
        for clip in results.clips:
            decision = self.decisions[clip.linear]
            if decision.reason is not None or not self.settings.apply_clip:
                continue
            size = decision.in_features // clip.bound.shape[1]
            if size != self.settings.group_of(decision.in_features):
                raise CheckpointError(
                    f"{results.source}: {clip.linear} is clipped in groups of {size}, but is to be quantized with "
                    f"group size {self.settings.group_size}; pass q_group_size={size} (--group-size {size})"
                )

    def run(self, data: Callable[[], Windows], durable: _Durable | None) -> Report:
        """Quantize all blocks. With ``durable`` they go to files, and from memory if the original does."""
        original, calibration, rows = self.original, None, list[Tensor]()
        if self.settings.method != "rtn" and original.plan is None:
            found = data()
            self._check_tokens(found.rows)
            found = self._with_written(found)
            calibration, rows = self._calibration(found.rows), found.rows
            self.report.calibration_tokens, self.report.calibration = found.tokens, found.note
            self.report.held_out_tokens = calibration.rows.held_out_tokens
        if durable is not None:
            files, settings = BlockFiles(durable.out), durable.settings(self.settings, original.blocks_name, rows)
            files.finished = self.ranks.first(lambda: files.open(settings, resume=durable.resume))
            self.files = files
        names = {name for name, decision in self.decisions.items() if decision.reason is None}
        with self.progress.task("quantize blocks", total=len(original.blocks)) as task:
            index = 0

            def say(what: str) -> None:
                task.advance(0, note=f"block {index}: {what}; {memory.peak():.1f} GB")

            model_type = self.report.model_type
            quantizer = BlockQuantizer(self.settings, model_type, calibration, self.shared, original.plan, say)
            for index in range(len(original.blocks)):
                part = self._block(index, quantizer, names)
                memory.give_back()
                self.report.linears += part.linears
                self.report.folds += part.folds
                self.report.unscaled += part.unscaled
                self.report.block_seconds.append(part.seconds)
                task.advance(1)
        if self.tune_steps:
            assert calibration is not None and calibration.besides is not None
            targets = torch.cat(calibration.besides.hidden)
            del calibration, quantizer
            memory.give_back()
            self._tune(names, targets)
        self.report.linears += [
            LinearReport(d.name, d.in_features, d.out_features, kept=d.reason)
            for d in self.decisions.values()
            if d.reason is not None
        ]
        kept = tuple(x.name for x in self.report.kept if x.name not in NEVER_CONVERTED)
        self.report.linears += self.others
        if self.config is not None and self.settings.w_bit == 4:
            self.config.quantization_config = QuantConfig(
                group_size=self.settings.group_size,
                zero_point=self.settings.zero_point,
                modules_to_not_convert=kept,
            ).to_dict()
        return self.report

    def _block(self, index: int, quantizer: BlockQuantizer, names: Collection[str]) -> BlockReport:
        block, files = self.original.load(index), self.files
        if files is None:
            return quantizer.quantize(index, block, self.original.prefix(index), names)
        if index < files.finished:
            quantizer.skip(index, block, lambda: files.install(index, block))
            part = files.report(index)
        else:
            part = quantizer.quantize(index, block, self.original.prefix(index), names)
            self.ranks.first(lambda: files.write(index, block, part))
        self.original.drop(index)
        return part

    def _tune(self, names: Collection[str], targets: Tensor) -> None:
        """Tune the quantized model, all of it in memory, by rows that it has not seen. Every rank does all of it.

        ``targets`` [rows, length, width] are the hidden states behind the original's last block.
        """
        if self.files is not None:
            for index, block in enumerate(self.original.blocks):
                self.files.install(index, block)
        self.original.complete()
        inputs = BlockInputs(self.model, self.original.blocks, self.to_tune_on, batch=ROWS)
        batches = list(map(Batch, inputs.ids, inputs.hidden, targets.split(ROWS)))
        quantized = map(self.model.get_submodule, sorted(names))
        linears = {linear: self.settings.group_of(linear.in_features) for linear in quantized}
        with self.progress.task("tune scales", total=self.tune_steps) as task, self.original.fast_outside():
            self.report.tuned = tune(
                self.model,
                self.original.blocks,
                linears,
                batches[: self.tune_steps],
                batches[self.tune_steps :],
                inputs.call,
                done=lambda: task.advance(1),
            )

    def read(self, name: str) -> Tensor:
        """A tensor of the quantized model that is on the meta device, by the model's name for it."""
        inside = name.removeprefix(f"{self.original.blocks_name}.")
        if self.files is None or inside == name:
            return self.original.read(name)
        index, _, local = inside.partition(".")
        return self.files.read(int(index), local)

    def _with_written(self, found: Windows) -> Windows:
        """What was found and more rows that the model writes, as it does those to tune on; rank 0 does it for all."""
        length, short = max(map(len, found.rows)), min(TOKENS, self._positions or TOKENS)
        if self.unasked and (reason := self._why_not_tuned()) is not None:
            self._leave_untuned(reason)
        to_tune_on = ROWS * (self.tune_steps + JUDGES) if self.tune_steps else 0
        if not self.generated and not to_tune_on:
            return found
        tokens = self.generated * length + to_tune_on * short
        with self.progress.task("write rows", total=tokens) as task:

            def write() -> tuple[list[Tensor], list[Tensor]]:
                model, seed, done = self.model, self.settings.seed, task.advance
                with self.original.rounded():
                    more = write_rows(model, found.rows, self.generated, length, seed=(seed, 0), done=done)
                    return more, write_rows(model, found.rows, to_tune_on, short, seed=(seed, 1), done=done)

            try:
                more, self.to_tune_on = self.ranks.first(write)
            except CannotWrite as error:
                if self.generated or not self.unasked:
                    raise
                self._leave_untuned(error.reason)
                return found
        memory.give_back()
        if more:
            note = f"{found.note}; {len(more)} rows of {length} tokens that the model wrote itself"
            found = Windows([*found.rows, *more], note)
        return found

    def _why_not_tuned(self) -> str | None:
        """Why steps that nobody asked for are not worth their time."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        weights = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
        quantized = sum(d.in_features * d.out_features for d in self.decisions.values() if d.reason is None)
        if weights <= quantized:
            return None
        return f"the output head has {weights:,} weights, more than the {quantized:,} that are quantized"

    def _leave_untuned(self, reason: str) -> None:
        self.tune_steps = 0
        self.report.notes.append(f"scales and norms were not tuned: {reason}")

    def _calibration(self, rows: list[Tensor]) -> Calibration:
        ids = torch.cat(rows)
        # Few tokens, whatever they are, show how a block is made.
        several = min(SEVERAL_TOKENS, max(self._positions, *map(len, rows)))
        need = max(SINGLE_TOKENS, 2 * several)
        few = ids[:need].repeat(-(-need // len(ids)))
        model, blocks = self.model, self.original.blocks
        with self.original.outside():
            self.original.load(0)
            calibration = Calibration(
                BlockInputs(model, blocks, rows, ranks=self.ranks),
                BlockInputs(model, blocks, few[:SINGLE_TOKENS, None], batch=SINGLE_TOKENS),
                BlockInputs(model, blocks, few[: 2 * several].view(2, several)),
                BlockInputs(model, blocks, self.to_tune_on, batch=TOGETHER, sensitivity_tokens=0)
                if self.to_tune_on
                else None,
            )
            self.original.unload(0)
        return calibration

    @property
    def _positions(self) -> int:
        """How long a row the model can take; 0: unknown."""
        return getattr(self.config, "max_position_embeddings", None) or 0

    def _check_tokens(self, rows: list[Tensor]) -> None:
        """Raises CalibrationError unless the model can take them."""
        ids, longest = torch.cat(rows), max(map(len, rows))
        vocab = self.model.get_input_embeddings().num_embeddings if self.config is not None else None
        if vocab is not None and (int(ids.max()) >= vocab or int(ids.min()) < 0):
            raise CalibrationError(
                f"calibration token ids span {int(ids.min())}..{int(ids.max())}, but the model's vocabulary has "
                f"{vocab}: the tokenizer is of another model"
            )
        if 0 < self._positions < longest:
            raise CalibrationError(f"seq_len {longest} is longer than the model's {self._positions} positions")


def _other_weights(name: str, module: nn.Module, reason: str | None) -> list[LinearReport]:
    """The weights of a module that is no linear and has some of two dimensions or more."""
    reason = reason or f"it is of a {type(module).__name__}, and only linears are quantized"
    return [
        LinearReport(f"{name}.{part}", weight.shape[-1], weight.numel() // weight.shape[-1], reason)
        for part, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1
    ]


def _check_weight(name: str, linear: nn.Linear) -> None:
    if not linear.weight.is_floating_point() or linear.weight.element_size() < 2:
        raise UnsupportedModelError(
            f"{name}.weight is {linear.weight.dtype}: the model is already quantized. Quantize the original one"
        )
    if linear.weight.is_meta:
        raise UnsupportedModelError(f"{name}.weight is on the meta device: load the model before quantizing it")
    if not torch.isfinite(linear.weight).all():
        raise UnsupportedModelError(f"{name}.weight has NaN or infinite values: the checkpoint is damaged")
