"""`quantize`: a model in, the same model with 4-bit linears out, block by block."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext import calibrate, llm_awq, ops
from awq_ext.calibrate import BlockInputs
from awq_ext.checkpoint import save_quantized
from awq_ext.config import QuantConfig
from awq_ext.errors import CalibrationError, CheckpointError, UnsupportedModelError
from awq_ext.fold import Fold, apply_fold
from awq_ext.hub import resolve
from awq_ext.linear import AwqLinear
from awq_ext.pretrained import is_quantized_directory, load_float, load_tokenizer
from awq_ext.progress import Progress
from awq_ext.report import FoldReport, LinearReport, Report, UnscaledReport
from awq_ext.swap import NEVER_CONVERTED, Decision, as_linear, decide
from awq_ext.trace import SEVERAL_TOKENS, Inputs, Traced, find_blocks, prove, trace

GRID = 20
METHODS = ("awq", "awq+", "gptq", "rtn")
COMPENSATING = ("awq+", "gptq")
"""Methods that choose the codes of a weight together, see :func:`awq_ext.ops.quantize_compensated`."""
SINGLE_TOKENS = 64  # windows of one token that folds are looked for on: enough to reach most experts of a mixture


def quantize(
    model: Any,
    tokenizer: Any = None,
    *,
    calibration: Any = calibrate.BUILTIN_TEXT,
    samples: int | None = None,
    seq_len: int = 512,
    seed: int = 0,
    w_bit: int = 4,
    q_group_size: int = 128,
    zero_point: bool = True,
    modules_to_not_convert: Sequence[str] | None = None,
    method: str = "awq",
    duo_scaling: bool = True,
    apply_clip: bool = True,
    quant_config: Mapping[str, Any] | None = None,
    search_results: Any = None,
    allow_pickle: bool = False,
    blocks: str | None = None,
    out: Any = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantize a causal language model of any architecture to 4 bits with AWQ.

    Where scales can be folded is found by running each block (:mod:`awq_ext.trace`), and every fold is proven on it in
    float64 before it is used. Linears whose input nothing can scale are rounded with a searched range only.

    Args:
        model: a transformers model (or any module that is called with token ids and has its decoder blocks in a
            ModuleList), quantized in place, or a directory or hub name to load it from.
        tokenizer: for calibration text; None: loaded from beside the model when ``model`` is a path.
        calibration: a text file, the name of a dataset on the hub, ``"builtin"`` (CPython's own help text: enough to
            try things, text like yours is better), a list of texts, or token ids.
        samples, seq_len: the first ``samples`` x ``seq_len`` tokens of it are used, in order. None: 128 samples, or
            the 32 that the built-in text is sure to have.
        seed: of the random signs in the estimate of how much each linear's rows matter.
        w_bit: 4.
        q_group_size: input channels that share a scale and a zero; -1 is all of them.
        zero_point: asymmetric codes (AutoAWQ's default). False: every zero is 8.
        modules_to_not_convert: parts of names; linears whose full name contains one stay as they are.
        method: ``"awq"``: scales and clipped ranges are searched, weights rounded to nearest. ``"awq+"``: the same
            scales, but the codes of a weight are chosen together, linear after linear, each for the inputs that the
            linears rounded before it produce (see :func:`awq_ext.ops.quantize_compensated`). ``"gptq"``: that
            without scales. ``"rtn"``: round-to-nearest, no calibration. All write the same format.
        duo_scaling: also try scales that take the weights into account.
        apply_clip: also search for the range of each group.
        quant_config: AutoAWQ's dictionary; its ``w_bit``, ``q_group_size``, ``zero_point``, ``version`` and
            ``modules_to_not_convert`` win over the arguments.
        search_results: llm-awq's file of scales and clips (``--dump_awq``), or the dictionary in it. They are applied
            (see :func:`awq_ext.llm_awq.apply_search_results`) and weights rounded to nearest, as llm-awq does with
            ``--load_awq``, but in float32; nothing is searched and no calibration data is read. The model may be of
            any architecture. Clips are left out for linears that stay as they are, and without ``apply_clip``.
        allow_pickle: whether ``search_results`` may be a file: it is a pickle, read with
            ``torch.load(weights_only=True)``.
        blocks: the name of the list of decoder blocks. None: the ModuleList that holds the most weights.
        out: a directory to save the checkpoint to (see :func:`awq_ext.save_quantized`).
        progress: where to show progress; None: bars on stderr if that is a terminal.

    Returns:
        The model, its linears replaced by :class:`awq_ext.AwqLinear`, with ``model.awq_report``
        (:class:`awq_ext.report.Report`). Linears that do not fit or are excluded stay and are listed there, as are
        weights in the blocks that belong to no linear (experts in one tensor, routers).

    Raises:
        UnsupportedModelError: a model without a list of blocks, or quantized already; weights that are not finite or
            not floating point.
        CalibrationError: too little calibration data, or activations that are not finite.
        CheckpointError: search results that cannot be read, do not fit the model, or are of another group size; or
            what :func:`awq_ext.save_quantized` raises.
        ValueError: arguments that make no sense.

    Weights are searched and rounded in float32 whatever their dtype, one block at a time. Statistics are taken with
    torch's own matrix product: their last bits, and rarely a choice between equals, may depend on its threads.
    """
    config = _merged(
        quant_config,
        w_bit=w_bit,
        q_group_size=q_group_size,
        zero_point=zero_point,
        modules_to_not_convert=modules_to_not_convert,
    )
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    if search_results is not None and method != "awq":
        raise ValueError(f"quantize: search_results are of method 'awq', got method {method!r}")
    if samples is None:
        samples = 32 if isinstance(calibration, str) and calibration == calibrate.BUILTIN_TEXT else 128
    start = time.perf_counter()
    progress = progress or Progress()
    results = None
    if search_results is not None:
        results = llm_awq.read_search_results(search_results, allow_pickle=allow_pickle)
    model, source = _load(model)

    def tokens() -> Tensor:
        data = calibrate.load_text(calibration) if isinstance(calibration, str) else calibration
        home = source if tokenizer is None else tokenizer
        reads = load_tokenizer(resolve(home)) if isinstance(home, (str, Path)) and calibrate.is_text(data) else home
        return calibrate.windows(data, reads, samples, seq_len)

    with torch.no_grad():
        report = _Quantizer(model, config, method, duo_scaling, apply_clip, seed, progress, results, blocks).run(tokens)
    report.seconds = time.perf_counter() - start
    model.awq_report = report
    if out is not None:
        save_quantized(model, out, None if isinstance(tokenizer, str) else tokenizer, source=source)
    return model


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
    if config["w_bit"] != 4:
        raise ValueError(f"quantize: w_bit must be 4, got {config['w_bit']!r}")
    if isinstance(config["modules_to_not_convert"], str):  # it would be taken letter by letter
        raise ValueError(
            f"quantize: modules_to_not_convert must be a list of names, got {config['modules_to_not_convert']!r}"
        )
    group = config["q_group_size"]
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise ValueError(f"quantize: q_group_size must be a positive whole number or -1, got {group!r}")
    return config


def _load(model: Any) -> tuple[Any, Path | None]:
    """The model, and the directory it comes from (None: it was in memory)."""
    if isinstance(model, nn.Module):
        return model, None
    path = resolve(model)
    if is_quantized_directory(path):
        raise UnsupportedModelError(f"{model} is already quantized. Quantize the original, unquantized model")
    return load_float(path, "auto"), path


def _refuse_quantized(config: Any, name: str) -> None:
    existing = getattr(config, "quantization_config", None)
    if existing:
        method = existing.get("quant_method") if isinstance(existing, dict) else getattr(existing, "quant_method", "")
        raise UnsupportedModelError(
            f"{name} is already quantized ({method or 'unknown method'}). Quantize the original, unquantized model"
        )


class _Quantizer:
    """One run over one model."""

    def __init__(
        self,
        model: Any,
        config: dict[str, Any],
        method: str,
        duo_scaling: bool,
        apply_clip: bool,
        seed: int,
        progress: Progress,
        results: llm_awq.SearchResults | None,
        blocks: str | None,
    ) -> None:
        self.config = getattr(model, "config", None)  # None: it is no transformers model
        self.model, self.method, self.progress = model, method, progress
        self.group_size, self.zero_point = int(config["q_group_size"]), bool(config["zero_point"])
        self.excluded = tuple(config["modules_to_not_convert"] or ())
        self.duo_scaling, self.apply_clip = duo_scaling, apply_clip
        self.generator = torch.Generator().manual_seed(seed)
        self.sensitivity: dict[str, Tensor] = {}
        _refuse_quantized(self.config, type(model).__name__)
        self.plan = None if results is None else llm_awq.plan(model, results)
        # Search results say where the blocks are and bring their own folds.
        if self.plan is not None:
            blocks = self.plan.blocks
        self.blocks_name = find_blocks(model) if blocks is None else blocks
        try:
            self.blocks: list[nn.Module] = list(model.get_submodule(self.blocks_name).children())
        except AttributeError as error:
            raise UnsupportedModelError(f"blocks: {error}") from error
        self.traced: dict[Any, Traced] = {}
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.shared = {name for name, p in model.named_parameters(remove_duplicate=False) if uses[id(p)] > 1}
        model_type = getattr(self.config, "model_type", type(model).__name__)
        self.report = Report(method, model_type, self.group_size, self.zero_point)
        self.decisions: dict[str, Decision] = {}
        others: dict[str, LinearReport] = {}
        for name, module in model.named_modules():
            inside = name.startswith(self.blocks_name + ".")
            linear = as_linear(module)
            if linear is not None:
                decision = decide(name, linear, self.group_size, self.excluded)
                if not inside and decision.reason is None:
                    reason = "output head" if name in NEVER_CONVERTED else "outside the decoder blocks"
                    decision = Decision(name, decision.in_features, decision.out_features, reason)
                self.decisions[name] = decision
                if inside:
                    _check_weight(name, linear)
            elif inside:
                others.update(_other_weights(name, module))
        self.others = others
        if all(decision.reason is not None for decision in self.decisions.values()):
            raise UnsupportedModelError(
                "no linear of this model can be quantized:\n" + "\n".join(f"  {d}" for d in self.decisions.values())
            )
        self.clipped = {name for name, decision in self.decisions.items() if decision.reason is None and apply_clip}
        if self.plan is not None:
            self.report.search_results = self.plan.results.source
            self._check_groups(self.plan.results)

    def _check_groups(self, results: llm_awq.SearchResults) -> None:
        for clip in results.clips:
            if clip.linear not in self.clipped:
                continue
            in_features = self.decisions[clip.linear].in_features
            size = in_features // clip.bound.shape[1]
            if size != (in_features if self.group_size == -1 else self.group_size):
                raise CheckpointError(
                    f"{results.source}: {clip.linear} is clipped in groups of {size}, but is to be quantized with "
                    f"group size {self.group_size}; pass q_group_size={size} (--group-size {size})"
                )

    def run(self, windows: Callable[[], Tensor]) -> Report:
        inputs = None
        if self.method != "rtn" and self.plan is None:
            ids = windows()
            limit = self._check_tokens(ids)
            inputs = BlockInputs(self.model, self.blocks, ids)
            if self.method in COMPENSATING:
                inputs.quantized = inputs.hidden
            # Few tokens, whatever they are, show how a block is made.
            several = min(SEVERAL_TOKENS, max(limit, ids.shape[1]))
            few = ids.flatten().repeat(SINGLE_TOKENS)[: max(SINGLE_TOKENS, 2 * several)]
            self.single = BlockInputs(self.model, self.blocks, few[:SINGLE_TOKENS, None], batch=SINGLE_TOKENS)
            self.several = BlockInputs(self.model, self.blocks, few[: 2 * several].view(2, several))
            self.report.calibration_tokens = ids.numel()
        with self.progress.task("quantize blocks", total=len(self.blocks)) as task:
            for index in range(len(self.blocks)):
                self._block(index, inputs)
                task.advance(1, note=self._note())
        self.report.linears += [
            LinearReport(d.name, d.in_features, d.out_features, kept=d.reason)
            for d in self.decisions.values()
            if d.reason is not None
        ]
        kept = tuple(x.name for x in self.report.kept if x.name not in NEVER_CONVERTED)
        self.report.linears += list(self.others.values())
        if self.config is not None:
            self.config.quantization_config = QuantConfig(
                group_size=self.group_size, zero_point=self.zero_point, modules_to_not_convert=kept
            ).to_dict()
        return self.report

    def _check_tokens(self, ids: Tensor) -> int:
        """Raises CalibrationError unless the model can take them; returns how long a window it can (0: unknown)."""
        vocab = self.model.get_input_embeddings().num_embeddings if self.config is not None else None
        if vocab is not None and (int(ids.max()) >= vocab or int(ids.min()) < 0):
            raise CalibrationError(
                f"calibration token ids span {int(ids.min())}..{int(ids.max())}, but the model's vocabulary has "
                f"{vocab}: the tokenizer is of another model"
            )
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit:
            raise CalibrationError(f"seq_len {ids.shape[1]} is longer than the model's {limit} positions")
        return limit or 0

    def _note(self) -> str:
        errors = [x.error for x in self.report.linears if x.error is not None]
        return f"mean error {sum(errors) / len(errors):.3%}" if errors else ""

    def _block(self, index: int, inputs: BlockInputs | None) -> None:
        """Quantize one block, in float32; what stays unquantized goes back to its own dtype."""
        block, prefix = self.blocks[index], f"{self.blocks_name}.{index}."
        linears: dict[str, nn.Linear] = {}
        for name, module in list(block.named_modules()):
            linear = as_linear(module)
            if linear is not None and self.decisions[prefix + name].reason is None:
                linears[name] = linear
                block.set_submodule(name, linear)  # another one only if it was a Conv1D
        dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
        block.float()
        if self.plan is not None:
            self.plan.apply(block, prefix, self.clipped)
        reads: dict[str, _Input] = {}
        folds: list[Fold] = []
        if inputs is not None:
            for parameter in block.parameters():
                parameter.requires_grad_(False)
            if self.method != "gptq":
                self.sensitivity = inputs.sensitivity(index, block, linears, self.generator)
                folds = self._find_folds(index, block, prefix, linears)
            reads = self._collect(block, prefix, linears, folds, index, inputs)
        before = {
            name: _relative_error(linears[name].weight, reads[name].gram, self._round(linears[name])) for name in reads
        }
        for fold in folds:
            self._fold(block, prefix, fold, linears, reads, dtypes)
        compensated = {}
        if inputs is not None and self.method in COMPENSATING:
            compensated = self._compensate(index, block, linears, reads, inputs)
        for name, linear in linears.items():
            quantized = compensated[name] if compensated else self._quantize(linear, reads.get(name))
            entry = LinearReport(prefix + name, linear.in_features, linear.out_features)
            if name in reads:
                entry.error_rtn = before[name]
                entry.error = _relative_error(linear.weight, reads[name].gram, quantized)
            self.report.linears.append(entry)
            block.set_submodule(name, quantized)
        _restore(block, dtypes)

    def _find_folds(self, index: int, block: nn.Module, prefix: str, linears: Mapping[str, nn.Linear]) -> list[Fold]:
        """The folds to use, proven; the reasons of linears that have none go to the report."""

        def called_with(inputs: BlockInputs) -> Inputs:
            args, kwargs = inputs.arguments[index]
            return inputs.hidden, args, kwargs

        every = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        alike = type(block), tuple((name, type(module)) for name, module in block.named_modules())
        key = alike, tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        known = key in self.traced
        several = called_with(self.several)
        while True:
            if not known:
                self.traced[key] = trace(block, every, called_with(self.single), several)
            traced = self.traced[key]
            proofs = prove(block, traced.folds, several)
            if not known or not any(proofs):
                break
            known = False  # a block that is made like another may do something else
        self.several.hidden = self.several.run(index, block)
        reasons, folds = dict(traced.refused), []
        for fold, wrong in zip(traced.folds, proofs, strict=True):
            reason = wrong or self._why_not_usable(fold, prefix, linears)
            if reason is None:
                folds.append(fold)
            else:
                reasons.update(dict.fromkeys(fold.readers, reason))
        self.report.unscaled += [UnscaledReport(prefix + name, reasons[name]) for name in linears if name in reasons]
        return folds

    def _why_not_usable(self, fold: Fold, prefix: str, linears: Mapping[str, nn.Linear]) -> str | None:
        for name in fold.readers:
            if name not in linears:
                return f"{name}, which reads {fold.producer} too, stays as it is"
        if fold.plus is None and fold.producer not in linears:
            return f"{fold.producer}, in front of it, stays as it is"
        for name in (fold.producer, *fold.readers):
            if any(parameter.startswith(f"{prefix}{name}.") for parameter in self.shared):
                return f"the weights of {name} are used elsewhere in the model too"
        return None

    def _collect(
        self,
        block: nn.Module,
        prefix: str,
        linears: Mapping[str, nn.Linear],
        folds: Sequence[Fold],
        index: int,
        inputs: BlockInputs,
    ) -> dict[str, _Input]:
        """What each linear reads, over all windows; moves the inputs on to the next block."""
        first = {reader: fold.readers[0] for fold in folds for reader in fold.readers}
        watched = {first.get(name, name): block.get_submodule(first.get(name, name)) for name in linears}
        with calibrate.watching(watched) as statistics:
            inputs.hidden = inputs.run(index, block)
        shared = {name: _Input(*statistics[name].result(prefix + name)) for name in watched}
        return {name: shared[first.get(name, name)] for name in linears}

    def _fold(
        self,
        block: nn.Module,
        prefix: str,
        fold: Fold,
        linears: Mapping[str, nn.Linear],
        reads: Mapping[str, _Input],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Search the scale of one fold and move it from the readers' inputs into the producer."""
        readers = [linears[name] for name in fold.readers]
        shared = reads[fold.readers[0]]
        scale, losses = ops.search_scale(
            torch.cat([reader.weight for reader in readers]).cpu(),
            shared.x_mean,
            shared.gram,
            group_size=self.group_size,
            grid=GRID,
            duo_scaling=self.duo_scaling,
            zero_point=self.zero_point,
            tie=fold.tie,
            row_weight=torch.cat([self.sensitivity[name] for name in fold.readers]).cpu(),
        )
        scale = apply_fold(block, fold, scale.to(readers[0].weight.device), dtypes[f"{fold.producer}.weight"])
        shared.divide(scale.cpu())
        best = int(losses.argmin())
        self.report.folds.append(
            FoldReport(
                prefix + fold.producer,
                [prefix + name for name in fold.readers],
                float(losses[0]),
                float(losses[best]),
                _candidate_name(best),
            )
        )

    def _round(self, linear: nn.Linear, range: Tensor | None = None) -> AwqLinear:
        return AwqLinear.from_linear(
            linear, self.group_size, zero_point=self.zero_point, range=range, dtype=torch.float16
        )

    def _quantize(self, linear: nn.Linear, read: _Input | None) -> AwqLinear:
        if read is None or not self.apply_clip:
            return self._round(linear)
        range = ops.search_clip(
            linear.weight.detach().cpu(), read.gram, group_size=self.group_size, zero_point=self.zero_point
        )
        return self._round(linear, range.to(linear.weight.device))

    def _compensate(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        reads: Mapping[str, _Input],
        inputs: BlockInputs,
    ) -> dict[str, AwqLinear]:
        """Quantize the linears in the order in which the block calls them, each for the inputs that it will get.

        Those come through everything that is quantized before, in this block and in those in front of it, so a
        linear makes up for some of the errors made there. The linears in the block are replaced.
        """
        done: dict[str, AwqLinear] = {}
        for stage in inputs.stages(index, block, linears):
            statistics = inputs.quantized_statistics(index, block, {names[0]: linears[names[0]] for names in stage})
            for names in stage:
                seen = statistics[names[0]]
                # An expert may get its tokens from the original model's router only.
                gram = seen.result(names[0])[1] if seen.tokens else reads[names[0]].gram
                for name in names:
                    done[name] = self._quantize_compensated(linears[name], gram)
                    block.set_submodule(name, done[name])
        inputs.quantized = inputs.run(index, block, inputs.quantized)
        return done

    def _quantize_compensated(self, linear: nn.Linear, gram: Tensor) -> AwqLinear:
        weight = linear.weight.detach().cpu()
        options: dict[str, Any] = {"group_size": self.group_size, "zero_point": self.zero_point}
        range = ops.search_clip(weight, gram, **options) if self.apply_clip else None
        codes = ops.quantize_compensated(weight, gram, range=range, dtype=torch.float16, **options)
        return AwqLinear.from_codes(linear, *(part.to(linear.weight.device) for part in codes))


class _Input:
    """What one set of linears reads, on the CPU: x_mean [k] and gram [k, k] of :class:`calibrate.Statistics`."""

    def __init__(self, x_mean: Tensor, gram: Tensor) -> None:
        self.x_mean, self.gram = x_mean, gram

    def divide(self, scale: Tensor) -> None:
        """The input becomes x / scale."""
        self.x_mean = self.x_mean / scale
        self.gram = self.gram / scale / scale[:, None]


def _restore(block: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _candidate_name(index: int) -> str:
    if index == 0:
        return "identity"
    duo, step = divmod(index - 1, GRID)
    ratio = (step + 1) / GRID
    return f"x^{ratio:g} / w^{1 - ratio:g}" if duo else f"x^{ratio:g}"


def _relative_error(weight: Tensor, gram: Tensor, quantized: AwqLinear) -> float:
    """Mean squared error of the output over its mean square, on the tokens that gram was taken from."""
    weight = weight.detach().cpu()
    difference = quantized.dequantize(torch.float32).cpu() - weight
    power = ((weight @ gram) * weight).sum()
    return float(((difference @ gram) * difference).sum() / power) if power > 0 else 0.0


def _other_weights(name: str, module: nn.Module) -> dict[str, LinearReport]:
    """The weights of a module that is no linear and has some of two dimensions or more, by name."""
    reason = f"it is of a {type(module).__name__}, and only linears are quantized"
    return {
        f"{name}.{part}": LinearReport(f"{name}.{part}", weight.shape[-1], weight.numel() // weight.shape[-1], reason)
        for part, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1
    }


def _check_weight(name: str, linear: nn.Linear) -> None:
    if not linear.weight.is_floating_point() or linear.weight.element_size() < 2:
        raise UnsupportedModelError(
            f"{name}.weight is {linear.weight.dtype}: the model is already quantized. Quantize the original one"
        )
    if linear.weight.is_meta:
        raise UnsupportedModelError(f"{name}.weight is on the meta device: load the model before quantizing it")
    if not torch.isfinite(linear.weight).all():
        raise UnsupportedModelError(f"{name}.weight has NaN or infinite values: the checkpoint is damaged")
