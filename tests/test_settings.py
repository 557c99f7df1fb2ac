"""Environment variables: every wrong value is refused, wherever it is met first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekd as skd
from sparsekd import settings
from sparsekd.errors import BackendError, SettingError
from sparsekd.ops.cpu.processor import select_isa
from sparsekd.ops.dispatch import backends

ROOT = Path(__file__).parents[1]
WRONG = [
    (name, value)
    for name in settings.TABLE
    for value in ("bogus", "OFF", "AVX2", " ")
    if name != "SPARSEKD_CACHE" or value == "OFF"  # the others may be folders
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEKD_")}
    return subprocess.run(
        [sys.executable, *command],
        env=clean | {"PYTHONPATH": str(Path(skd.__file__).parents[1])} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG)
def test_a_wrong_value_is_an_error_that_names_the_choices(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for call in (settings.check, skd.ops.info):
        with pytest.raises(SettingError) as caught:
            call()
        assert f"{name}: expected" in str(caught.value)
        assert repr(value) in str(caught.value)
        assert all(choice in str(caught.value) for choice in settings.TABLE[name].choices)
        assert isinstance(caught.value, BackendError)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", settings.TABLE)
def test_every_choice_is_taken_and_empty_is_unset(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for choice in settings.TABLE[name].choices:
        monkeypatch.setenv(name, choice)
        assert settings.get(name) == choice
    monkeypatch.setenv(name, "")
    assert settings.get(name) is None
    monkeypatch.delenv(name)
    assert settings.get(name) is None


@pytest.mark.parametrize(
    "name, command",
    [("SPARSEKD_ISA", ("-c", "import sparsekd")), ("SPARSEKD_BACKEND", ("-m", "sparsekd", "info"))],
)
def test_import_and_command_line_refuse_it(name: str, command: tuple[str, ...]) -> None:
    done = run(*command, **{name: "bogus"})
    assert done.returncode != 0
    assert f"{name}: expected one of auto" in done.stderr.splitlines()[-1]
    assert "got 'bogus'" in done.stderr.splitlines()[-1]


def test_the_first_op_refuses_a_backend_set_later(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = skd.nn.SparseLinear(8, 4, sparsity=0.5)
    layer(torch.ones(2, 8))
    monkeypatch.setenv("SPARSEKD_BACKEND", "bogus")
    with pytest.raises(SettingError, match=r"SPARSEKD_BACKEND: expected one of auto, .*bogus"):
        layer(torch.ones(2, 8))
    with skd.backend("reference"):
        layer(torch.ones(2, 8))


def test_an_instruction_set_that_the_processor_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    real = compiled.info()
    monkeypatch.setattr(compiled, "info", lambda: real | {"isas": ["scalar", "generic"]})
    monkeypatch.setenv("SPARSEKD_ISA", "avx512")
    with pytest.raises(SettingError, match=r"auto, scalar, generic.*this processor.*'avx512'"):
        select_isa()


def test_the_instruction_set_is_used() -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    show = "import sparsekd as skd; print(skd.ops.info()['cpp']['isa'])"
    done = run("-c", show, SPARSEKD_ISA="generic", SPARSEKD_TUNE="off", SPARSEKD_CACHE="")
    assert done.stdout.split() == ["generic"]
    assert done.stderr == ""


def test_a_folder_may_be_any_path_but_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path / "new" / "one", Path("relative")):
        monkeypatch.setenv("SPARSEKD_CACHE", str(folder))
        assert settings.get("SPARSEKD_CACHE") == str(folder)
    (tmp_path / "file").touch()
    for wrong in (str(tmp_path / "file"), "on", "0", "False", "none"):
        monkeypatch.setenv("SPARSEKD_CACHE", wrong)
        with pytest.raises(SettingError, match="expected off or the path of a folder"):
            settings.get("SPARSEKD_CACHE")


def test_misspelt_names_are_warned_of_once_with_what_was_meant() -> None:
    done = run("-c", "import sparsekd, sparsekd.nn", SPARSEKD_BACKED="cpp", SPARSEKD_ZZZ="1")
    assert done.returncode == 0
    assert done.stderr.count("SPARSEKD_BACKED is set") == 1
    assert "did you mean SPARSEKD_BACKEND?" in done.stderr
    assert "SPARSEKD_ZZZ is set, but sparsekd has no such variable; it has SPARSEKD_BACKEND" in (
        done.stderr
    )


def test_the_table_is_whole() -> None:
    assert settings.TABLE["SPARSEKD_BACKEND"].choices == tuple(backends.BACKENDS)
    cmake, docs = (ROOT / "CMakeLists.txt").read_text(), (ROOT / "docs/dispatch.md").read_text()
    assert "|".join(settings.TABLE["SPARSEKD_CUDA"].choices) in cmake
    sources = [ROOT / "setup.py"] + [
        path
        for folder in ("sparsekd", "csrc", "kernels", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".cc", ".h", ".cu", ".inl")
    ]
    read = re.compile(r"""(?:environ|getenv|VARIABLE)[^\n]*["'](SPARSEKD_\w+)["']""")
    found = {name for path in sources for name in read.findall(path.read_text())}
    assert {"SPARSEKD_BACKEND", "SPARSEKD_CUDA", "SPARSEKD_CACHE", "SPARSEKD_TUNE"} <= found
    assert found <= set(settings.TABLE)
    for name, setting in settings.TABLE.items():
        if name != "SPARSEKD_EMULATION_SANITIZED":
            assert all(f"`{word}`" in docs for word in (name, *setting.choices))
