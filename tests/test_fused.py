"""The fused path equals the models' own modules: hidden states, gradients, packing; and its head equals cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from glmtune import fused, losses, methods

SHAPE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=12, head_dim=16,
    num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}


def tiny(family="llama", dtype=torch.float32, targets=ALL, **changes):
    """A random model with weights large enough that attention is not flat, and adapters whose B is not zero."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    shape = {**SHAPE, "sliding_window": None, **changes} if family == "mistral" else {**SHAPE, **changes}
    model = model_class(config_class(**shape))
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + name.endswith("norm.weight")
    model.to(dtype).requires_grad_(False)
    methods.prepare(model, dtype)
    for number, (name, layer) in enumerate(methods.blocks(model).items()):
        if name.endswith(targets):
            rank = 2 + number % 3
            layer.lora_A = torch.nn.Parameter(torch.randn(rank, layer.in_features) * 0.1)
            layer.lora_B = torch.nn.Parameter(torch.randn(layer.out_features, rank) * 0.1)
            layer.scaling = 0.5 + number % 2
    return model


def grads_of(model, hidden, probe):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((hidden * probe).sum(), parameters)


def fused_pass(model, ids, segments, probe, compile=False):
    hidden = fused.hidden_states(model, ids, segments, compile=compile)
    return hidden.detach(), grads_of(model, hidden, probe)


def own_pass(model, ids, segments, probe):
    """The model's own modules, each segment alone."""
    hidden = torch.cat([model.model(part.unsqueeze(0), use_cache=False).last_hidden_state[0] for part in ids.split(segments)])
    return hidden.detach(), grads_of(model, hidden, probe)


def assert_close(mine, theirs, tolerance):
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= tolerance * b.norm()


def packed(segments, width=48):
    ids = torch.randint(0, 97, (sum(segments),), generator=torch.Generator().manual_seed(1))
    return ids, torch.randn(sum(segments), width, generator=torch.Generator().manual_seed(2))


SEGMENTS = [5, 1, 40, 13, 38, 7]


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_key_value_heads", [12, 4, 3])
def test_equals_the_models_own_modules(family, num_key_value_heads):
    model = tiny(family, num_key_value_heads=num_key_value_heads)
    assert fused.unsupported(model) is None
    ids, probe = packed(SEGMENTS)
    mine, theirs = (run(model, ids, SEGMENTS, probe) for run in (fused_pass, own_pass))
    assert_close([mine[0]], [theirs[0]], 1e-5)
    assert_close(mine[1], theirs[1], 1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("changes", [
    dict(attention_bias=True, mlp_bias=True),
    dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=64)),
    dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)),
])  # fmt: skip
def test_equals_with_biases_and_other_rotary_types(changes):
    model = tiny(**changes)
    ids, probe = packed(SEGMENTS)
    mine, theirs = (run(model, ids, SEGMENTS, probe) for run in (fused_pass, own_pass))
    assert_close([mine[0]], [theirs[0]], 1e-5)
    assert_close(mine[1], theirs[1], 1e-4)


def test_long_segments_are_cut_into_query_blocks():
    model = tiny()
    segments = [fused.QUERY_BLOCK + 30, 2 * fused.QUERY_BLOCK]
    ids, probe = packed(segments)
    mine, theirs = (run(model, ids, segments, probe) for run in (fused_pass, own_pass))
    assert_close([mine[0]], [theirs[0]], 1e-5)
    assert_close(mine[1], theirs[1], 1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("down_proj",), ("1.self_attn.o_proj", "2.mlp.up_proj"), ("0.mlp.gate_proj",)]
)
def test_any_subset_of_layers_may_be_adapted(targets):
    model = tiny(targets=targets)
    ids, probe = packed(SEGMENTS)
    mine, theirs = (run(model, ids, SEGMENTS, probe) for run in (fused_pass, own_pass))
    assert_close([mine[0]], [theirs[0]], 1e-5)
    assert_close(mine[1], theirs[1], 1e-4)


def test_a_packed_segment_does_not_see_its_neighbours():
    model = tiny()
    ids, _ = packed(SEGMENTS)
    with torch.no_grad():
        together = fused.hidden_states(model, ids, SEGMENTS, compile=False)
        alone = torch.cat([fused.hidden_states(model, part, [len(part)], compile=False) for part in ids.split(SEGMENTS)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_switched_off_adapter_is_not_computed():
    model = tiny()
    ids, _ = packed(SEGMENTS)
    with methods.disabled(model), torch.no_grad():
        mine = fused.hidden_states(model, ids, SEGMENTS, compile=False)
        theirs = torch.cat([model.model(part.unsqueeze(0), use_cache=False).last_hidden_state[0] for part in ids.split(SEGMENTS)])
    assert_close([mine], [theirs], 1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_errs_no_more_than_the_modules_with_an_fp32_residual_stream(family):
    ids, probe = packed(SEGMENTS)
    model = tiny(family, torch.bfloat16)
    mine, theirs = (run(model, ids, SEGMENTS, probe) for run in (fused_pass, own_pass))
    methods.prepare(exact := tiny(family, torch.bfloat16).float(), torch.float32)
    for layer in methods.blocks(exact).values():
        layer.compute = torch.float32
    true = own_pass(exact, ids, SEGMENTS, probe)

    def error(run):
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip([run[0], *run[1]], [true[0], *true[1]], strict=True)])

    assert error(mine)[0] <= 1.2 * error(theirs)[0]
    assert error(mine).mean() <= 1.5 * error(theirs).mean() < 0.15


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits(dtype):
    model = tiny(dtype=dtype)
    ids, probe = packed(SEGMENTS)
    first, again = (fused_pass(model, ids, SEGMENTS, probe) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_equals_plain_at_every_length(family):
    if not fused.compile_works():
        pytest.skip("no C++ compiler")
    model = tiny(family)
    for segments in (SEGMENTS, [64], [9, 8, 7, 3], [300, 20]):
        ids, probe = packed(segments)
        mine, theirs = (fused_pass(model, ids, segments, probe, compile=compile) for compile in (True, False))
        assert_close([mine[0]], [theirs[0]], 1e-5)
        assert_close(mine[1], theirs[1], 1e-5)


# --- the head


def head_inputs(num=3 * fused.HEAD_CHUNK - 5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num, 24, generator=generator).requires_grad_()
    weight = torch.randn(50, 24, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, 50, (num,), generator=generator), torch.rand(num, generator=generator) * 2


def learned_nll(hidden, weight, targets, weights):
    return losses.nll(fused.learned_logps(hidden, weight, targets), weights)


@pytest.mark.parametrize("trained", [False, True])
def test_learned_logps_give_weighted_cross_entropy(trained):
    hidden, weight, targets, weights = head_inputs()
    weight.requires_grad_(trained)
    expected = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum()
    inputs = (hidden, weight) if trained else (hidden,)
    theirs = torch.autograd.grad(expected * 0.3, inputs)
    nll = learned_nll(hidden, weight, targets, weights)
    mine = torch.autograd.grad(nll * 0.3, inputs)
    assert_close([nll.detach()], [expected.detach()], 1e-6)
    assert_close(mine, theirs, 1e-5)


def test_learned_nll_by_hand():
    # two classes, logits (0, ln 3): p = (1/4, 3/4); weights 1 and 2: ln 4 + 2 ln(4/3)
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0)
    nll = learned_nll(hidden, weight, torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(nll, torch.tensor(4.0).log() + 2 * torch.tensor(4 / 3).log())


def test_no_learned_token_is_no_loss():
    hidden, weight, targets, weights = head_inputs(0)
    assert learned_nll(hidden, weight, targets, weights) == 0


# --- what is not supported


def test_other_models_are_refused_with_a_reason():
    small = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
                 num_key_value_heads=1)  # fmt: skip
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**small))
    assert "gpt2" in fused.unsupported(gpt2) and "gemma" in fused.unsupported(gemma)


def test_what_a_llama_may_not_have():
    assert "slides over 32" in fused.unsupported(tiny("mistral", sliding_window=32))
    assert fused.unsupported(tiny("mistral", sliding_window=32), longest=32) is None
    assert "attention_dropout" in fused.unsupported(tiny(attention_dropout=0.1))
    assert "gelu" in fused.unsupported(tiny(hidden_act="gelu"))
    assert "float16" in fused.unsupported(tiny(dtype=torch.float16))
    model = tiny()
    model.model.norm.weight.requires_grad_(True)
    assert "model.norm.weight" in fused.unsupported(model)


def test_segments_must_cover_the_tokens():
    with pytest.raises(ValueError, match="sum to the 10 tokens"):
        fused.hidden_states(tiny(), torch.zeros(10, dtype=torch.long), [4, 5], compile=False)
