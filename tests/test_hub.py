"""The package as a kernel repository: Hugging Face's `kernels` loads it, `kernelize` puts its layers into models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor

from fastlm_kernels import hub, layers
from fastlm_kernels._command import run

WIDTH = 16
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    directory = tmp_path_factory.mktemp("hub") / "new" / "fastlm"
    assert run(hub.main, ["--to", str(directory)]) == 0
    return directory


def _extensible(module: Any, layer_name: str) -> Any:
    """`module`, of a class that `kernelize` knows by `layer_name`; transformers' own class stays as it is."""
    from kernels import use_kernel_forward_from_hub

    kind = type(module)
    module.__class__ = use_kernel_forward_from_hub(layer_name)(type(kind.__name__, (kind,), {}))
    return module


def _kernelize(model: torch.nn.Module, names: dict[str, str], repository: Path) -> None:
    """Let the modules that go by the keys run on our layers of these names."""
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    mapping: Any = {key: {"cpu": LocalLayerRepository(repository, layer_name=name)} for key, name in names.items()}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")


def _results(model: Callable[..., Any], parameters: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([(y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in outputs]).sum()
    leaves = [x for x in (*parameters, *inputs) if x.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def _gated(activation: str) -> torch.nn.Module:
    return tiny_llama(hidden_act=activation).model.layers[0].mlp


class _Merged(torch.nn.Module):
    """A gate merged with its product."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return self.function(gate) * up


def _activation(name: str) -> torch.nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def _norm(family: str) -> torch.nn.Module:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm}[family](WIDTH)


# (our layer, what it stands in for, the parameters' dtype and the input's)
CASES: dict[str, tuple[str, Callable[[], torch.nn.Module], torch.dtype, torch.dtype]] = {
    "LayerNorm": ("LayerNorm", lambda: torch.nn.LayerNorm(WIDTH), FP32, FP32),
    "RMSNorm": ("RMSNorm", lambda: _norm("llama"), FP32, FP32),
    "RMSNorm bf16": ("RMSNorm", lambda: _norm("llama"), BF16, FP32),
    "RMSNorm bf16 input": ("RMSNorm", lambda: _norm("llama"), FP32, BF16),
    "RMSNormZeroCentered": ("RMSNormZeroCentered", lambda: _norm("gemma"), FP32, FP32),
    "SiLU": ("SiLU", lambda: _activation("silu"), FP32, FP32),
    "GeLU": ("GeLU", lambda: _activation("gelu"), FP32, FP32),
    "GeluTanh": ("GeluTanh", lambda: _activation("gelu_pytorch_tanh"), FP32, FP32),
    "GeluTanh new": ("GeluTanh", lambda: _activation("gelu_new"), FP32, FP32),
    "SiluAndMul": ("SiluAndMul", lambda: _Merged(torch.nn.functional.silu), FP32, FP32),
    "GeluAndMul": ("GeluAndMul", lambda: _Merged(torch.nn.functional.gelu), FP32, FP32),
    "SwiGLUMLP": ("SwiGLUMLP", lambda: _gated("silu"), FP32, FP32),
    "GEGLUMLP": ("GEGLUMLP", lambda: _gated("gelu_pytorch_tanh"), FP32, FP32),
}


def test_every_layer_is_compared() -> None:
    assert {name for name, *_ in CASES.values()} | {"RotaryPosEmb"} == set(layers.__all__)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_the_module_it_stands_in_for(case: str, repository: Path) -> None:
    """Values, dtypes and gradients, also where input and parameters differ in dtype."""
    layer_name, make, dtype, input_dtype = CASES[case]
    torch.manual_seed(0)
    module = _extensible(make().to(dtype), "TheLayer")
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    x = torch.randn(2, 3, WIDTH, dtype=input_dtype, requires_grad=True)
    parameters = list(module.parameters())
    expected = _results(module, parameters, x)
    _kernelize(module, {"TheLayer": layer_name}, repository)
    assert module.forward.__module__.startswith("fastlm_kernels_cpu_")
    for got, want in zip(_results(module, parameters, x), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.both_paths
def test_an_rms_norm_in_bf16_rounds_once() -> None:
    """Where the module rounds before the scale too: nearer the exact values, and no farther in the gradients."""
    torch.manual_seed(0)
    module: Any = _norm("llama").to(BF16)
    with torch.no_grad():
        module.weight.normal_()
    x = torch.randn(64, WIDTH, dtype=BF16, requires_grad=True)
    mine = _results(lambda x: layers.RMSNorm.forward(module, x), [module.weight], x)
    theirs = _results(module, [module.weight], x)
    wide, weight = (t.detach().double().requires_grad_() for t in (x, module.weight))
    norm = torch.nn.functional.rms_norm
    truth = _results(lambda x: norm(x, (WIDTH,), weight, module.variance_epsilon), [weight], wide)
    assert all(t.dtype == BF16 for t in mine)
    half_a_step = torch.finfo(BF16).eps / 2
    assert ((mine[0] - truth[0]).abs() <= 1.001 * half_a_step * truth[0].abs()).all()
    assert ((theirs[0] - truth[0]).abs() > 1.001 * half_a_step * truth[0].abs()).any()
    for ours, own, exact in zip(mine, theirs, truth, strict=True):
        assert (ours - exact).norm() <= 1.05 * (own - exact).norm()


@pytest.mark.both_paths
def test_a_model_of_transformers_runs_on_the_loaded_layers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, MLPs and rotary embedding of a Llama: loss, logits and every gradient."""
    from transformers.models.llama import modeling_llama

    from kernels import use_kernel_forward_from_hub

    # A pair of versions that know each other does this by itself, in a decorator.
    rotate: Any = modeling_llama.apply_rotary_pos_emb
    if not hasattr(rotate, "kernel_layer_name"):
        rotate = use_kernel_forward_from_hub("rotary_pos_emb")(rotate)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    model = tiny_llama()
    parameters = list(model.parameters())
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(0))

    def run_model() -> tuple[Tensor, Tensor]:
        outputs = model(input_ids=ids, labels=ids)
        return outputs.loss, outputs.logits

    expected = _results(run_model, parameters)
    for module in list(model.modules()):
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            _extensible(module, "RMSNorm")
        elif isinstance(module, modeling_llama.LlamaMLP):
            _extensible(module, "MLP")
        elif isinstance(module, modeling_llama.LlamaAttention):
            vars(module)["_kernel_funcs"] = {"rotary_pos_emb": rotate}
    names = {"RMSNorm": "RMSNorm", "MLP": "SwiGLUMLP", "rotary_pos_emb": "RotaryPosEmb", "SiLU": "SiLU"}
    _kernelize(model, names, repository)
    try:
        ours = [m for m in (*model.modules(), rotate) if m.forward.__module__.startswith("fastlm_kernels_cpu_")]
        assert len(ours) >= 3 + 1 + 1  # norms, the MLP, the rotation
        for got, want in zip(_results(run_model, parameters), expected, strict=True):
            torch.testing.assert_close(got, want)
        norm = torch.compile(model.model.norm, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 3, WIDTH)
        torch.testing.assert_close(norm(x), model.model.norm(x))
    finally:
        vars(rotate).pop("forward", None)  # one object for all models


def test_the_loader_sees_a_whole_package_beside_this_one(repository: Path) -> None:
    """Its own module and operators; the metadata's digests are the files'; every build has one."""
    from kernels._rust import Digest, DigestAlgorithm

    import kernels

    loaded = kernels.get_local_kernel(repository)
    assert loaded is not sys.modules["fastlm_kernels"]
    assert loaded.layers.__all__ == layers.__all__
    x = torch.randn(2, 8)
    assert torch.equal(loaded.rms_norm(x, (8,)), sys.modules["fastlm_kernels"].rms_norm(x, (8,)))
    namespaces = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {loaded.__name__, "fastlm_kernels"} <= namespaces
    for backend in hub.BACKENDS:
        build = repository / "build" / f"torch-{backend}"
        metadata = kernels.Metadata.read_from_file(build / "metadata.json")
        assert metadata.id.startswith(f"fastlm_kernels_{backend}_")
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
        assert not list(build.rglob("aot_report*"))


def test_another_content_is_another_module() -> None:
    """The loader keeps modules by their id: a newer build must not be taken for the one that is loaded."""
    ids = [hub._metadata("cpu", {"nn.py": digest})["id"] for digest in ("old", "new", "new")]
    assert ids[0] != ids[1] == ids[2]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--to", "EXISTS"], "EXISTS; it exists; give a new directory"),
        (["--to", "FILE/below"], "cannot write there ("),
        ([], "error: the following arguments are required: --to"),
    ],
    ids=["a directory that exists", "below a file", "none"],
)
def test_bad_arguments_are_one_line_and_write_nothing(
    arguments: list[str], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "EXISTS").mkdir()
    (tmp_path / "FILE").write_text("kept")
    names = [a if a.startswith("--") else str(tmp_path / a) for a in arguments]
    try:
        code = run(hub.main, names)
    except SystemExit as left:  # argparse leaves by itself
        code = left.code
    errors = capsys.readouterr().err
    assert code == 2
    assert shown in errors
    assert len(errors.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["EXISTS", "FILE"]
