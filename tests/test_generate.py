"""Sampling: the cache changes nothing, the dials do what they say."""

import pytest
import torch
from test_model import FAMILIES, build

from fastlm.generate import draw, generate
from fastlm_kernels import _runtime, configs


@pytest.mark.parametrize("name", FAMILIES)
def test_with_cache_equals_without(name: str):
    """Greedy and sampled, from a prompt of one token to past the context's end (24 positions)."""
    model = build(name)
    for prompt, temperature in ([5], 0.0), ([7, 3, 9], 1.0), (list(range(40)), 0.8):
        runs = [
            generate(
                model,
                prompt,
                max_new_tokens=40,
                temperature=temperature,
                seed=3,
                num_samples=2,
                use_cache=cache,
            )
            for cache in (True, False)
        ]
        assert runs[0] == runs[1]
        assert [len(ids) for ids in runs[0]] == [40, 40]


@pytest.mark.needs_kernels
def test_our_attention_generates_the_same_tokens(kernel_device: str, monkeypatch: pytest.MonkeyPatch):
    """A long prompt, then one query a token against a cache that is read in parts."""
    launched: list[str] = []
    launch = _runtime.launch
    monkeypatch.setattr(
        _runtime,
        "launch",
        lambda kernel, *rest, **more: (launched.append(kernel.__name__), launch(kernel, *rest, **more)),
    )
    monkeypatch.setattr(configs, "ATTENTION_DECODE_PROGRAMS", 8)
    prompt = [1 + i % 60 for i in range(300)]
    ids = {}
    for attention in "sdpa", "triton":
        model = build(n_layer=1, n_kv_head=2, max_seq_len=310, kernels="torch", attention=attention).to(kernel_device)
        ids[attention] = generate(model, prompt, max_new_tokens=6, temperature=0.8, seed=3)
        assert ("attention_combine_kernel" in launched) == (attention == "triton")
    assert ids["triton"] == ids["sdpa"]


def test_greedy_takes_the_models_best_token():
    model = build()
    ids = generate(model, [1, 2, 3], max_new_tokens=5, temperature=0)[0]
    tokens = [1, 2, 3]
    for token in ids:
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)


def test_a_seed_repeats_and_another_differs():
    model = build()
    first, again, other = (generate(model, [1], max_new_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_generation_leaves_the_global_generator_alone():
    model, state = build(), torch.get_rng_state()
    generate(model, [1], max_new_tokens=5)
    assert torch.equal(state, torch.get_rng_state())


def test_text_ends_before_the_end_token():
    model = build()
    ids = generate(model, [1], max_new_tokens=30, seed=1)[0]
    end = ids[10]
    assert generate(model, [1], max_new_tokens=30, seed=1, eot_id=end)[0] == ids[: ids.index(end)]


def counts(**options: object) -> torch.Tensor:
    """How often each of four tokens of probability .4, .3, .2, .1 is drawn in 4000 draws, as shares."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, -1)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    drawn = draw(logits, generator=torch.Generator().manual_seed(0), **settings)  # type: ignore[arg-type]
    return torch.bincount(drawn[:, 0], minlength=4) / 4000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_dials(options: dict[str, object], expected: list[float]):
    torch.testing.assert_close(counts(**options), torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0)
