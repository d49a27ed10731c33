"""Tuning: which tiles are tried, which one wins, and that the tables take and keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm_kernels import aot, configs, tune
from fastlm_kernels.configs import RowConfig
from fastlm_kernels.registry import Case
from fastlm_kernels.tune import SUBJECTS, Subject, Trial

FORWARD = next(subject for subject in SUBJECTS if subject.table == "NORM_FORWARD")


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and file that no other test sees."""
    for name, table in vars(configs).items():
        if isinstance(table, dict) and "generic" in table:
            monkeypatch.setattr(configs, name, dict(table))
    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned.json")


def clock(times: dict[int, float]) -> Trial:
    """A trial in which the number of warps decides, 1.0 where `times` has none; nothing spills, all is accurate."""

    def milliseconds(subject: Subject, case: Case) -> float:
        config = configs.row_config(configs.NORM_FORWARD, "sm_90", case["columns"])
        return times.get(config.num_warps, 1.0)

    return Trial(lambda *_: False, lambda *_: True, milliseconds, lambda *_: True)


def test_every_table_has_a_subject() -> None:
    """A table that cannot be tuned would stay a guess; the two small second passes are not worth a minute."""
    tables = {name for name, table in vars(configs).items() if isinstance(table, dict) and "generic" in table}
    assert tables == {subject.table for subject in SUBJECTS}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.table)
def test_every_bucket_has_a_call_that_lands_in_it(subject: Subject) -> None:
    """Of about 256 MiB a tensor, or as many rows as the check needs."""
    kernel = tune.kernel_named(subject.kernel)
    for config in configs.rows_of(subject.table, "sm_90"):
        case = tune.bucket_case(subject, config, kernel)
        assert "rows" in subject.case or case["rows"] >= 64
        assert set(kernel.inputs(subject.dtype, "meta", 0, **case))
        if "columns" not in subject.case and isinstance(config, RowConfig):
            assert configs.row_config(vars(configs)[subject.table], "sm_90", case["columns"]) == config


def test_the_present_tile_and_those_around_it_are_tried() -> None:
    """Half and twice the rows and the warps; depths where the kernel loops."""
    tried = set(tune.candidates(RowConfig(2, 512, 4), loops=False))
    assert tried == {RowConfig(m, 512, w) for m in (1, 2, 4) for w in (2, 4, 8)}
    assert {c.num_stages for c in tune.candidates(RowConfig(1, 512, 32), loops=True)} == {1, 2, 3, 4}
    assert {c.block_m for c in tune.candidates(RowConfig(1, 512, 32), loops=True)} == {1, 2}
    assert {c.num_warps for c in tune.candidates(RowConfig(1, 512, 32), loops=True)} == {16, 32}


def test_descriptors_are_tried_where_the_hardware_has_them() -> None:
    """By tiles that compile there: the fastest of them is taken, and kept in a form that is read again."""
    subject = next(subject for subject in SUBJECTS if subject.table == "ATTENTION_FORWARD")

    def seconds(subject: Subject, case: Case) -> float:
        used = {a: configs.attention_config(configs.ATTENTION_FORWARD, a, case["columns"]) for a in ("sm_89", "sm_90")}
        return 0.5 if any(config.loads == "specialized" for config in used.values()) else 1.0

    trial = replace(clock({}), milliseconds=seconds)
    assert tune.tune_bucket(subject, 0, "sm_89", trial)[0].loads == "pointers"
    best = tune.tune_bucket(subject, 0, "sm_90", trial)[0]
    assert (best.loads, best.num_warps, best.block_m) == ("specialized", 4, 128)
    assert {c.num_warps for c in tune.candidates(best, loops=True)} == {4}
    configs.save("ATTENTION_FORWARD", "sm_90", (best,), "a GPU")
    del configs.ATTENTION_FORWARD["sm_90"]
    configs.read_tuned(configs.TUNED)
    assert configs.ATTENTION_FORWARD["sm_90"] == (best,)


@pytest.mark.parametrize(
    "subject", [subject for subject in SUBJECTS if subject.table.startswith("ATTENTION")], ids=lambda s: s.table
)
def test_attention_is_judged_where_its_loops_go_round(subject: Subject) -> None:
    """Three tiles or more of queries and of keys, whichever tile is on trial; where one query is timed, of keys."""
    for architecture in configs.ARCHITECTURES:
        for present in configs.rows_of(subject.table, architecture):
            case = tune.bucket_case(subject, present, tune.kernel_named(subject.kernel))
            checked = tune.checked_case(subject, case)
            assert checked["columns"] == case["columns"]
            for tile in (present, *tune.candidates(present, loops=True), *tune.descriptor_candidates(present)):
                assert checked.get("keys", checked["rows"]) >= 3 * tile.block_n
                assert checked["rows"] >= 3 * tile.block_m or case["rows"] == 1


def test_what_no_gpu_has_run_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in Gluon, before it is timed: without a GPU that process fails, and nothing of it runs in this one."""
    subject = next(subject for subject in SUBJECTS if subject.table == "ATTENTION_FORWARD")
    case = tune.bucket_case(subject, configs.ATTENTION_GLUON[0], tune.kernel_named(subject.kernel))
    order = (configs.ATTENTION_GLUON[0], subject.table, "sm_90", case)
    given: list[Case] = []
    monkeypatch.setattr(tune, "accurate", lambda subject, case: given.append(case) or False)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: exec(words[2]))
    with pytest.raises(ValueError, match=r"not accurate: .*gluon-resident"):
        tune.survives(*order)
    assert given == [case]

    def hangs(*_: object, timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert not tune.survives(*order)
    trial = replace(clock({}), survives=tune.survives, milliseconds=lambda *_: 1.0)
    assert "loads='pointers'" in tune.tune_bucket(subject, 0, "sm_90", trial)[1]


def test_no_call_of_gluon_is_judged_in_this_process() -> None:
    """Right and fastest on the timed call, then hanging with a soft-cap: it never takes the place."""
    subject = next(subject for subject in SUBJECTS if subject.table == "ATTENTION_FORWARD")

    def in_gluon() -> bool:
        return configs.rows_of("ATTENTION_FORWARD", "sm_90")[0].loads.startswith("gluon")

    trial = replace(
        clock({}),
        survives=lambda config, table, architecture, case: "softcap" not in case,
        milliseconds=lambda *_: 0.1 if in_gluon() else 1.0,
    )
    assert tune.tune_bucket(subject, 0, "sm_90", trial)[0].loads == "pointers"
    trial = replace(trial, survives=lambda *_: True)
    assert tune.tune_bucket(subject, 0, "sm_90", trial)[0].loads.startswith("gluon")


def test_the_fastest_wins() -> None:
    """And the line says by how much."""
    best, line = tune.tune_bucket(FORWARD, 2, "sm_90", clock({8: 0.5}))
    assert (best.num_warps, best.block_n) == (8, 256)
    assert "0.5000 ms, was 1.0000" in line


def test_less_than_three_percent_is_noise() -> None:
    """The tile in the table stays."""
    assert tune.tune_bucket(FORWARD, 2, "sm_90", clock({8: 0.98}))[0] == configs.NORM_FORWARD["generic"][2]


@pytest.mark.parametrize("defect", ["spills", "accurate"])
def test_fast_and_wrong_never_wins(defect: str) -> None:
    """Nor does a tile whose binary spills."""

    def bad(subject: Subject, case: Case, *_: str) -> bool:
        wrong = configs.row_config(configs.NORM_FORWARD, "sm_90", case["columns"]).num_warps == 8
        return wrong if defect == "spills" else not wrong

    trial = replace(clock({8: 0.1, 2: 0.5}), **{defect: bad})
    assert tune.tune_bucket(FORWARD, 2, "sm_90", trial)[0].num_warps == 2


ATTENTION = [subject for subject in SUBJECTS if subject.table.startswith("ATTENTION")]


@pytest.mark.parametrize("defect", ["spills", "accurate"])
@pytest.mark.parametrize("switch", ["window", "softcap", "padded", "masked", "lse", "dropout", "documents", "kv_heads"])
def test_a_tile_that_fails_one_of_the_calls_it_serves_never_wins(switch: str, defect: str) -> None:
    """Right and fastest on the timed call: the next one takes the place. The present one spills and stays right."""
    subject = next(subject for subject in SUBJECTS if subject.table == "ATTENTION_DKDV")
    present = configs.rows_of("ATTENTION_DKDV", "sm_90")[0]

    def used() -> configs.AttentionConfig:
        return configs.rows_of("ATTENTION_DKDV", "sm_90")[0]

    def milliseconds(subject: Subject, case: Case) -> float:
        return {4: 0.4, 1: 0.5}.get(used().num_stages, 1.0)

    def fails(subject: Subject, case: Case, *_: str) -> bool:
        asked = case.get(switch)
        return used().num_stages == 4 and bool(asked) and (switch != "kv_heads" or asked == 1)

    judged = fails if defect == "spills" else lambda *given: not fails(*given)
    trial = replace(clock({}), milliseconds=milliseconds, **{defect: judged})
    assert tune.tune_bucket(subject, 0, "sm_90", trial)[0].num_stages == 1
    alone = replace(trial, accurate=lambda subject, case: used() == present or "softcap" not in case)
    assert tune.tune_bucket(subject, 0, "sm_90", alone)[0] == present


@pytest.mark.needs_triton
@pytest.mark.parametrize("subject", ATTENTION, ids=lambda subject: subject.table)
def test_the_calls_that_a_tile_is_judged_by_use_it(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each switch reaches a kernel whose launch takes the tile on trial; all of them are among a tile's calls."""
    table = configs.rows_of(subject.table, "sm_90")
    case = tune.bucket_case(subject, table[0], tune.kernel_named(subject.kernel))
    switches: set[str] = set()
    for other in tune.served_cases(subject, case):
        kernel, few = tune.kernel_of(subject, other), tune.checked_case(subject, other)
        with configs.trying(subject.table, "sm_90", (replace(table[0], num_warps=2), *table[1:])):
            launches = aot.record_call(kernel, kernel.inputs(subject.dtype, "meta", 0, **few), "sm_90")
        mine = [launch for launch in launches if launch.options["num_warps"] == 2]
        assert mine, other
        if few.get("kv_heads", few["heads"]) < few["heads"]:
            switches.add("grouped heads")
        switches |= {name for launch in mine for name, value in launch.constexprs.items() if value is True}
    wanted = {
        "grouped heads",
        "HAS_LEFT",
        "HAS_RIGHT",
        "BOTTOM_RIGHT",
        "HAS_MASK",
        "HAS_KEY_MASK",
        "HAS_SOFTCAP",
        "HAS_DROPOUT",
    }
    assert switches >= wanted | ({"PACKED"} if case["rows"] > 1 else {"SPLIT"})


def test_a_table_is_left_as_it_was_after_an_error() -> None:
    """The tiles on trial are put in place for the trial alone."""

    def fail(subject: Subject, case: Case) -> float:
        raise KeyboardInterrupt

    before = dict(configs.NORM_FORWARD)
    with pytest.raises(KeyboardInterrupt):
        tune.tune_bucket(FORWARD, 2, "sm_90", replace(clock({}), milliseconds=fail))
    assert before == configs.NORM_FORWARD


def test_answers_are_kept_and_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Bucket by bucket in the file; another architecture keeps its own, and the other tables theirs."""
    before = configs.rows_of("NORM_FORWARD", "sm_80")
    tune.tune(["NORM_FORWARD"], "sm_90", "a GPU", clock({8: 0.5, 16: 0.4}))
    assert len(capsys.readouterr().out.splitlines()) == len(before)
    tuned = configs.rows_of("NORM_FORWARD", "sm_90")
    assert [c.block_n for c in tuned] == [c.block_n for c in before]
    assert {c.num_warps for c in tuned[:5]} == {8}
    assert configs.rows_of("NORM_FORWARD", "sm_80") == before
    kept = json.loads(configs.TUNED.read_text())
    assert kept["sm_90"]["measured_on"] == "a GPU"
    assert list(kept["sm_90"]["tables"]) == ["NORM_FORWARD"]
    del configs.NORM_FORWARD["sm_90"]
    configs.read_tuned(configs.TUNED)
    assert configs.NORM_FORWARD["sm_90"] == tuned


def test_a_table_that_is_gone_is_left_out() -> None:
    """A file of an older version must not stop the import."""
    configs.TUNED.write_text('{"sm_90": {"measured_on": "a GPU", "tables": {"GONE": [{"block_m": 1}]}}}')
    configs.read_tuned(configs.TUNED)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastlm_kernels.tune", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_command_without_a_gpu_says_so() -> None:
    """One line, exit code 2."""
    run = _run()
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: tune: no GPU")
    assert len(run.stderr.splitlines()) == 1


def test_command_shows_what_an_architecture_uses() -> None:
    """Every table, and where it has none of its own."""
    run = _run("--show", "gfx942")
    assert run.returncode == 0
    assert "NORM_FORWARD\n    RowConfig(block_m=16, block_n=64, num_warps=2, num_stages=1)\n" in run.stdout
    assert "CROSS_ENTROPY_LONG (generic)\n" in run.stdout


def test_timing_waits_for_what_made_its_inputs(monkeypatch: pytest.MonkeyPatch):
    """Triton times on a stream of its own, which waits for none."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", lambda run, return_mode: log.append(run()) or 1.0)
    assert tune._median_milliseconds(lambda: "run") == 1.0
    assert log == ["wait", "run"]
