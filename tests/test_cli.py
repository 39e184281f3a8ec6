"""The command line: results, pure JSON, messages without tracebacks, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'hf'")

import awq_ext
from awq_ext import cli, evaluate, pretrained
from awq_ext.checkpoint import load_quantized

TEXT = "The quick brown fox jumps over the lazy dog; in the year 1805 there were 27 ships in the harbour.\n" * 40
QUICK = ["--group-size", "32", "--samples", "2", "--seq-len", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def quantized(tiny_llama, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "model"
    assert cli.main(["quantize", str(tiny_llama), str(out), *QUICK, "--calibration", str(text)]) == 0
    return out


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def run(capsys):
    """Runs a command with --json in this process and gives its object; stdout must hold nothing else."""

    def run(*arguments: object, code: int = 0) -> dict:
        capsys.readouterr()
        assert cli.main([*map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def fail(capsys):
    """Runs a command that must fail with one message and exit code 1, and gives the message."""

    def fail(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main([str(a) for a in arguments]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("awq-ext: ")
        return err

    return fail


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- usage ----------------------------------------------------------------------------------------------------------


def test_module_and_help_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "awq_ext", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("quantize", "ppl", "eval", "generate", "convert", "verify", "inspect", "doctor", "demo"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice"),
        (["ppl", "model"], "--text"),
        (["ppl", "model", "--text", "t", "--window", "1"], "must be at least 2"),
        (["ppl", "model", "--text", "t", "--tokens", "0"], "must be at least 1"),
        (["ppl", "model", "--text", "t", "--threads", "zero"], "invalid"),
        (["quantize", "model", "out", "--group-size", "0"], "must be positive, or -1"),
        (["quantize", "model", "out", "--method", "spqr"], "invalid choice"),
        (["generate", "model", "--prompt", "x", "--dtype", "int8"], "invalid choice"),
        (["demo", "--model", "llama"], "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"awq-ext {awq_ext.__version__}\n"


# --- quantize -------------------------------------------------------------------------------------------------------


def test_quantize_reports_and_saves_what_the_function_makes(tiny_llama, text, tmp_path, run):
    out = tmp_path / "out"
    result = run("quantize", tiny_llama, out, *QUICK, "--calibration", text, "--seed", 3)
    assert result["out"] == str(out)
    assert (result["method"], result["group_size"], result["calibration_tokens"]) == ("awq+", 32, 128)
    assert sum(linear["kept"] is None for linear in result["linears"]) == 14

    expected = awq_ext.quantize(
        str(tiny_llama), calibration=str(text), samples=2, seq_len=64, seed=3, q_group_size=32
    ).state_dict()
    saved = load_quantized(out).state_dict()
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


def test_quantize_says_what_it_did(tiny_llama, text, tmp_path, capsys):
    assert cli.main(["quantize", str(tiny_llama), str(tmp_path / "out"), *QUICK, "--calibration", str(text)]) == 0
    out, err = capsys.readouterr()
    assert "14 linears quantized to 4 bits in groups of 32 (awq+)" in out
    assert "calibrated on 128 tokens in 2 windows of 64, the rest left out" in out.replace("; ", ", ")
    assert "lm_head" in out
    assert f"saved to {tmp_path / 'out'}" in out
    assert err == ""  # no bars, no notices of libraries where nobody watches


def test_quantize_draws_rows_of_a_file_by_seed(tiny_llama, tmp_path, run):
    pytest.importorskip("datasets", reason="needs the extra 'hf'")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}: {TEXT[i : i + 90]}"}) + "\n" for i in range(60)))
    options = ["--calibration", rows, "--no-pack", "--samples", 4, "--seq-len", 32, "--group-size", 32]
    drawn = run("quantize", tiny_llama, tmp_path / "a", *options, "--shuffle", "--seed", 7, "--blocks", "model.layers")
    assert drawn["calibration_tokens"] == 128
    assert ", drawn with seed 7 from the first 60" in drawn["calibration"]
    model = awq_ext.quantize(
        str(tiny_llama),
        calibration=[json.loads(line) for line in rows.read_text().splitlines()],
        samples=4,
        seq_len=32,
        q_group_size=32,
        shuffle=True,
        pack=False,
        seed=7,
    )
    saved = load_quantized(tmp_path / "a").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    run("quantize", tiny_llama, tmp_path / "b", *options, "--seed", 7)
    first = load_quantized(tmp_path / "b").state_dict()
    assert any(not torch.equal(first[name], saved[name]) for name in saved)


def test_quantize_resumes_what_was_interrupted(tiny_llama, text, quantized, tmp_path, run, fail, monkeypatch):
    from awq_ext.block_files import BlockFiles

    write = BlockFiles.write

    def interrupted(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *rest)

    command = ["quantize", tiny_llama, tmp_path / "out", *QUICK, "--calibration", text]
    with monkeypatch.context() as patched:
        patched.setattr(BlockFiles, "write", interrupted)
        assert cli.main([*map(str, command)]) == 130
    assert not (tmp_path / "out").exists()
    assert "seed" in fail(*command, "--seed", "1", "--resume")
    assert "--resume has no use" in fail(*command[:-2], "--search-results", "x", "--resume")
    finished = []
    monkeypatch.setattr(
        BlockFiles, "write", lambda self, index, *rest: (finished.append(index), write(self, index, *rest))
    )
    assert run(*command, "--resume")["calibration_tokens"] == 128
    assert finished == [1]
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (quantized / weights).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_quantize_notes_that_the_builtin_text_is_a_makeshift(tiny_llama, tmp_path, capsys):
    assert cli.main(["quantize", str(tiny_llama), str(tmp_path / "out"), *QUICK, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["calibration_tokens"] == 128
    assert re.fullmatch(r"awq-ext: calibrating on Python's own help text; .*\n", err)


def test_default_number_of_samples_is_what_the_text_can_give(tiny_llama, text, tmp_path, run):
    result = run("quantize", tiny_llama, tmp_path / "out", "--group-size", 32, "--seq-len", 8)
    assert result["calibration_tokens"] == 32 * 8
    result = run("quantize", tiny_llama, tmp_path / "out", "--group-size", 32, "--seq-len", 8, "--calibration", text)
    assert result["calibration_tokens"] == 128 * 8


def test_round_to_nearest_needs_neither_text_nor_tokenizer(copy, tmp_path, run):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    result = run("quantize", copy, tmp_path / "out", "--method", "rtn", "--group-size", "32")
    assert (result["method"], result["calibration_tokens"]) == ("rtn", 0)
    assert len(run("inspect", tmp_path / "out")["layers"]) == 14


def test_options_of_quantize_reach_the_checkpoint(tiny_llama, tmp_path, run):
    out = tmp_path / "out"
    options = ["--skip", "down_proj", "--skip", "layers.0.self_attn.q_proj", "--no-zero-point", "--method", "rtn"]
    run("quantize", tiny_llama, out, "--group-size", "-1", *options)
    result = run("inspect", out)
    assert {layer["group_size"] for layer in result["layers"]} == {128}  # -1: all input channels
    names = [layer["name"] for layer in result["layers"]]
    assert len(names) == 14 - 3
    assert not any("down_proj" in name or name == "model.layers.0.self_attn.q_proj" for name in names)
    zeros = load_quantized(out).state_dict()["model.layers.0.mlp.up_proj.qzeros"]
    assert set(zeros.flatten().tolist()) == {0x88888888 - 2**32}  # symmetric codes: every zero is 8


def test_no_clip_is_heard(tiny_llama, text, quantized, tmp_path, run):
    run("quantize", tiny_llama, tmp_path / "out", *QUICK, "--calibration", text, "--no-clip")
    clipped, plain = load_quantized(quantized).state_dict(), load_quantized(tmp_path / "out").state_dict()
    assert any(not torch.equal(clipped[name], plain[name]) for name in clipped if name.endswith("scales"))


def test_quantize_keeps_the_tokenizer(tiny_llama, quantized):
    a, b = pretrained.load_tokenizer(tiny_llama), pretrained.load_tokenizer(quantized)
    assert a(TEXT)["input_ids"] == b(TEXT)["input_ids"]


def test_quantize_refuses_what_it_cannot_do(tiny_llama, quantized, copy, text, tmp_path, fail):
    out = tmp_path / "out"
    assert "does not exist" in fail("quantize", tmp_path / "nothing", out)
    assert "100" in fail("quantize", tiny_llama, out, "--group-size", "100", "--method", "rtn")
    assert "already quantized" in fail("quantize", quantized, out)
    message = fail("quantize", tiny_llama, out, "--calibration", text, "--samples", "1000")
    assert "1000 samples of 512" in message
    assert "not a file" in fail("quantize", tiny_llama, out, "--calibration", tmp_path / "no.txt")
    assert "no_such_list" in fail("quantize", tiny_llama, out, "--calibration", text, "--blocks", "no_such_list")
    assert not out.exists()
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer can be loaded" in fail("quantize", copy, out)
    edit_json(copy / "config.json", model_type="no-such-thing", architectures=["NoSuchThing"])
    assert "no-such-thing" in fail("quantize", copy, out, "--method", "rtn")


def test_quantize_refuses_before_the_work_to_write_over_something_else(copy, tmp_path, fail, monkeypatch):
    def never(*_, **__):
        raise AssertionError("quantized before it looked where to write")

    monkeypatch.setattr("awq_ext.quantizer._open", never)
    before = (copy / "model.safetensors").read_bytes()
    assert "would be lost" in fail("quantize", copy, copy)
    assert (copy / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("x")
    assert "is a file" in fail("quantize", copy, tmp_path / "file")


# --- ppl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_ppl_of_a_model_and_of_a_checkpoint(tiny_llama, quantized, text, bos, run):
    for path in (tiny_llama, quantized):
        model, tokenizer = pretrained.load_any(path)
        ids = evaluate.first_tokens(TEXT, tokenizer, 300)
        expected = evaluate.perplexity(model, None, ids, 50, bos=1 if bos else None)
        options = ["--bos"] if bos else []
        result = run("ppl", path, "--text", text, "--window", 50, "--tokens", 300, *options)
        assert result["perplexity"] == pytest.approx(expected.value, rel=1e-6)
        assert result["tokens"] == expected.tokens == 6 * 49


def test_ppl_for_people(tiny_llama, text, capsys):
    assert cli.main(["ppl", str(tiny_llama), "--text", str(text), "--window", "50", "--tokens", "100"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"perplexity \d+\.\d{4} over 98 predictions \(\d+ s\)\n", out)
    assert err == ""


def test_ppl_says_when_there_is_less_text_than_asked_for(tiny_llama, text, capsys):
    assert cli.main(["ppl", str(tiny_llama), "--text", str(text), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] % 511 == 0
    assert re.search(r"has only \d+ tokens", err)


def test_ppl_refuses_what_it_cannot_do(tiny_llama, copy, text, tmp_path, fail):
    assert "does not exist" in fail("ppl", tmp_path / "nothing", "--text", text)
    assert "no.txt" in fail("ppl", tiny_llama, "--text", tmp_path / "no.txt")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "too short" in fail("ppl", tiny_llama, "--text", short)
    short.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in fail("ppl", tiny_llama, "--text", short)
    assert "more than the model's 512 positions" in fail("ppl", tiny_llama, "--text", text, "--window", "600")
    edit_json(copy / "tokenizer_config.json", bos_token=None)
    assert "no bos token" in fail("ppl", copy, "--text", text, "--bos")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer can be loaded" in fail("ppl", copy, "--text", text)
    assert "is no device" in fail("ppl", tiny_llama, "--text", text, "--device", "toaster")
    assert "not on meta" in fail("ppl", tiny_llama, "--text", text, "--device", "meta")
    if not torch.cuda.is_available():
        assert "no CUDA device" in fail("ppl", tiny_llama, "--text", text, "--device", "cuda")


# --- eval -----------------------------------------------------------------------------------------------------------


def test_eval_compares_with_the_original(tiny_llama, quantized, text, run, capsys):
    options = ["--text", text, "--window", 50, "--stride", 20, "--tokens", 300, "--bos"]
    result = run("eval", quantized, "--against", tiny_llama, *options)
    (model, tokenizer), (original, _) = pretrained.load_any(quantized), pretrained.load_any(tiny_llama)
    ids = evaluate.first_tokens(TEXT, tokenizer, 300)
    expected = evaluate.divergence(model, original, ids, 50, 20, bos=1)
    for name, value in {
        "perplexity": expected.model.value,
        "nll": expected.model.nll,
        "original_perplexity": expected.original.value,
        "original_nll": expected.original.nll,
        "perplexity_difference": expected.model.value - expected.original.value,
        "nll_difference": expected.nll_difference,
        "nll_difference_error": expected.nll_error,
        "kl": expected.kl,
        "kl_p99": expected.kl_p99,
        "top1": expected.top1,
    }.items():
        assert result[name] == pytest.approx(value, rel=1e-6), name
    assert (result["tokens"], result["windows"]) == (49 + 12 * 20, 13)
    assert (result["window"], result["stride"], result["bos"]) == (50, 20, 1)
    assert 0 < result["kl"] < result["kl_p99"] and result["top1"] < 1

    assert cli.main(["eval", str(quantized), "--against", str(tiny_llama), *map(str, options)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1:] == [
        f"original {expected.original.value:.4f}, so the difference is "
        f"{expected.model.value - expected.original.value:+.4f} "
        f"({expected.model.value / expected.original.value - 1:+.2%})",
        f"nats a token {expected.nll_difference:+.4f} +- {expected.nll_error:.4f} "
        "(standard error, paired over the 13 windows)",
        f"KL(original || model) {expected.kl:.4f} nats a token, 99th percentile {expected.kl_p99:.4f}",
        f"same likeliest token in {expected.top1:.2%}",
    ]


def test_eval_of_a_model_alone_is_its_perplexity(tiny_llama, text, run):
    options = ["--text", text, "--window", 50, "--tokens", 100]
    alone, ppl = run("eval", tiny_llama, *options), run("ppl", tiny_llama, *options)
    assert alone | {"seconds": 0} == ppl | {"seconds": 0} and "kl" not in alone
    itself = run("eval", tiny_llama, "--against", tiny_llama, "--text", text, "--window", 50, "--tokens", 50)
    assert itself["kl"] == itself["nll_difference"] == 0 and itself["nll_difference_error"] is None


def test_eval_refuses_what_it_cannot_compare(tiny_llama, copy, text, tmp_path, fail):
    assert "does not exist" in fail("eval", tiny_llama, "--against", tmp_path / "nothing", "--text", text)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    used = pretrained.load_tokenizer(copy).tokenize(TEXT)[0]
    vocabulary[used], vocabulary["$"] = vocabulary["$"], vocabulary[used]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "give other tokens" in fail("eval", tiny_llama, "--against", copy, "--text", text)
    assert "stride must be from 1 to the 50" in fail(
        "eval", tiny_llama, "--text", text, "--window", "50", "--stride", "60"
    )


# --- generate, inspect ----------------------------------------------------------------------------------------------


def test_generate(quantized, run, capsys):
    expected = evaluate.generate(*pretrained.load_any(quantized), "Once upon", 6)
    result = run("generate", quantized, "--prompt", "Once upon", "--max-new-tokens", 6)
    assert (result["text"], result["new_tokens"]) == (expected.text, expected.new_tokens)
    assert result["tokens_per_second"] == pytest.approx(result["new_tokens"] / result["seconds"])
    assert cli.main(["generate", str(quantized), "--prompt", "Once upon", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == expected.text + "\n"


def test_generate_refuses_what_it_cannot_do(tiny_llama, fail):
    assert "no chat template" in fail("generate", tiny_llama, "--prompt", "Once", "--chat")
    assert "prompt is empty" in fail("generate", tiny_llama, "--prompt", "")


def test_inspect_counts_what_is_there(tiny_llama, quantized, run, capsys):
    result = run("inspect", quantized)
    assert result["quantization"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert result["quantized_linears"] == len(result["layers"]) == 14
    assert result["layers"][0] == {
        "name": "model.layers.0.mlp.down_proj",
        "in_features": 256,
        "out_features": 128,
        "group_size": 32,
        "bias": False,
    }
    weights = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    assert result["quantized_weights"] == weights
    kept = {tensor["name"]: tensor for tensor in result["not_quantized"]}
    assert kept["lm_head.weight"]["shape"] == [320, 128]
    others = 2 * 320 * 128 + 5 * 128  # embeddings and head, five norms
    assert sum(torch.Size(t["shape"]).numel() for t in kept.values()) == others
    assert result["float16_bytes"] == 2 * (weights + others)
    assert result["bytes"] == sum(file.stat().st_size for file in quantized.glob("*.safetensors"))

    assert cli.main(["inspect", str(quantized)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in out
    assert "14 linears quantized" in out


def test_inspect_refuses_what_it_cannot_read(tiny_llama, tmp_path, fail):
    assert "does not exist" in fail("inspect", tmp_path / "nothing")
    assert str(tiny_llama) in fail("inspect", tiny_llama)


def test_inspect_of_another_layout(shared, run):
    path = shared / "data" / "checkpoints" / "llmcompressor-pack-quantized"
    result = run("inspect", path)
    assert result["quantization"]["quant_method"] == "compressed-tensors"
    assert result["quantized_linears"] == 14 and result["layers"][0]["group_size"] == 64
    assert not any("weight_" in tensor["name"] for tensor in result["not_quantized"])


# --- convert --------------------------------------------------------------------------------------------------------


def test_convert(shared, tmp_path, run, fail):
    source = shared / "data" / "checkpoints" / "autoawq-gemm"
    result = run("convert", source, tmp_path / "out", "--to", "gptq_v2")
    assert result["layout"] == "gptq_v2" and Path(result["out"]) == tmp_path / "out"
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert run("inspect", tmp_path / "out")["quantization"]["checkpoint_format"] == "gptq_v2"
    assert "every zero must be 8" in fail("convert", source, tmp_path / "marlin", "--to", "marlin")
    assert not (tmp_path / "marlin").exists()
    assert "for a .pt file" in fail("convert", source, tmp_path / "out", "--to", "gemm", "--group-size", "64")


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_finds_this_installation_sound(run, capsys):
    result = run("doctor")
    assert result["ok"] is True
    assert result["packages"]["torch"] == torch.__version__
    assert result["libraries"]["libawq_ops.so"]["loaded"] is True
    assert Path(result["libraries"]["libawq_ops.so"]["path"]).is_file()
    assert result["self_check"]["cpu"] == "ok"
    assert cli.main(["doctor"]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.parametrize("error", [0.1, float("nan")])  # one wrong code is 0.8 of x
def test_doctor_notices_wrong_results(run, monkeypatch, error):
    right = awq_ext.ops.linear

    def wrong(x, *tensors, **options):
        y = right(x, *tensors, **options)
        return y + error * (torch.arange(y.numel()).view(y.shape) == y.numel() - 1)

    monkeypatch.setattr(awq_ext.ops, "linear", wrong)
    result = run("doctor", code=1)
    assert result["ok"] is False
    assert result["self_check"]["cpu"].startswith("failed: linear of 1 rows, group size 32, torch.float32")


def test_doctor_reports_an_operator_that_raises(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(awq_ext.ops, "linear", broken)
    assert "RuntimeError: illegal instruction" in run("doctor", code=1)["self_check"]["cpu"]


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory):
    """Runs code in a process that has the package's Python files, but no compiled library."""
    place = tmp_path_factory.mktemp("without_libraries")
    package = Path(awq_ext.__file__).parent
    shutil.copytree(package, place / "awq_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable installation has a finder that would come before the path.
    prelude = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]; "
        f"sys.path.insert(0, {str(place)!r}); "
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("AWQ_LIB_DIR", "PYTHONPATH")}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", prelude + code]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)

    return run


def test_doctor_explains_a_missing_library(without_libraries):
    done = without_libraries("from awq_ext.cli import main; sys.exit(main(['doctor', '--json']))")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] is False
    assert result["self_check"] == {}
    assert "libawq_ops.so was not found" in result["problems"][0]
    assert "pip install ." in result["problems"][0]


def test_other_commands_explain_a_missing_library(without_libraries):
    done = without_libraries("from awq_ext.cli import main; sys.exit(main(['inspect', '.']))")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "awq-ext: libawq_ops.so was not found" in done.stderr


def test_the_package_without_its_library_warns_and_raises_on_use(without_libraries):
    done = without_libraries(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import awq_ext\n"
        "assert any('libawq_ops.so was not found' in str(w.message) for w in caught), caught\n"
        "assert not hasattr(awq_ext, 'no_such_name')\n"
        "for use in ('awq_ext.quantize', 'from awq_ext import AwqLinear', 'import awq_ext.checkpoint'):\n"
        "    try:\n"
        "        exec(use)\n"
        "    except awq_ext.LibraryError as error:\n"
        "        assert 'pip install' in str(error)\n"
        "    else:\n"
        "        raise AssertionError(use)\n"
    )
    assert done.returncode == 0, done.stderr


# --- what all commands share ----------------------------------------------------------------------------------------


@pytest.fixture
def ppl(tiny_llama, text):
    return ["ppl", str(tiny_llama), "--text", str(text), "--window", "50", "--tokens", "100"]


def test_an_interruption_exits_with_130(ppl, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "perplexity", interrupted)
    assert cli.main(ppl) == 130
    assert capsys.readouterr() == ("", "awq-ext: interrupted\n")


def test_an_unexpected_error_is_told_briefly(ppl, monkeypatch, capsys):
    def bug(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(evaluate, "perplexity", bug)
    assert cli.main(ppl) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "awq-ext: ZeroDivisionError: by zero\n(unexpected; --debug shows where)\n"
    assert cli.main([*ppl, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(tmp_path, text, capsys):
    assert cli.main(["ppl", str(tmp_path / "nothing"), "--text", str(text), "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("awq-ext: ")


def test_what_libraries_print_stays_off_stdout(ppl, monkeypatch, capsys):
    score = evaluate.perplexity

    def chatty(*arguments, **options):
        print("a library prints")
        return score(*arguments, **options)

    monkeypatch.setattr(evaluate, "perplexity", chatty)
    assert cli.main([*ppl, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == 98
    assert "a library prints" in err


def test_threads_are_set(ppl, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert cli.main([*ppl, "--threads", "3"]) == 0
    assert seen == [3]


def test_a_reader_that_leaves_early_is_no_traceback(quantized):
    # More than a pipe holds (64 KB); the reader takes the first line only.
    code = (
        "import sys; from awq_ext import cli; "
        "cli._inspect = lambda args: cli.Output({'x': ['y'] * 100000}, []); "
        "sys.exit(cli.main(['inspect', 'x', '--json']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"{\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1
