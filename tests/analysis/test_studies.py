"""Studies run whole on digits, resume, refuse other settings, and draw their figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sparsekd.analysis import (
    BasisStudy,
    BasisTickets,
    DeepBootstrap,
    GradientFlow,
    GradientFlowStudy,
    StudyFolder,
    command,
)
from sparsekd.analysis.bases import figure as basis_figure
from sparsekd.analysis.bootstrap import figure as bootstrap_figure
from sparsekd.analysis.flow import figure as flow_figure
from sparsekd.analysis.flow.study import METHODS, Place
from sparsekd.cli import app
from sparsekd.errors import CheckpointError
from sparsekd.plots import save

pytestmark = pytest.mark.slow

FLOW = GradientFlow(
    data="digits",
    networks=("lenet300_100",),
    sparsities=(0.9,),
    seeds=2,
    epochs=4,
    every=3,
    probe_every=4,
    probe_images=100,
    hessian_images=60,
)


@pytest.fixture(scope="module")
def flow(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("flow")
    with StudyFolder(path, FLOW) as folder:
        GradientFlowStudy(FLOW, digits, folder).run()
    return path


def test_every_method_of_gradient_flow_has_its_rows(flow):
    with StudyFolder(flow, FLOW) as folder:
        results = folder.rows("result")
        assert sorted({row["method"] for row in results}) == sorted(METHODS)
        assert len(results) == 2 * len(METHODS)
        sizes = {row["nnz"] for row in results if row["method"] != "pruned"}
        final = {row["nnz"] for row in results if row["method"] == "pruned"}
        assert sizes == final  # one mask, or as many weights that move
        assert {row["method"] for row in folder.rows("update")} == {
            "pruned",
            "set",
            "rigl",
            "rigl+",
        }
        starts = [r for r in folder.rows("to_pruned") if r["method"] == "lt"]
        # LT starts where the solution did, whatever the seed of its order.
        assert len({row["distance_start"] for row in starts}) == 1


def test_lt_starts_from_the_initialisation_of_the_solution(flow, digits):
    place = Place("lenet300_100", 0.9)
    with StudyFolder(flow, FLOW) as folder:
        study = GradientFlowStudy(FLOW, digits, folder)
        dense, ticket = study.start(place, "pruned", 0), study.start(place, "lt", 1)
        mask = study.end(place, "pruned", 0).fc1.topology.mask()
        assert (ticket.fc1.topology.mask() == mask).all()
        assert (ticket.fc1.dense_weight() == dense.fc1.dense_weight() * mask).all()
        scratch = study.start(place, "scratch", 0)  # of the seed of the solution, and yet another
        assert (scratch.fc1.topology.mask() == mask).all()
        assert not (scratch.fc1.dense_weight() == ticket.fc1.dense_weight())[mask].any()


def test_dense_networks_start_from_the_initialisation_of_the_preset(digits, tmp_path):
    assert command.FLOW_PRESETS["published"].init == "glorot"
    config, place = replace(FLOW, init="glorot"), Place("lenet300_100", 0.9)
    with StudyFolder(tmp_path, config) as folder:
        weight = GradientFlowStudy(config, digits, folder).start(place, "pruned", 0).fc1
    bound = math.sqrt(6 / (64 + 300))  # Glorot and Bengio (2010), equation 16
    assert 0.99 * bound < weight.dense_weight().abs().max() <= bound
    assert not weight.bias.any()
    with pytest.raises(ValueError, match="init: expected one of torch, glorot, got 'he'"):
        replace(FLOW, init="he")


def test_the_figure_of_gradient_flow_needs_nothing_but_rows(flow, tmp_path):
    with StudyFolder(flow, FLOW) as folder:
        rows = folder.rows()
    files = save(flow_figure.figures(rows), tmp_path)
    assert [file.name for file in files] == ["lenet300_100-0.9.png"]
    assert len(flow_figure.table(rows)) == 1 + len(METHODS)


def test_a_finished_study_trains_nothing_again(flow, digits, monkeypatch):
    monkeypatch.setattr(GradientFlowStudy, "_train", None)
    monkeypatch.setattr(GradientFlowStudy, "_compare", None)
    with StudyFolder(flow, FLOW) as folder:
        before = folder.rows()
        GradientFlowStudy(FLOW, digits, folder).run()
        assert folder.rows() == before


def test_rows_of_a_job_cut_short_are_dropped(tmp_path):
    with StudyFolder(tmp_path, FLOW) as folder:
        folder.finish("a", [{"kind": "x", "number": 1 / 3}])
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write(json.dumps({"kind": "x", "run": "b"}) + '\n{"kind": "x", "ru')
    with StudyFolder(tmp_path, FLOW) as folder:
        assert folder.rows() == [
            {"kind": "x", "run": "a", "number": 0.3333333},
            {"kind": "done", "run": "a"},
        ]
        assert folder.done("a")
        assert not folder.done("b")


def test_files_that_a_kill_left_unfinished_are_removed(tmp_path):
    with StudyFolder(tmp_path, FLOW):
        pass
    unfinished = tmp_path / "runs" / ".final.safetensors.abc.tmp"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half of it")
    with pytest.raises(CheckpointError, match="lr="):
        StudyFolder(tmp_path, replace(FLOW, lr=0.1)).__enter__()
    assert unfinished.exists()  # a refused folder stays as it is
    with StudyFolder(tmp_path, FLOW):
        assert not unfinished.exists()


def test_a_folder_refuses_other_settings_but_not_more_seeds(tmp_path):
    with StudyFolder(tmp_path, FLOW) as folder:
        folder.finish("a", [])
        with pytest.raises(CheckpointError, match="another process"):
            StudyFolder(tmp_path, FLOW).__enter__()
    with StudyFolder(tmp_path, replace(FLOW, seeds=5)) as folder:
        assert folder.done("a")
    with pytest.raises(CheckpointError, match=r"lr=0\.05, expected 0\.1"):
        StudyFolder(tmp_path, replace(FLOW, lr=0.1)).__enter__()
    with StudyFolder(tmp_path, replace(FLOW, lr=0.1), fresh=True) as folder:
        assert not folder.done("a")


def test_a_folder_that_is_older_than_a_setting_has_its_default(tmp_path):
    with StudyFolder(tmp_path, FLOW) as folder:
        folder.finish("a", [])
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["init"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with StudyFolder(tmp_path, FLOW) as folder:
        assert folder.done("a")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="init='torch', expected 'glorot'"):
        StudyFolder(tmp_path, replace(FLOW, init="glorot")).__enter__()


BASES = BasisTickets(
    data="digits",
    networks=("lenet300_100",),
    densities=(0.1,),
    seeds=1,
    epochs=1,
)


def test_every_basis_has_its_rows_figure_and_times(digits, tmp_path):
    with StudyFolder(tmp_path, BASES) as folder:
        study = BasisStudy(BASES, digits, folder)
        study.run()
        study.time()
        rows = folder.rows()
    results = [row for row in rows if row["kind"] == "result"]
    assert [row["basis"] for row in results] == ["dense", *(b for b in BASES.bases for _ in "ab")]
    weights = 64 * 300 + 300 * 100 + 100 * 10
    for row in results[1:]:
        assert row["weights"] == weights
        assert row["stored"] <= round(0.1 * weights)
        if row["basis"] == "units":
            assert row["parameters_converted"] == row["kept"] == row["stored"]
        if row["basis"] == "svd":
            assert row["kept"] < row["parameters_converted"] < row["stored"]
    (timing,) = (row for row in rows if row["kind"] == "timing")
    names = [f"{basis}, as parametrized" for basis in BASES.bases]
    names += [f"{basis}, converted" for basis in ("identity", "svd", "units")]
    assert timing["ms"].keys() == {"dense", *names}
    files = save(basis_figure.figures(rows), tmp_path / "figures")
    assert [file.name for file in files] == ["lenet300_100.png"]
    assert len(basis_figure.table(rows)) == 2 + len(BASES.bases)


def test_the_commands_run_from_a_small_preset(tmp_path, monkeypatch):
    small = DeepBootstrap(
        network="lenet300_100", samples=40, steps=4, batch_size=10, seeds=1, probes=2, test=50
    )
    row = replace(command._BOOTSTRAP, presets={"small": small})
    monkeypatch.setattr(command, "_BOOTSTRAP", row)
    call = ["analyze", "bootstrap", "--sparsity", "0.9", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "figures" / "deep-bootstrap.png").exists()
    assert "KD ticket" in result.output
    again = CliRunner().invoke(app, [*call, "--format", "pdf,svg"])
    assert again.exit_code == 0
    assert {file.suffix for file in (tmp_path / "figures").iterdir()} == {".png", ".pdf", ".svg"}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    for axes in bootstrap_figure.figures(rows)["deep-bootstrap"].axes:
        assert not any(container.has_yerr for container in axes.containers)  # one seed
        assert not any(text.get_text() for text in axes.get_yticklabels(minor=True))


def test_a_study_of_some_of_its_networks_is_asked_for_by_name():
    presets = command._FLOW.presets
    config = command._config(presets, "full", {"networks": "lenet5", "seeds": 3})
    assert config == replace(presets["full"], networks=("lenet5",), seeds=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--preset", "huge"], "--preset: expected one of small, full"),
        (["--network", "resnet20"], "--network: expected some of lenet300_100, got 'resnet20'"),
        (["--sparsity", "1.5"], "sparsities: expected numbers in (0, 1), got 1.5"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1 and at most"),
        (["--format", "gif"], "format: expected some of png, pdf, svg, got 'gif'"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, tmp_path):
    call = ["analyze", "gradient-flow", *options, "--out", str(tmp_path / "none")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "none").exists()
