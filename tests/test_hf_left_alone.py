class _OwnRMSNorm(LlamaRMSNorm):
    """A subclass with a forward of its own, outside transformers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 2


def test_what_is_not_known_is_left_alone_and_reported() -> None:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = tf.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(3, 11)[None]
    kinds, expected = [type(m) for m in model.modules()], model(input_ids=ids, labels=ids)
    got = fk.hf.patch(model)(input_ids=ids, labels=ids)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(got.logits, expected.logits)
    assert "architecture 't5' is not known" in str(fk.hf.report(model))
    llama = make_model("llama")
    llama.model.norm = _OwnRMSNorm(32)
    llama.model.layers[0].mlp.act_fn = nn.Hardswish()
    llama.model.layers[1].mlp.forward = lambda x: x
    lines = {line.name: line for line in fk.hf.report(fk.hf.patch(llama))}
    left = {name: line.reason for name, line in lines.items() if not line.patched}
    assert left == {
        "model.norm": "an RMS norm of an unknown kind",
        "model.layers.0.mlp": "a gated MLP with Hardswish: no kernel",
        "model.layers.1.mlp": "has a forward of its own",
    }
    assert lines["model.layers.0.self_attn"].reason == "rotary embedding, attention"
    old = make_model("gpt2")
    for module in (old, old.transformer):
        module._supports_attention_backend = False  # transformers 4's BERT
    assert "does not look it up" in str(fk.hf.report(fk.hf.patch(old)))
    assert old.config._attn_implementation == "sdpa"
    wants = fk.hf.patch(
        tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, output_attentions=True, attn_implementation="eager"))
    )
    assert wants(ids).attentions[0].shape == (1, 2, 8, 8)
    assert "output_attentions=True" in str(fk.hf.report(wants))


def test_a_model_inside_a_module_of_your_own() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = make_model("bert").bert
            self.norm = nn.LayerNorm(32)
            self.head = nn.Linear(32, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.norm(self.encoder(input_ids).last_hidden_state[:, 0]))

    torch.manual_seed(0)
    model = Classifier().eval()
    ids = make_batch("plain")["input_ids"]
    expected = model(ids)
    fk.hf.patch(model)
    torch.testing.assert_close(model(ids), expected)
    patched = {line.name for line in fk.hf.report(model) if line.patched}
    assert {"norm", "encoder.embeddings.LayerNorm"} <= patched
    assert torch.equal(fk.hf.unpatch(model)(ids), expected)


def test_wrong_arguments_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="keep_logits: got 'yes'; give True or False"):
        fk.hf.patch(make_model("llama"), keep_logits="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module: got str; give a torch\.nn\.Module"):
        fk.hf.patch("llama")  # type: ignore[type-var]
    module = make_model("llama").model.layers[0].self_attn
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"position_bias: .*patch with attention=False"):
        _hf_attention.attention(module, q, q, q, None, position_bias=q)


