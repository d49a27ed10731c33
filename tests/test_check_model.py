"""`python -m fastlm_kernels.check --model DIR`: one table, and an exit code that tells wrong from right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make_model
from tiny_models import tiny_bert_classifier, tiny_llama

from fastlm_kernels import check, check_model, hf
from fastlm_kernels._command import run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with dropout in its configuration."""
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama(attention_dropout=0.5).save_pretrained(directory)
    return directory


@pytest.mark.both_paths
def test_a_patched_model_passes(llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The table holds where it ran, what was patched, the results, time and memory."""
    monkeypatch.setattr(check_model, "_MOST_ROUNDS", 1)  # the interpreter takes its time
    assert check.main(["--model", str(llama), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    path = "triton" if check._runtime.INTERPRETED else "torch"
    assert out.splitlines()[0].endswith(f"path {path}")
    assert "LlamaForCausalLM" in out
    assert "LlamaRMSNorm" in out
    count = 1 + len(list(check_model.load(llama, torch.float32).parameters()))
    assert f"{count} of {count} results pass" in out
    assert all(text in out for text in ("loss ", "gradient of model.", "milliseconds", "MiB kept for backward"))
    assert "FAIL" not in out


def test_a_classifier_takes_labels_and_a_padded_batch(tmp_path: Path) -> None:
    tiny_bert_classifier().save_pretrained(tmp_path)
    model = check_model.load(tmp_path, torch.float32)
    batch = check_model.batch_for(model, 2, 64, torch.device("cpu"))
    assert batch["input_ids"].shape == (2, 22)  # positions end at 24
    assert batch["attention_mask"].sum(1).tolist() == [22, 17]
    assert batch["labels"].tolist() == [0, 1]
    assert check_model.loss_of(model, batch).requires_grad


def _scale_gradient(model: Any) -> None:
    model.model.norm.weight.register_hook(lambda g: g * 1.001)


def _move_loss(model: Any) -> None:
    model.register_forward_hook(lambda module, args, out: out.__setitem__("loss", out.loss + 1e-3))


def _drop_gradient(model: Any) -> None:
    model.model.norm.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_scale_gradient, _move_loss, _drop_gradient])
def test_a_wrong_model_fails(
    change: Any, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = hf.patch

    def wrong(model: Any) -> Any:
        change(right(model))
        return model

    monkeypatch.setattr(hf, "patch", wrong)
    assert check.main(["--model", str(llama), "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_bytes_kept_for_backward_are_counted_once() -> None:
    """The input of tanh is not kept, its result is, and weights are not counted."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 16, bias=False)

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.linear(input_ids).tanh(),)

    (cost,) = check_model.costs([Model()], {"input_ids": torch.randn(4, 8, requires_grad=True)})
    assert cost.kept == 4 * (4 * 8 + 4 * 16)  # the input, and tanh's result, which the mean square keeps too
    assert cost.peak is None
    assert 0 < cost.time.low <= cost.time.median <= cost.time.high


def test_models_that_are_timed_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run apart; load that comes and goes meets all of them."""
    ran: list[int] = []

    class Model(torch.nn.Module):
        def __init__(self, name: int) -> None:
            super().__init__()
            self.name = name

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
            ran.append(self.name)
            return (input_ids.square(),)

    monkeypatch.setattr(check_model, "_ENOUGH_SECONDS", 0.0)
    check_model.costs([Model(0), Model(1)], {"input_ids": torch.randn(2, requires_grad=True)})
    assert ran == [0, 1] * 11


@pytest.mark.parametrize(
    ("times", "patched", "ratios", "said"),
    [
        ([2.0, 2.2, 2.3], True, {"milliseconds, the median": "2.00", "MiB kept for backward": "4.00"}, ""),
        ([2.0, 2.2, 2.5], True, {"MiB kept for backward": "4.00"}, "vary by more than a fifth"),
        ([2.0, 2.2, 2.3], False, {}, "nothing was patched"),
    ],
    ids=["steady", "under load", "not patched"],
)
def test_a_ratio_of_times_says_something_or_is_not_printed(
    times: list[float], patched: bool, ratios: dict[str, str], said: str, capsys: pytest.CaptureFixture
) -> None:
    low, median, high = times
    before = check_model.Cost(check_model.Time(median, low, high), 8 << 20, None)
    after = check_model.Cost(check_model.Time(1.1, 1.0, 1.2), 2 << 20, None)
    check_model._print_costs(before, after, {"input_ids": torch.zeros(2, 8)}, patched)
    lines = capsys.readouterr().out.splitlines()
    assert {line[:40].strip(): line[60:].strip() for line in lines[1:5] if line[60:].strip()} == ratios
    assert (said in lines[-1]) if said else len(lines) == 5


def test_padding_is_shorter_than_a_window(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Longer, and a padding token sees no key: eager attention gives NaN in fp64."""
    make_model("gemma2", sliding_window=4, num_hidden_layers=1).save_pretrained(tmp_path)
    assert check.main(["--model", str(tmp_path), "--device", "cpu"]) == 0, capsys.readouterr().out
    model = check_model.load(tmp_path, torch.float32)
    assert check_model.batch_for(model, 2, 64, torch.device("cpu"))["attention_mask"].sum(1).tolist() == [62, 59]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--model", "NOWHERE"], r"error: --model: got .*NOWHERE; that is no directory; give a directory that"),
        (["--model", "EMPTY"], r"error: --model: got .*EMPTY; that holds no config\.json; give"),
        (["--model", "BROKEN"], r"error: --model: got .*BROKEN; transformers cannot load it \(.*\); give"),
        (["--model", "SEQ2SEQ"], r"error: --model: got .*SEQ2SEQ; it takes more than tokens"),
        (["--model", "EMPTY", "--kernel", "gelu"], r"error: --kernel: got gelu; leave it out"),
        (["--kernel", "gulu"], r"error: --kernel: got gulu; give one of rms_norm, .*"),
        (["--device", "gpu9"], r"error: --device: got gpu9; give a device of this machine"),
        (["--modle", "x"], r"error: unrecognized arguments: --modle x; .* --help lists"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(
    arguments: list[str], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, config in {"EMPTY": None, "BROKEN": "{", "SEQ2SEQ": '{"model_type": "t5"}'}.items():
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
    names = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    try:
        code = run(check.main, names)
    except SystemExit as left:  # argparse leaves by itself
        code = left.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.match(shown, captured.err), captured.err
