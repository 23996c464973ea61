"""InternLM, Baichuan and Llama folders: rows of fused projections, ALiBi, normalised heads, chat formats."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from glmtune import families
from glmtune.chat import Tokens, choose, jinja_parts, jinja_renderer
from glmtune.errors import UserError
from glmtune.families import alibi, baichuan, internlm, llama
from glmtune.families.family import Family
from glmtune.records import Turn

SIZES = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def filled(family: Family, tensors: dict[str, Tensor]) -> Any:
    """The native model with published tensors, cut and named by the family."""
    families.register()
    settings = {key: value for key, value in family.config.items() if key != "model_type"}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.config["model_type"], **settings))
    state = {}
    for name, tensor in tensors.items():
        takes = family.places(name)
        assert takes is not None, name
        for take in takes:
            rows = tensor.unflatten(0, (take.groups, -1))[:, take.start : take.stop].flatten(0, 1)
            state[take.name] = F.normalize(rows.float()) if take.name in family.normalised else rows
    model.load_state_dict(state)
    return model.eval()


# --- recorded references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read"), [("internlm", internlm.read), ("baichuan7b", baichuan.read), ("baichuan13b", baichuan.read)]
)
def test_logits_equal_the_recorded_ones_of_the_published_code(shared: Path, name: str, read: Any):
    from safetensors.torch import load_file

    folder = shared / "goldens" / "others" / name
    if not folder.is_dir():
        pytest.skip("the recorded references are not beside the project")
    golden = load_file(folder / "golden.safetensors")
    model = filled(read(folder, json.loads((folder / "config.json").read_text())), load_file(folder / "model.safetensors"))
    with torch.no_grad():
        assert (model(golden["ids"]).logits - golden["logits"]).abs().max() < 2e-5


# --- InternLM2: a forward of its own --------------------------------------------------------------------------------------------


def internlm2_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    d, m, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = d // config["num_attention_heads"]
    rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * width
    shapes = {"model.tok_embeddings.weight": (v, d), "model.norm.weight": (d,), "output.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + "attention.wqkv.weight": (rows, d), at + "attention.wo.weight": (d, d), at + "attention_norm.weight": (d,)}
        shapes |= {
            at + "feed_forward.w1.weight": (m, d),
            at + "feed_forward.w3.weight": (m, d),
            at + "feed_forward.w2.weight": (d, m),
        }
        shapes |= {at + "ffn_norm.weight": (d,)}
        if config["bias"]:
            shapes |= {at + "attention.wqkv.bias": (rows,), at + "attention.wo.bias": (d,)}
    return {name: torch.randn(shape) * 0.2 + (1 if "norm" in name else 0) for name, shape in shapes.items()}


def internlm2_logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Head by head and row by row, as the published module describes it: rows (group, q ... q k v, width)."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    per = heads // groups

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:
        made = x.clone()
        for position in range(len(x)):
            for j in range(width // 2):
                angle = position * config["rope_theta"] ** (-2 * j / width)
                a, b = x[position, j].item(), x[position, j + width // 2].item()
                made[position, j] = a * math.cos(angle) - b * math.sin(angle)
                made[position, j + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return made

    x = tensors["model.tok_embeddings.weight"][ids]
    causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, tensors[at + "attention_norm.weight"])
        fused = h @ tensors[at + "attention.wqkv.weight"].T + tensors.get(at + "attention.wqkv.bias", torch.zeros(()))
        blocks = fused.split(width, -1)
        out = []
        for head in range(heads):
            group = head // per * (per + 2)
            q, k, v = blocks[group + head % per], blocks[group + per], blocks[group + per + 1]
            out.append((rotated(q) @ rotated(k).T / width**0.5 + causal).softmax(-1) @ v)
        x = x + torch.cat(out, -1) @ tensors[at + "attention.wo.weight"].T + tensors.get(at + "attention.wo.bias", torch.zeros(()))
        h = norm(x, tensors[at + "ffn_norm.weight"])
        gate, up = h @ tensors[at + "feed_forward.w1.weight"].T, h @ tensors[at + "feed_forward.w3.weight"].T
        x = x + (F.silu(gate) * up) @ tensors[at + "feed_forward.w2.weight"].T
    return norm(x, tensors["model.norm.weight"]) @ tensors["output.weight"].T


@pytest.mark.parametrize(("groups", "bias"), [(2, False), (3, True), (6, False)])
def test_internlm2_rows_are_cut_group_by_group(tmp_path: Path, groups: int, bias: bool):
    config = {
        "model_type": "internlm2",
        **SIZES,
        "num_key_value_heads": groups,
        "bias": bias,
        "rope_theta": 1e4,
        "max_position_embeddings": 32,
    }
    tensors = internlm2_tensors(config)
    ids = torch.randint(0, 50, (9,))
    with torch.no_grad():
        logits = filled(internlm.read(tmp_path, config), tensors)(ids[None]).logits[0]
    assert (logits - internlm2_logits(config, tensors, ids)).abs().max() < 2e-5


def test_dynamic_rotary_changes_nothing_within_the_trained_length_and_follows_the_published_formula_beyond(tmp_path: Path):
    plain = {
        "model_type": "internlm2",
        **SIZES,
        "num_key_value_heads": 2,
        "bias": False,
        "rope_theta": 1e4,
        "max_position_embeddings": 8,
    }
    scaled = {**plain, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    tensors = internlm2_tensors(plain)
    for length in (8, 12):
        ids = torch.randint(0, 50, (length,))
        theta = 1e4 * max(1.0, 2.0 * length / 8 - 1) ** (4 / 2)  # base * (factor * n / max - (factor - 1))^(d / (d - 2)), d = 4
        with torch.no_grad():
            logits = filled(internlm.read(tmp_path, scaled), tensors)(ids[None]).logits[0]
        assert (logits - internlm2_logits({**plain, "rope_theta": theta}, tensors, ids)).abs().max() < 2e-5


def test_published_settings_become_native_ones(tmp_path: Path):
    first = {"model_type": "internlm", **SIZES, "rotary": {"base": 10000, "type": "dynamic"}, "bias": False}
    made = internlm.read(tmp_path, first).config
    assert made["rope_parameters"] == {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10000.0}
    assert made["attention_bias"] is False and made["max_position_embeddings"] == 2048
    third = {"model_type": "internlm3", **SIZES, "num_key_value_heads": 2, "head_dim": 8, "bias": False, "qkv_bias": False}
    third |= {"rope_theta": 50000000, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, "max_position_embeddings": 32768}
    made = internlm.read(tmp_path, third).config
    assert made["rope_parameters"] == {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7}
    assert (made["model_type"], made["num_key_value_heads"], made["head_dim"]) == ("llama", 2, 8)


@pytest.mark.parametrize("kind", ["internlm", "internlm2", "internlm3"])
def test_a_chat_model_is_told_by_its_name_or_its_second_end_token(tmp_path: Path, kind: str):
    tmp_path = tmp_path / "model"  # pytest names the folder after the test
    tmp_path.mkdir()
    config = {"model_type": kind, **SIZES, "num_key_value_heads": 6}
    chat = {"internlm": "InternLM-Chat", "internlm2": "InternLM2-Chat", "internlm3": "InternLM3-Instruct"}[kind]
    assert internlm.read(tmp_path, config).name == chat.split("-")[0]
    assert internlm.read(tmp_path, {**config, "_name_or_path": f"internlm/{kind}-chat-7b"}).name == chat
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 40]}')
    assert internlm.read(tmp_path, config).name == chat


# --- ALiBi ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alibi_model() -> Any:
    torch.manual_seed(0)
    model = alibi.AlibiForCausalLM(alibi.AlibiConfig(**{**SIZES, "initializer_range": 0.2}, max_position_embeddings=64)).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def test_slopes_are_the_papers():
    assert alibi.slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi.slopes(6) == pytest.approx([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    assert alibi.slopes(40) == pytest.approx([2 ** (-(k + 1) / 4) for k in range(32)] + [2 ** (-(2 * k + 1) / 8) for k in range(8)])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_bias_is_slope_times_distance_where_a_key_is_visible(kind: str):
    visible = torch.rand(2, 1, 3, 5) > 0.4
    mask = visible if kind == "bool" else torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    made = alibi.biased(mask, 6, 2, torch.float32)
    for row in range(2):
        for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]):
            for query in range(3):
                for key in range(5):
                    wanted = slope * (key - (query + 2)) if visible[row, 0, query, key] else torch.finfo(torch.float32).min
                    assert made[row, head, query, key].item() == pytest.approx(wanted)


@torch.no_grad()
def test_attention_is_the_published_one(alibi_model: Any):
    """One layer by hand: bias by key position, no rotation."""
    layer, hidden = alibi_model.model.layers[0].self_attn, torch.randn(1, 7, 24)
    mask = alibi.biased(torch.ones(1, 1, 7, 7).tril().bool(), 6, 0, torch.float32)
    made, _ = layer(hidden, position_embeddings=alibi.NoRotary()(hidden, torch.arange(7)), attention_mask=mask)
    q, k, v = (proj(hidden)[0].view(7, 6, 4).transpose(0, 1) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    bias = torch.tensor(alibi.slopes(6)).view(6, 1, 1) * torch.arange(7) + torch.full((7, 7), -torch.inf).triu(1)
    wanted = layer.o_proj(((q @ k.transpose(1, 2) / 2 + bias).softmax(-1) @ v).transpose(0, 1).reshape(1, 7, 24))
    assert (made - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_eager_equals_sdpa(alibi_model: Any):
    ids, mask = torch.randint(3, 50, (2, 9)), torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    sdpa = alibi_model(ids, attention_mask=mask).logits
    alibi_model.set_attn_implementation("eager")
    eager = alibi_model(ids, attention_mask=mask).logits
    alibi_model.set_attn_implementation("sdpa")
    assert (sdpa - eager)[mask.bool()].abs().max() < 1e-5


@torch.no_grad()
def test_cached_equals_uncached(alibi_model: Any):
    ids, mask = torch.randint(3, 50, (2, 9)), torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    whole = alibi_model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        out = alibi_model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole)[mask.bool()].abs().max() < 1e-5


@torch.no_grad()
def test_padded_and_packed_rows_equal_single_ones(alibi_model: Any):
    rows = [torch.randint(3, 50, (n,)) for n in (4, 7)]
    alone = [alibi_model(row[None]).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
        for i, row in enumerate(rows):
            span = slice(7 - len(row), 7) if side == "left" else slice(0, len(row))
            ids[i, span], mask[i, span] = row, 1
        out = alibi_model(ids, attention_mask=mask).logits
        assert all((out[i][mask[i].bool()] - alone[i]).abs().max() < 1e-5 for i in range(2))
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed = alibi_model(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    assert (packed - torch.cat(alone)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_argmax_of_whole_forwards(alibi_model: Any, cache: str):
    rows = [torch.randint(3, 50, (n,)) for n in (3, 5)]
    ids, mask = torch.stack([F.pad(row, (5 - len(row), 0)) for row in rows]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    made = alibi_model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True
    )
    for row, found in zip(rows, made):
        for _ in range(6):
            row = torch.cat([row, alibi_model(row[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(found[-len(row) :], row)


def test_checkpointing_changes_no_gradient(alibi_model: Any):
    ids = torch.randint(3, 50, (2, 6))
    grads = []
    for checkpointing in (False, True):
        alibi_model.train()
        alibi_model.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else None
        alibi_model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in alibi_model.parameters()])
        alibi_model.zero_grad()
    alibi_model.gradient_checkpointing_disable()
    alibi_model.eval()
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_half_precision_stays_finite_in_padded_rows(alibi_model: Any):
    import copy

    for dtype in (torch.float16, torch.bfloat16):
        model = copy.deepcopy(alibi_model).to(dtype)
        ids, mask = torch.randint(3, 50, (2, 40)), torch.ones(2, 40, dtype=torch.long)
        mask[0, :30] = 0
        assert model(ids, attention_mask=mask).logits.isfinite().all()


@torch.no_grad()
def test_saved_and_loaded_again_it_is_the_same(alibi_model: Any, tmp_path: Path):
    families.register()
    alibi_model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 50, (1, 8))
    assert isinstance(again, alibi.AlibiForCausalLM)
    assert torch.equal(again(ids).logits, alibi_model(ids).logits)


# --- Baichuan ---------------------------------------------------------------------------------------------------------------------


def baichuan_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    d, m, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.W_pack.weight": (3 * d, d),
            at + "self_attn.o_proj.weight": (d, d),
            at + "mlp.down_proj.weight": (d, m),
        }
        shapes |= {at + "mlp.gate_proj.weight": (m, d), at + "mlp.up_proj.weight": (m, d)}
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("rotary", [True, False])
def test_baichuan2s_head_is_normalised_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotary: bool):
    from safetensors.torch import save_file

    length = {"max_position_embeddings": 32, "model_max_length": 32} if rotary else {"model_max_length": 32}
    config = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], **SIZES, **length, "z_loss_weight": 0}
    tensors = baichuan_tensors(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setitem(families.READERS, "baichuan", baichuan.read)
    model = families.load_model(tmp_path)
    assert model.config.model_type == ("llama" if rotary else "llama_alibi")
    with torch.no_grad():
        ids = torch.randint(3, 50, (1, 5))
        hidden, logits = model.model(ids).last_hidden_state[0], model(ids).logits[0]
        for row in range(0, 50, 7):
            weight = tensors["lm_head.weight"][row]
            assert torch.allclose(logits[:, row], hidden @ (weight / sum(x * x for x in weight.tolist()) ** 0.5), atol=1e-5)
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, tensors["model.layers.1.self_attn.W_pack.weight"][24:48])


def test_the_published_sizes_tell_7b_from_13b_whatever_else_a_config_says(tmp_path: Path):
    big = {
        **SIZES,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 125696,
        "max_position_embeddings": 4096,
    }
    small = {
        **SIZES,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 64000,
        "model_max_length": 4096,
    }
    made = [baichuan.read(tmp_path, {"model_type": "baichuan", **config}) for config in (big, small)]
    assert [(family.name, family.config["model_type"], bool(family.normalised)) for family in made] == [
        ("Baichuan2-13B", "llama_alibi", True),
        ("Baichuan-7B", "llama", False),
    ]


# --- what cannot be read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "config", "said"),
    [
        (
            internlm.read,
            {"model_type": "internlm", "rotary": {"type": "abacus"}},
            "rotary is {'type': 'abacus'}; only type origin or dynamic",
        ),
        (internlm.read, {"model_type": "internlm2", "rope_scaling": {"type": "su", "factor": 2}}, "only type dynamic or linear"),
        (internlm.read, {"model_type": "internlm3", "qkv_bias": True, "bias": False}, "qkv_bias is True; only the value of bias"),
        (
            baichuan.read,
            {"model_type": "baichuan", "num_key_value_heads": 2},
            "num_key_value_heads is 2; only Baichuan and Baichuan2",
        ),
    ],
)
def test_what_llamas_class_cannot_express_is_refused_by_name(tmp_path: Path, read: Any, config: dict[str, Any], said: str):
    with pytest.raises(UserError, match="config.json") as error:
        read(tmp_path, {**SIZES, **config})
    assert said in str(error.value)


@pytest.mark.parametrize(("read", "kind"), [(internlm.read, "internlm"), (internlm.read, "internlm2"), (baichuan.read, "baichuan")])
def test_missing_sizes_are_named(tmp_path: Path, read: Any, kind: str):
    with pytest.raises(UserError, match="has no .*hidden_size"):
        read(tmp_path, {"model_type": kind, "vocab_size": 50})


# --- chat formats -----------------------------------------------------------------------------------------------------------------

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
META = internlm.SYSTEM
STANFORD = llama.ALPACA_SYSTEM
FORMATS = {  # format: (special tokens, without system, with system "S"); written out from the published code
    "internlm": (
        internlm.INTERNLM, ["<s>", "<eoa>"],
        f"<s><|System|>:{META}\n<|User|>:a\n<|Bot|>:b<eoa>\n<|User|>:c\n<|Bot|>:d<eoa>\n",
        "<s><|System|>:S\n<|User|>:a\n<|Bot|>:b<eoa>\n<|User|>:c\n<|Bot|>:d<eoa>\n",
    ),
    "internlm2": (
        internlm.INTERNLM2, ["<s>", "<|im_start|>", "<|im_end|>"],
        f"<s><|im_start|>system\n{META}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
    ),
    "baichuan": (
        baichuan.BAICHUAN, ["<reserved_102>", "<reserved_103>"],
        "<reserved_102>a<reserved_103>b<reserved_102>c<reserved_103>d", "S<reserved_102>a<reserved_103>b<reserved_102>c<reserved_103>d",
    ),
    "baichuan2": (
        baichuan.BAICHUAN2, ["<reserved_106>", "<reserved_107>"],
        "<reserved_106>a<reserved_107>b<reserved_106>c<reserved_107>d", "S<reserved_106>a<reserved_107>b<reserved_106>c<reserved_107>d",
    ),
    "llama2": (
        llama.LLAMA2, ["<s>", "</s>"],
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>",
    ),
    "alpaca2": (
        llama.ALPACA2, ["<s>", "</s>"],
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\na [/INST] b</s><s>[INST] c [/INST] d</s>",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b</s><s>[INST] c [/INST] d</s>",
    ),
    "alpaca": (
        llama.ALPACA, ["<s>", "</s>"],
        f"<s>{STANFORD}\n\n### Instruction:\na\n\n### Response: b</s>\n\n### Instruction:\nc\n\n### Response: d</s>",
        "<s>S\n\n### Instruction:\na\n\n### Response: b</s>\n\n### Instruction:\nc\n\n### Response: d</s>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("system", [False, True])
def test_formats_are_the_published_ones_and_can_be_cut(name: str, system: bool):
    source, special, without, with_system = FORMATS[name]
    turns = [("system", "S"), *TURNS] if system else TURNS
    messages = [{"role": role, "content": text} for role, text in turns]
    render = jinja_renderer(source, NAMES)
    whole = render(messages)
    assert whole == (with_system if system else without)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            assert whole.startswith(render(messages[:i], add_generation_prompt=True))
    parts = jinja_parts(render, [*special, "</s>"], "</s>")(tuple(Turn(role, text) for role, text in turns), False)
    stops = [part.text.strip() for part in parts if part.kind == "stop"]
    last = {"internlm": "<eoa>", "internlm2": "<|im_end|>"}.get(name, "</s>")
    assert stops == [{"baichuan": "<reserved_102>", "baichuan2": "<reserved_106>"}.get(name, last), last]
    with pytest.raises(UserError, match="refuses"):
        render([{"role": "judge", "content": "x"}]) if name != "internlm2" else render([])


@pytest.mark.parametrize("prefix", [True, False])
def test_a_baichuan_vocabulary_writes_the_ids_of_build_chat_input(tmp_path: Path, prefix: bool):
    import sentencepiece

    folder = tmp_path / "Baichuan2-7B-Chat"
    folder.mkdir()
    marks = [*(f"<reserved_{i}>" for i in range(1000, 1192)), "<reserved_106>", "<reserved_107>"]  # the last two: ids 195 and 196
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog sat too"] * 9), model_prefix=str(folder / "tokenizer"), vocab_size=475,
        model_type="bpe", byte_fallback=True, user_defined_symbols=marks, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "pad_token": {"content": "<unk>"}}')
    (folder / "generation_config.json").write_text('{"user_token_id": 195, "assistant_token_id": 196, "eos_token_id": 2}')
    family = baichuan.read(folder, {"model_type": "baichuan", **SIZES, "max_position_embeddings": 32, "z_loss_weight": 0})
    assert family.vocabulary is not None
    template = choose("auto", Tokens.of_vocabulary(folder, family.vocabulary(folder)))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    turns = [("system", "the dog"), ("user", "the cat"), ("assistant", "sat on"), ("user", "the\nmat"), ("assistant", "too \u4e00")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids, learned = own.encode("the dog"), []
    for role, text in turns[1:]:
        if role == "user" and learned:
            learned.append(195)
        ids += [{"user": 195, "assistant": 196}[role], *own.encode(text)]
        learned += own.encode(text) if role == "assistant" else []
    made = template.encode(messages)
    assert made.ids == [*ids, 2]
    assert [id for id in made.labels if id != -100] == [*learned, 2]
    assert template.prompt(messages) == ids[: -len(own.encode("too \u4e00"))]
    assert template.stop_ids == [2, 195] and template.tokens.pad_id == 0 and template.tokens.prefix == []


# --- Llama folders ------------------------------------------------------------------------------------------------------------------


def llama_folder(path: Path, config: dict[str, Any], *files: str, **tokenizer: Any) -> dict[str, Any]:
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return {"model_type": "llama", **config}


@pytest.mark.parametrize(
    ("name", "size", "title", "chat"),
    [
        ("chinese-alpaca-plus", 49954, "Chinese-Alpaca", llama.ALPACA),
        ("chinese-llama", 49953, "Chinese-LLaMA", None),
        ("chinese-alpaca-2-7b", 55296, "Chinese-Alpaca-2", llama.ALPACA2),
        ("chinese-llama-2-7b", 55296, "Chinese-LLaMA-2", None),
        ("Llama-2-7b-chat", 32000, "Llama-2-Chat", llama.LLAMA2),
        ("Llama-2-7b", 32000, "Llama", None),
        ("vicuna-chat", 32000, "Llama", None),
    ],
)
def test_a_llama_folder_gets_a_format_only_where_it_is_surely_its_own(
    tmp_path: Path, name: str, size: int, title: str, chat: str | None
):
    config = llama_folder(tmp_path / name, {"vocab_size": size}, "tokenizer.model")
    family = llama.read(tmp_path / name, config)
    assert family is not None and family.name == title and family.native and family.config is config
    assert llama._format(tmp_path / name, config) == (title, chat)
    assert bool(family.notes) == (chat is None)


def test_a_llama_folder_that_has_all_it_needs_is_left_alone(tmp_path: Path):
    own = llama_folder(tmp_path / "a", {"vocab_size": 32000}, "tokenizer.json", "tokenizer.model", chat_template="x")
    base = llama_folder(tmp_path / "b", {"vocab_size": 128256}, "tokenizer.json")
    bare = llama_folder(tmp_path / "c", {"vocab_size": 32000})
    assert llama.read(tmp_path / "a", own) is llama.read(tmp_path / "b", base) is llama.read(tmp_path / "c", bare) is None


def test_a_missing_format_is_added_to_a_folders_own_fast_tokenizer(tmp_path: Path):
    config = llama_folder(
        tmp_path / "chinese-alpaca-2", {"vocab_size": 55296}, "tokenizer.json", pad_token="<pad>", auto_map={"x": "y"}
    )
    family = llama.read(tmp_path / "chinese-alpaca-2", config)
    assert family is not None and family.vocabulary is not None
    made = family.vocabulary(tmp_path / "chinese-alpaca-2")
    assert made.json == "{}" and made.config["chat_template"] == llama.ALPACA2
    assert made.config["pad_token"] == "<pad>" and "auto_map" not in made.config


def test_names_come_from_the_config_the_tokenizer_or_the_hub_folder(tmp_path: Path):
    folder = tmp_path / "models--internlm--internlm2-chat-7b" / "snapshots" / "0123"
    llama_folder(folder, {}, name_or_path="/a/b/Some-Name/")
    assert llama.called(folder, {"_name_or_path": "x/Base"}) == "base some-name models--internlm--internlm2-chat-7b"
