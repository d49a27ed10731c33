"""The GPT: what it may see, what it computes, how it starts."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.config import Config, ModelConfig
from fastlm.model import GPT, hash32, rotary_table, sample_dropout, site_keys
from fastlm.resolve import resolve_model
from fastlm_kernels import _runtime

FAMILIES = {
    "modern": {},
    "modern-gqa": {"n_kv_head": 2},
    "gpt2": {"family": "gpt2"},
    "gpt2-no-bias": {"family": "gpt2", "bias": False},
}


def build(name: str = "modern", *, vocab_size: int = 61, noise: float = 0.3, rows: int = 1, **options: object) -> GPT:
    """A small model whose every parameter is random: none zero, none one. `rows`: the head has a multiple of them."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "max_seq_len": 24} | FAMILIES[name] | options
    recompute: Any = shape.pop("recompute", "none")
    cfg = Config(model=ModelConfig(**shape))  # type: ignore[arg-type]
    resolve_model(cfg)
    model = GPT(cfg.model, vocab_size, recompute=recompute, vocab_multiple=rows)
    generator = torch.Generator().manual_seed(7)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return model


def some_tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_sees_a_later_one(name: str):
    model, tokens = build(name), some_tokens()
    before = model(tokens)
    tokens[:, 13] = (tokens[:, 13] + 1) % 61
    after = model(tokens)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient(name: str):
    model, tokens = build(name), some_tokens()
    model(tokens, tokens.roll(-1, 1)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_cross_entropy_of_the_logits(name: str, kernels: str, rows: int):
    model, tokens = build(name, kernels=kernels, rows=rows), some_tokens()
    with torch.no_grad():
        model.head.weight[61:] = 0.0
    targets = tokens.roll(-1, 1)
    targets[0, 3:9] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected)
    by_number = model(tokens, targets, num_items=7)
    torch.testing.assert_close(by_number, expected * int((targets >= 0).sum()) / 7)
    each = model(tokens, targets, reduction="none")
    assert each.shape == tokens.shape
    torch.testing.assert_close(each.sum() / (targets >= 0).sum(), expected)


def plain_modern(model: GPT, tokens: Tensor) -> Tensor:
    """The modern family written out in plain float64 PyTorch, one head at a time."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    D, H, C = model.cfg.n_embd, model.cfg.n_head, model.cfg.n_embd // model.cfg.n_head
    T = tokens.size(1)

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotate(x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(T).double(), 10_000.0 ** -(torch.arange(0, C, 2).double() / C))
        left, right = x[..., : C // 2], x[..., C // 2 :]
        return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], dim=-1)

    h = norm(p["embed.weight"][tokens])
    for layer in range(model.cfg.n_layer):
        prefix = f"blocks.{layer}."
        q, k, v = (norm(h) @ p[prefix + "attn.qkv.weight"].T).split(D, dim=-1)
        outputs = []
        for head in range(H):
            cut = slice(head * C, (head + 1) * C)
            scores = rotate(norm(q[..., cut])) @ rotate(norm(k[..., cut])).mT / math.sqrt(C)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ v[..., cut])
        h = h + torch.cat(outputs, dim=-1) @ p[prefix + "attn.proj.weight"].T
        h = h + (norm(h) @ p[prefix + "mlp.up.weight"].T).relu().pow(2) @ p[prefix + "mlp.down.weight"].T
    return 15 * torch.tanh(norm(h) @ p["head.weight"].T / 15)


def test_modern_equals_its_formula():
    model, tokens = build("modern"), some_tokens()
    torch.testing.assert_close(model(tokens).double(), plain_modern(model, tokens), rtol=1e-4, atol=1e-4)


def plain_gpt2(model: GPT, tokens: Tensor) -> Tensor:
    """GPT-2 written out in plain float64 PyTorch."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    D, H = model.cfg.n_embd, model.cfg.n_head
    B, T = tokens.shape

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), p[name + ".weight"], p.get(name + ".bias"))

    h = p["embed.weight"][tokens] + p["positions.weight"][:T]
    for layer in range(model.cfg.n_layer):
        prefix = f"blocks.{layer}."
        qkv = linear(norm(h, prefix + "norm_attn"), prefix + "attn.qkv")
        q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in qkv.split(D, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        h = h + linear(y, prefix + "attn.proj")
        hidden = F.gelu(linear(norm(h, prefix + "norm_mlp"), prefix + "mlp.up"), approximate="tanh")
        h = h + linear(hidden, prefix + "mlp.down")
    return norm(h, "norm_out") @ p["embed.weight"].T


@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-bias"])
def test_gpt2_equals_its_formula(name: str):
    model, tokens = build(name), some_tokens()
    torch.testing.assert_close(model(tokens).double(), plain_gpt2(model, tokens), rtol=1e-4, atol=1e-4)


def test_grouped_queries_share_keys_and_values():
    """Repeating a grouped model's K and V rows per query head gives the same function with as many heads."""
    grouped, full = build("modern-gqa"), build("modern")
    weights = dict(grouped.state_dict())
    for layer in range(2):
        name = f"blocks.{layer}.attn.qkv.weight"
        q, k, v = weights[name].split([32, 16, 16])
        k, v = (x.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for x in (k, v))
        weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(some_tokens()), full(some_tokens()))


def test_rotation_depends_on_distance_alone():
    table = rotary_table(64, 8)
    cos, sin = table[0].double(), table[1].double()
    q, k = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def turn(x: Tensor, t: int) -> Tensor:
        return torch.stack([x[:, 0] * cos[t] - x[:, 1] * sin[t], x[:, 1] * cos[t] + x[:, 0] * sin[t]])

    assert (turn(q, 20) * turn(k, 13)).sum() == pytest.approx(float((turn(q, 47) * turn(k, 40)).sum()), abs=1e-5)


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_initial_loss_is_that_of_a_guess(name: str):
    cfg = Config(model=ModelConfig(n_layer=2, n_head=4, n_embd=64, max_seq_len=24, family=name))  # type: ignore[arg-type]
    resolve_model(cfg)
    model = GPT(cfg.model, 61).init_weights(torch.Generator().manual_seed(0))
    loss = model(some_tokens(), some_tokens(seed=1)).detach()
    assert float(loss) == pytest.approx(math.log(61), rel=0.02)


def test_residual_projections_start_small():
    cfg = Config(model=ModelConfig(n_layer=8, n_head=4, n_embd=128, max_seq_len=24, family="gpt2"))
    resolve_model(cfg)
    model = GPT(cfg.model, 61).init_weights(torch.Generator().manual_seed(0))
    assert float(model.blocks[0].mlp.down.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)  # type: ignore[union-attr]
    assert float(model.blocks[0].mlp.up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr]


def test_init_is_a_function_of_the_seed_alone():
    torch.manual_seed(3)
    first = build().state_dict()
    torch.manual_seed(4)
    assert all(torch.equal(first[name], value) for name, value in build().state_dict().items())


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_recompute_changes_memory_and_nothing_else(name: str):
    gradients = []
    seeds = hash32(torch.arange(2))
    for recompute in (False, "activation", "mlp", True):
        model = build(name, recompute=recompute, dropout=0.2)
        model(some_tokens(), some_tokens(seed=1), seeds_B=seeds).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for part in gradients[1:] for a, b in zip(gradients[0], part, strict=True))


def test_bf16_activations_stay_near_fp32():
    model, tokens = build("modern"), some_tokens()
    exact = model(tokens, tokens.roll(-1, 1)).detach()
    model.compute_dtype = torch.bfloat16
    loss = model(tokens, tokens.roll(-1, 1)).detach()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.02)
    assert float(loss) != float(exact)


class TestDropout:
    def test_a_sample_keeps_its_mask_wherever_it_stands(self):
        x, seeds = torch.ones(4, 8, 16), hash32(torch.arange(4))
        whole = sample_dropout(x, 0.3, seeds, site=2)
        parts = [sample_dropout(x[i : i + 1], 0.3, seeds[i : i + 1], site=2) for i in (3, 1)]
        assert torch.equal(whole[3:], parts[0])
        assert torch.equal(whole[1:2], parts[1])

    def test_share_scale_and_independence(self):
        x, seeds = torch.ones(64, 32, 64), hash32(torch.arange(64))
        first, second = (sample_dropout(x, 0.3, seeds, site) for site in (0, 1))
        for y in (first, second):
            assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
            assert float(y.max()) == pytest.approx(1 / 0.7)
        both = ((first == 0) & (second == 0)).float().mean()
        assert float(both) == pytest.approx(0.09, abs=0.005), "two sites drop independently"
        neighbours = ((first[:-1] == 0) & (first[1:] == 0)).float().mean()
        assert float(neighbours) == pytest.approx(0.09, abs=0.005), "two samples drop independently"

    def test_off_unless_seeded(self):
        model = build(dropout=0.5)
        assert torch.equal(model(some_tokens()), model(some_tokens()))

    @pytest.mark.both_paths
    @pytest.mark.parametrize("attention", ["sdpa", "triton"])
    def test_cutting_the_batch_changes_no_mask(self, attention: str):
        model, tokens = build(dropout=0.3, attention=attention), some_tokens(4)
        seeds = hash32(torch.arange(4))
        whole = model(tokens, tokens.roll(-1, 1), seeds_B=seeds, reduction="none")
        cut = model(tokens[2:], tokens.roll(-1, 1)[2:], seeds_B=seeds[2:], reduction="none")
        torch.testing.assert_close(whole[2:], cut)

    @pytest.mark.both_paths
    @pytest.mark.parametrize("name", ["modern", "gpt2"])
    def test_the_weights_of_every_layer_drop_by_keys_of_their_own(self, name: str):
        """The kernel and PyTorch's operators drop the same; residual branches by other keys; nobody in evaluation."""
        losses, seen = [], []
        for attention in ("triton", "sdpa", "flash"):
            model, tokens, seeds = build(name, dropout=0.3, attention=attention), some_tokens(), hash32(torch.arange(2))
            losses.append(model(tokens, tokens.roll(-1, 1), seeds_B=seeds))
        blocks: Any = model.blocks
        for block in blocks:
            attend = block.attn.attend

            def noted(*given: Tensor, attend: Any = attend, **options: Any) -> Tensor:
                seen.append((options.get("dropout_p"), options.get("dropout_seed")))
                return attend(*given, **options)

            block.attn.attend = noted
        assert torch.equal(model(tokens, tokens.roll(-1, 1), seeds_B=seeds), losses[-1])
        torch.testing.assert_close(losses[1:], losses[:1] * 2)
        used = torch.stack([seed for _, seed in seen])
        keys = torch.stack(site_keys(seeds, 7))
        assert [share for share, _ in seen] == [0.3, 0.3]
        assert torch.equal(used, keys[1::3][:2])
        assert len(keys.unique()) == keys.numel()
        model(tokens)
        assert seen[2:] == [(None, None)] * 2


@pytest.mark.needs_triton
@pytest.mark.parametrize("family", ["modern", "gpt2"])
def test_every_op_with_a_kernel_is_called_once_a_layer(family: str):
    """The kernels that one update launches on a GPU, recorded on tensors without data: none more, none less."""
    layers = 3
    cfg = build(family, n_layer=layers, tie_embeddings=family == "gpt2").cfg
    with torch.device("meta"):
        model = GPT(cfg, 128, compute_dtype=torch.bfloat16)
        tokens, count = torch.empty(4, 24, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    with _runtime.recording("sm_90") as launches:
        model(tokens, tokens, num_items=count).backward()
    found = Counter(launch.kernel.__name__ for launch in launches)
    # Before each attention and MLP and after the last; the modern family norms the embedding too.
    norms = 2 * layers + (2 if family == "modern" else 1)
    expected = {"norm_forward_kernel": norms, "norm_backward_kernel": norms}
    expected |= {"unary_forward_kernel": layers, "unary_backward_kernel": layers}
    expected |= {"cross_entropy_forward_kernel": 1, "cross_entropy_reduce_kernel": 1}
    expected |= {"linear_cross_entropy_scale_kernel": 2}
    if family == "modern":
        expected |= {"rotary_kernel": layers, "rotary_norm_backward_kernel": layers}
    else:
        expected["sum_partials_kernel"] = norms  # weight and bias in one
    assert found == expected
