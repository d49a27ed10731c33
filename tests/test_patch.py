"""patch, unpatch and hf: instances only, shared parameters, exact restoration, nothing outside the module."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm_kernels as fk
from fastlm_kernels import patching

pytestmark = pytest.mark.both_paths

# New in torch 2.13; before that, and in this model alone, ours.
LINEAR_CROSS_ENTROPY = getattr(nn, "LinearCrossEntropyLoss", fk.nn.LinearCrossEntropyLoss)
FUNCTIONS = ("layer_norm", "rms_norm", "gelu", "silu", "sigmoid", "tanh", "softmax", "log_softmax", "cross_entropy")
FUNCTIONS += ("linear_cross_entropy",)


class OwnNorm(nn.LayerNorm):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return input + 1


class TinyRMSNorm(nn.Module):
    """Named as the model classes of transformers name theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """One of everything that is patched, and things that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Sequential(nn.RMSNorm(8, 1e-3)))
        self.gates = nn.Sequential(nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Softmax(-1), nn.LogSoftmax(-1))
        self.own = OwnNorm(8)
        self.ours = fk.nn.LayerNorm(8)
        self.tiny = TinyRMSNorm()
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.head = LINEAR_CROSS_ENTROPY(8, 6, bias=True, weight=torch.ones(6))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.tiny(self.ours(self.own(self.layers(x))))
        return self.loss(x + self.gates(x), target) + self.head(x, target)


def _model() -> Model:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _loss_and_gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    loss = model(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def _assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_patched_model_computes_the_same_with_the_same_parameters() -> None:
    model = _model()
    expected = _loss_and_gradients(model)
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    state = list(model.state_dict())
    assert fk.patch(model) is model
    _assert_close(_loss_and_gradients(model), expected)
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert list(model.state_dict()) == state
    changed = {type(module) for module in model.modules()} & set(patching.REPLACEMENTS.values())
    assert changed == set(patching.REPLACEMENTS.values())
    assert not {type(module) for module in model.modules()} & set(patching.REPLACEMENTS)
    assert isinstance(model.layers[1], nn.LayerNorm)
    assert type(model.own) is OwnNorm
    assert type(model.ours) is fk.nn.LayerNorm


def test_patched_modules_call_our_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in FUNCTIONS:
        original = getattr(fk.nn, name)

        def spy(*args: object, _name: str = name, _original: object = original, **kwargs: object) -> object:
            called.append(_name)
            return _original(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(fk.nn, name, spy)
    model = _model()
    _loss_and_gradients(model)
    from_the_start = [] if hasattr(nn, "LinearCrossEntropyLoss") else ["linear_cross_entropy"]
    assert called == ["layer_norm", *from_the_start]
    called.clear()
    _loss_and_gradients(fk.patch(model))
    assert sorted(called) == sorted([*FUNCTIONS, "layer_norm"])


@pytest.mark.parametrize("times", [1, 2])
def test_unpatch_restores_exactly(times: int) -> None:
    model, untouched = _model(), _model()
    before, expected = _classes(model), _loss_and_gradients(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    for _ in range(times):
        fk.patch(model)
    assert fk.unpatch(model) is model
    assert _classes(model) == before
    assert [dict(vars(module)) for module in model.modules()] == attributes
    for a, b in zip(_loss_and_gradients(model), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert _classes(fk.unpatch(untouched)) == before


def _torchs_names() -> dict[str, dict[str, object]]:
    """What each name of torch.nn, its functions and every class of its modules stands for."""
    owners = [nn, F, *(cls for cls in vars(nn).values() if isinstance(cls, type))]
    return {f"{type(owner).__name__} {owner.__name__}": dict(vars(owner)) for owner in owners}


def test_other_models_and_torch_itself_stay_as_they_are() -> None:
    other = _model()
    before, expected, snapshot = _classes(other), _loss_and_gradients(other), _torchs_names()
    _loss_and_gradients(fk.patch(_model()))
    assert _classes(other) == before
    for a, b in zip(_loss_and_gradients(other), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert _torchs_names() == snapshot


def test_a_single_module_and_an_instance_with_its_own_forward() -> None:
    norm = nn.LayerNorm(8)
    x = torch.randn(3, 8)
    expected = norm(x)
    torch.testing.assert_close(fk.patch(norm)(x), expected)
    assert type(fk.unpatch(norm)) is nn.LayerNorm
    norm.forward = lambda input: input * 2  # type: ignore[method-assign]
    assert torch.equal(fk.patch(norm)(x), x * 2)
    assert type(norm) is nn.LayerNorm


def test_hooks_and_training_mode_survive() -> None:
    model = _model().eval()
    seen = []
    model.layers[1].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    fk.patch(model)
    assert not model.layers[1].training
    _loss_and_gradients(model)
    fk.unpatch(model)
    _loss_and_gradients(model)
    assert seen == [patching.PatchedLayerNorm, nn.LayerNorm]


def test_patched_model_survives_deepcopy_and_pickle() -> None:
    model = fk.patch(_model())
    expected = _loss_and_gradients(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert _classes(copied) == _classes(model)
        _assert_close(_loss_and_gradients(copied), expected)
        assert _classes(fk.unpatch(copied)) == _classes(_model())
    assert _classes(model) == _classes(fk.patch(_model()))


def test_compiled_model_follows_patch_and_unpatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that `patch` changes is one of the things that the compiler guards on."""
    monkeypatch.setattr(fk.nn, "gelu", lambda x, approximate: 2 * x)  # so that it shows which one ran
    model = _model()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (fk.unpatch, fk.patch, fk.unpatch):
        change(model)
        _assert_close(_loss_and_gradients(compiled), _loss_and_gradients(model))


def test_parametrised_modules_are_left_alone() -> None:
    """Their class is made on the spot, and its forward may be anything."""
    norm = nn.utils.parametrize.register_parametrization(nn.LayerNorm(4), "weight", nn.Identity())
    kind = type(norm)
    assert type(fk.patch(norm)) is kind


@pytest.mark.parametrize("function", [fk.patch, fk.unpatch, fk.hf.patch, fk.hf.unpatch, fk.hf.report])
def test_anything_but_a_module_is_a_value_error(function: object) -> None:
    with pytest.raises(ValueError, match=r"module: got function; give a torch\.nn\.Module"):
        function(lambda x: x)  # type: ignore[operator]


def test_hugging_face_hooks_patch_what_they_can_and_report_the_rest() -> None:
    model = _model()
    before, expected = _classes(model), _loss_and_gradients(model)
    lines = {line.name: line for line in fk.hf.report(model)}
    assert {name for name, line in lines.items() if not line.patched} == set(lines)
    assert "call patch(model)" in lines["layers.1"].reason
    assert set(lines) > {"layers.1", "layers.2", "layers.3.0", "gates.0", "loss"}
    fk.hf.patch(model)
    report = fk.hf.report(model)
    lines = {line.name: line for line in report}
    assert {name for name, line in lines.items() if not line.patched} == {"tiny"}
    assert lines["layers.1"].module.endswith("LayerNorm")
    assert not lines["tiny"].patched
    assert "unknown kind" in lines["tiny"].reason
    text = str(report)
    assert len(text.splitlines()) == len(report)
    assert "tiny" in text
    assert "left alone" in text
    _assert_close(_loss_and_gradients(model), expected)
    assert _classes(fk.hf.unpatch(model)) == before
    assert str(fk.hf.report(nn.Linear(2, 2))) == "nothing here that a kernel could replace"
