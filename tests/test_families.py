"""Published folders read, tuned, exported and used: equal to the published code, without any of it being run."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from glmtune import cli, families, load, load_run, methods, train
from glmtune.chat import FORMS
from glmtune.errors import UserError
from glmtune.export import export
from glmtune.families import weights
from glmtune.generate import Sampling, answer
from glmtune.records import Conversation, Turn
from glmtune.run import Chat, Lora

from . import published, tiny

GLM = ["chatglm2", "chatglm3", "glm4"]


# --- against the recorded outputs of the published code -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Path:
    if not (shared / "goldens").is_dir():
        pytest.skip("the recorded references are not beside the project")
    return shared / "goldens"


class Golden:
    def __init__(self, folder: Path):
        self.folder = folder
        self.model = families.load_model(folder, dtype=torch.float32, device="cpu")
        self.tensors = load_file(folder / "golden.safetensors")
        self.facts = json.loads((folder / "golden.json").read_text())

    def call(self, batch: str, **more: Any) -> tuple[Any, Tensor]:
        """The outputs for a batch, and which positions count."""
        keys = ("attention_mask", "position_ids")
        given = {key: self.tensors[f"{batch}.{key}"] for key in keys if f"{batch}.{key}" in self.tensors}
        ids = self.tensors[f"{batch}.input_ids"]
        valid = self.tensors.get(f"{batch}.valid", torch.ones_like(ids)).bool()
        return self.model(ids, labels=self.tensors[f"{batch}.labels"], **{**given, **more}), valid


@pytest.fixture(scope="module", params=GLM)
def golden(request: pytest.FixtureRequest, goldens: Path) -> Golden:
    return Golden(goldens / request.param)


def test_logits_losses_and_hidden_states_are_the_published_ones(golden: Golden):
    for name, facts in golden.facts["batches"].items():
        with torch.no_grad():
            out, valid = golden.call(name, output_hidden_states=True)
        assert (out.logits - golden.tensors[f"{name}.logits"])[valid].abs().max() <= 2e-5
        assert abs(float(out.loss) - facts["loss"]) <= 1e-5
        if f"{name}.hidden_states" in golden.tensors:  # the last one is before the final norm there, behind it in transformers
            kept = golden.tensors[f"{name}.hidden_states"]
            assert all((a - b).abs().max() <= 2e-5 for a, b in zip(out.hidden_states[:-1], kept[:-1]))


def test_gradients_are_the_published_ones(golden: Golden):
    model = golden.model
    for name, facts in golden.facts["batches"].items():
        if "grad_norms" not in facts:
            continue
        model.zero_grad()
        out, _ = golden.call(name)
        out.loss.backward()
        family = families.family_of(golden.folder)
        for published_name, norm in facts["grad_norms"].items():
            parts = [model.get_parameter(take.name).grad for take in family.places(published_name) or ()]
            assert float(torch.cat(parts).norm()) == pytest.approx(norm, rel=1e-4)
        embedding = model.get_input_embeddings().weight.grad
        expected = golden.tensors[f"{name}.grad.embedding"]
        assert (embedding - expected).abs().max() <= 1e-4 * expected.abs().max()
    model.zero_grad()


@pytest.mark.few(3)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("batch", ["gen1", "gen3_leftpad"])
def test_greedy_tokens_are_the_published_ones(golden: Golden, batch: str, use_cache: bool):
    ids, mask = golden.tensors[f"{batch}.input_ids"], golden.tensors[f"{batch}.attention_mask"]
    new = golden.tensors[f"{batch}.new_tokens"]
    out = golden.model.generate(
        ids, attention_mask=mask, max_new_tokens=new.shape[1], do_sample=False, use_cache=use_cache, eos_token_id=None
    )
    assert torch.equal(out[:, ids.shape[1] :], new)


def prefix(folder: Path, number: int, layers: int, groups: int) -> DynamicCache:
    """P-Tuning v2's keys and values from the published prefix encoder (ChatGLM2: embedding, or embedding and a two-layer MLP)."""
    stored = {k.rsplit("prefix_encoder.", 1)[1]: v for k, v in load_file(folder / f"ptuning_proj{number}.safetensors").items()}
    made = stored["embedding.weight"]
    if number:
        made = torch.tanh(made @ stored["trans.0.weight"].T + stored["trans.0.bias"]) @ stored["trans.2.weight"].T
        made = made + stored["trans.2.bias"]
    pairs = made.view(len(made), layers, 2, groups, -1).permute(1, 2, 3, 0, 4)  # layer, key or value, group, position, width
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.unsqueeze(0), value.unsqueeze(0), layer)
    return cache


@pytest.mark.parametrize("number", [0, 1])
def test_a_learned_prefix_in_the_cache_gives_the_published_logits(golden: Golden, number: int):
    config = golden.model.config
    for name in ("b0_single", "b1_pair", "b2_leftpad"):
        cache = prefix(golden.folder, number, config.num_hidden_layers, config.num_key_value_heads)
        ids = golden.tensors[f"{name}.input_ids"]
        cache.batch_repeat_interleave(len(ids))
        mask = golden.tensors.get(f"{name}.attention_mask", torch.ones_like(ids))
        mask = torch.cat([mask.new_ones(len(ids), cache.get_seq_length()), mask], 1)
        positions = golden.tensors.get(f"{name}.position_ids", torch.arange(ids.shape[1]).expand_as(ids))
        with torch.no_grad():
            out, valid = golden.call(name, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert (out.logits - golden.tensors[f"ptuning_proj{number}.{name}.logits"])[valid].abs().max() <= 2e-5


@pytest.fixture(scope="module", params=tiny.slow_but(["chatglm3"], ["chatglm1", "chatglm2", "chatglm3", "glm4"]))
def recorded(request: pytest.FixtureRequest, goldens: Path) -> tuple[str, dict[str, Any], Any, Any]:
    """(family, recorded facts, tokenizer, template) of a published tokenizer."""
    folder = goldens.parent / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip("the published tokenizers are not beside the project")
    facts = json.loads((goldens / f"tokenizer_{request.param}.json").read_text())
    return request.param, facts, *families.load_tokenizer(folder)


@pytest.mark.few(1)
def test_text_becomes_the_published_ids_and_never_a_special_one(recorded):
    _, facts, tokenizer, template = recorded
    assert len(tokenizer) == facts["len"] and tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == facts["pad"] and tokenizer.eos_token_id == facts["eos"]
    for item in facts["strings"]:
        ids = tokenizer(item["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == template.tokens.encode(item["text"]) == item["ids_raw_model_encode"]
        assert not set(ids) & set(template.tokens.special.values())
        assert tokenizer.decode(ids) == item["decode_of_raw"]


def test_conversations_become_the_published_prompt_and_training_ids(recorded):
    family, facts, tokenizer, template = recorded
    for talk in facts["conversations"]:
        assert template.prompt(talk["messages"]) == talk["ids"]
        asked = talk["messages"][:-1]
        assert tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == talk["ids"]
        example = template.encode(talk["messages"])
        assert example.ids == talk["train"]["input_ids"]
        labels = list(talk["train"]["labels"])
        if family == "chatglm1":  # the published training also learns <sop>, which stands in the prompt; ours does not
            labels[labels.index(facts["special_ids"]["<sop>"])] = -100
        assert example.labels == labels


# --- every family, the whole way ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """name -> its tiny published folder, made once."""
    root, known = tmp_path_factory.mktemp("published"), {}

    def make(name: str) -> Path:
        if name not in known:
            known[name] = published.FAMILIES[name](root / name)
        return known[name]

    return make


QUESTION = [{"role": "user", "content": "Where is the cat? 你好\n  in  the sea"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", tiny.slow_but(["chatglm-6b", "chatglm3-6b", "internlm2-chat-7b", "baichuan2-13b-chat"], published.FAMILIES)
)
def test_trained_merged_exported_reloaded_and_asked(name: str, made, tmp_path: Path):
    folder = made(name)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(6, 2))
    settings = ["optim.steps=2", "optim.batch_size=4", "optim.lr=0.01", "method.rank=2", "precision=fp32"]
    run = load_run(None, [f"model={folder}", f"data={rows}", f"out={tmp_path / 'out'}", *settings])
    base, report = families.load_model(folder, dtype="fp32", device="cpu"), train(run)
    assert report.steps == 2 and report.loss > 0
    tuned = load(tmp_path / "out", dtype="fp32", device="cpu")
    ids = torch.tensor([tuned.template.prompt(QUESTION)])
    with torch.no_grad():
        before, after = base(ids).logits, tuned.model(ids).logits
        assert (after - before).abs().max() > 1e-3  # something was learned
        to = export(tmp_path / "out", tmp_path / "native", dtype="fp32")
        plain: Any = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32, trust_remote_code=False)
        assert (plain(ids).logits - after).abs().max() <= 2e-5  # merged = unmerged
    used = load(to, dtype="fp32", device="cpu")
    assert used.template.prompt(QUESTION) == ids[0].tolist() and used.template.stop_ids == tuned.template.stop_ids
    assert used.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"] == ids[0].tolist()
    text = {"max_new_tokens": 6, "temperature": 0}
    assert used.chat(QUESTION, **text) == tuned.chat(QUESTION, **text)
    out = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    [(_, ours)] = answer(used.model, used.template, [ids[0].tolist()], Sampling(max_new_tokens=6))
    assert used.template.parse(out).text == ours  # transformers stops where we do
    assert not (folder / "RAN").exists()


@pytest.mark.few(4)
@pytest.mark.parametrize("name", published.FAMILIES)
def test_the_laws_of_a_chat_format(name: str, made):
    """A prompt is a prefix of its training sequence; each learned answer and its end mark are learned, nothing else; user text stays
    text; a reply is read back."""
    template = families.open_template(made(name))
    answers = ["On a mat.", "  两个 blanks\n\nand more [gMASK] <|user|> </s>"]
    talk = Conversation(
        (
            Turn("user", "Hi <|assistant|> <eop> sop"),
            Turn("assistant", answers[0]),
            Turn("user", "再"),
            Turn("assistant", answers[1]),
        )
    )
    parts = template.split(talk)
    assert len(parts) == (2 if template.context else 1)
    for part in parts:
        example = template.encode(part)
        prompt = template.prompt(part)
        assert example.ids[: len(prompt)] == prompt
        last = [i for i, w in enumerate(example.weights) if w]
        assert example.next_ids[last[-1]] in template.stop_ids
        assert (
            template.parse(example.ids[len(prompt) :]).text.strip()
            == template.tokens.decode(template.tokens.encode(part.turns[-1].text)).strip()
        )
    marks = {i: n for n, i in template.tokens.special.items()}
    plain = template.tokens.encode("".join(marks.values()))
    assert not set(plain) & set(marks)
    assert {n for n in template.encode(talk).ids if n in marks} <= set(template.encode(
        [{"role": t.role, "content": "a"} for t in talk.turns]
    ).ids)  # fmt: skip


def test_the_names_of_chat_formats_are_those_of_the_run_file():
    assert {"auto", *FORMS, *families.CHATS} == set(Chat.__args__)  # pyright: ignore


@pytest.mark.parametrize("name", ["chatglm2", "glm4", "chatglm"])
def test_a_named_format_on_a_tokenizer_without_its_marks_says_which_are_missing(name: str, tmp_path: Path):
    tiny.tokenizer(tmp_path / "t", special=["<|endoftext|>"])
    with pytest.raises(UserError, match="gMASK"):
        families.open_template(tmp_path / "t", name)


# --- files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize(("form", "shards"), [("safetensors", 3), ("bin", 1), ("bin", 3), ("old", 1), ("old", 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_file_form_gives_the_same_weights(form: str, shards: int, dtype: str, tmp_path: Path):
    kept = getattr(torch, dtype)
    whole = families.load_model(published.glm(tmp_path / "a", "THUDM/chatglm3-6b", dtype="float16"), dtype=kept, device="cpu")
    other = families.load_model(
        published.glm(tmp_path / "b", "THUDM/chatglm3-6b", form=form, shards=shards, dtype="float16"), dtype=kept, device="cpu"
    )
    assert whole.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) and a.dtype == kept for a, b in zip(whole.state_dict().values(), other.state_dict().values()))


def test_a_view_in_a_bin_file_is_read_as_it_was_meant(tmp_path: Path):
    """Rows that lie apart in the file (a transposed tensor, a slice of a bigger one)."""
    folder = published.glm(tmp_path / "m", "THUDM/chatglm2-6b", form="bin")
    content = torch.load(folder / "pytorch_model.bin", weights_only=True)
    want = families.load_model(folder, dtype="fp32", device="cpu").state_dict()
    name = "transformer.encoder.layers.0.self_attention.dense.weight"
    content[name] = content[name].T.contiguous().T
    name = "transformer.output_layer.weight"
    content[name] = torch.cat([torch.zeros(3, content[name].shape[1]), content[name]])[3:]
    torch.save(content, folder / "pytorch_model.bin")
    got = families.load_model(folder, dtype="fp32", device="cpu").state_dict()
    assert all(torch.equal(want[n], got[n]) for n in want)


def edited(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path: Path):
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.encoder.final_layernorm.weight"]
        tensors["transformer.encoder.layers.7.input_layernorm.weight"] = torch.ones(32)
        tensors["transformer.mystery"] = torch.ones(2)
        name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
        tensors[name] = tensors[name][:-4].clone()

    folder = edited(published.glm(tmp_path / "m", "THUDM/chatglm3-6b"), spoil)
    with pytest.raises(UserError) as error:
        families.load_model(folder, device="cpu")
    for part in ("missing model.norm.weight", "unexpected transformer.encoder.layers.7.input_layernorm.weight", "unexpected transformer.mystery",
                 "misshapen transformer.encoder.layers.1.self_attention.query_key_value.weight", "v_proj.weight, wanted [24, 32]"):  # fmt: skip
        assert part in str(error.value)


def test_a_bin_file_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path):
    folder = published.glm(tmp_path / "m", "THUDM/chatglm3-6b", form="bin")
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return Path.write_text, (marker, "ran")

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="never run"):
        families.load_model(folder, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_cut_file_is_told(size: int, form: str, tmp_path: Path):
    folder = published.glm(tmp_path / "m", "THUDM/chatglm2-6b", form=form)
    path = next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="cut short"):
        families.load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rmsnorm", False, "rmsnorm"),
        ("post_layer_norm", False, "post_layer_norm"),
        ("add_bias_linear", True, "add_bias_linear"),
        ("ffn_hidden_size", None, "ffn_hidden_size"),
        ("num_attention_heads", "many", "num_attention_heads"),
    ],
)
def test_settings_that_no_native_class_has_are_told(key: str, value: Any, told: str, tmp_path: Path):
    folder = published.glm(tmp_path / "m", "THUDM/chatglm3-6b")
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, key: value}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        families.load_model(folder, device="cpu")


def test_code_named_by_auto_map_never_runs(tmp_path: Path):
    """Also through the command line and with the marker's file imported nowhere."""
    folder = published.glm(tmp_path / "m", "THUDM/chatglm3-6b")
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", str(folder), "--prompt", "hi", "--max-new-tokens", "2", "--device", "cpu"])
    assert ended.value.code == 0
    assert not (folder / "RAN").exists() and (folder / "modeling_evil.py").is_file()


MEASURE = """
import resource, sys
import glmtune
from glmtune import families
import torch, transformers.models.glm.modeling_glm
families.load_model(sys.argv[1], dtype="fp32", device="cpu")     # everything is imported and warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = families.load_model(sys.argv[2], dtype=sys.argv[3], device="cpu")
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / weights)
"""


@pytest.mark.parametrize(
    ("dtype", "stored", "form"),
    [
        ("bf16", "float16", "safetensors"),
        ("fp32", "float16", "bin"),
        ("bf16", "bfloat16", "bin"),
        ("bf16", "float16", "native"),
    ],
)
@pytest.mark.slow
def test_loading_needs_no_second_copy_of_the_weights(dtype: str, stored: str, form: str, tmp_path: Path):
    """Peak memory above what the process had: at most 1.15 times the weights; also of the native folder that export makes."""
    small = published.glm(tmp_path / "small", "THUDM/chatglm3-6b")
    big = published.big_glm(tmp_path / "big", dtype=stored, form="safetensors" if form == "native" else form, shards=2)
    if form == "native":
        big = export(big, tmp_path / "native", dtype="fp16")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(small), str(big), dtype], capture_output=True, text=True)
    assert float(done.stdout) <= 1.15, done.stderr


def quantise(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """ChatGLM's own quantisation of the blocks' linear layers, number by number (quantization.py of chatglm-6b-int4)."""
    made = {}
    for name, weight in tensors.items():
        if not (name.endswith("weight") and weight.ndim == 2 and ".layers." in name):
            made[name] = weight
            continue
        scale = weight.abs().amax(-1) / (2 ** (bits - 1) - 1)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        if bits == 4:
            rows = [[((int(a) & 15) << 4) | (int(b) & 15) for a, b in zip(row[::2], row[1::2])] for row in rounded.tolist()]
            made[name] = torch.tensor(rows, dtype=torch.uint8).view(torch.int8)
        else:
            made[name] = rounded
        made[name + "_scale"] = scale.half()
    return made


@pytest.mark.few(1)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [published.chatglm1, lambda folder: published.glm(folder, "THUDM/chatglm2-6b")])
def test_published_quantised_weights_are_read(make, bits: int, tmp_path: Path):
    plain = families.load_model(make(tmp_path / "plain"), dtype="fp32", device="cpu")
    folder = make(tmp_path / "packed")
    save_file(quantise(load_file(folder / "model.safetensors"), bits), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    assert families.tensor_shapes(folder) == families.tensor_shapes(tmp_path / "plain")
    packed = families.load_model(folder, dtype="fp32", device="cpu")
    for (name, a), b in zip(plain.state_dict().items(), packed.state_dict().values()):
        step = a.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        # Half a step of the grid, and the rounding of the scale to fp16 (2^-11 of the largest number).
        assert ((a - b).abs() <= 0.501 * step + a.abs().amax() * 2**-11).all(), name
    assert any(not torch.equal(a, b) for a, b in zip(plain.state_dict().values(), packed.state_dict().values()))


def test_four_bit_numbers_by_hand():
    """0x7f holds 7 and -1, 0x80 holds -8 and 0: the high half first, both signed."""
    weight = torch.tensor([[0x7F, -0x80]], dtype=torch.int8)
    assert weights.dequantise(weight, torch.tensor([0.5]), 4).tolist() == [[3.5, -0.5, -4.0, 0.0]]


# --- LoRA's counts at the published sizes -------------------------------------------------------------------------------------


def counted(config: dict[str, Any], options: Lora) -> int:
    config = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    methods.prepare(model, torch.bfloat16)
    methods.attach(model, options, 0)
    return sum(p.numel() for p in methods.trainable(model).values())


def published_config(name: str, **sizes: Any) -> dict[str, Any]:
    """The native config of a published one: ChatGLM3-6B's and GLM-4-9B's config.json, by the model cards."""
    from glmtune.families import chatglm

    config = {
        "_name_or_path": name, "model_type": "chatglm", "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128,
        "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696, "add_qkv_bias": True, "layernorm_epsilon": 1e-5, **sizes,
    }  # fmt: skip
    return chatglm.read(Path("nowhere"), config).config


CHATGLM3 = published_config("THUDM/chatglm3-6b", num_layers=28, padded_vocab_size=65024, seq_length=8192)
GLM4 = published_config("THUDM/glm-4-9b", num_layers=40, padded_vocab_size=151552, seq_length=131072, eos_token_id=[151329])
QKV = ["q_proj", "k_proj", "v_proj"]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("config", "targets", "share", "count"),
    [
        (CHATGLM3, QKV, True, 1_949_696),
        (CHATGLM3, QKV, False, 3_784_704),
        (GLM4, [*QKV, "o_proj", "gate_up_proj", "down_proj"], True, 21_176_320),
    ],
)
def test_trainable_counts_at_the_published_sizes(config, targets, share: bool, count: int):
    assert counted(config, Lora(rank=8, targets=targets, share_a=share)) == count


@pytest.mark.slow
def test_a_shared_a_is_one_matrix_in_training_and_three_equal_ones_in_the_file(made, tmp_path: Path):
    from peft import PeftModel

    folder = made("chatglm3-6b")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(6))
    settings = [
        "optim.steps=3",
        "optim.lr=0.01",
        "method.rank=2",
        "method.share_a=true",
        "method.targets=[query_key_value]",
        "precision=fp32",
    ]
    train(load_run(None, [f"model={folder}", f"data={rows}", f"out={tmp_path / 'out'}", *settings]))
    stored = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert len(stored) == 12  # 2 layers, q k v, A and B: the published name was put into native ones
    for layer in range(2):
        A = [stored[f"base_model.model.model.layers.{layer}.self_attn.{x}_proj.lora_A.weight"] for x in "qkv"]
        assert torch.equal(A[0], A[1]) and torch.equal(A[0], A[2])
    native = export(folder, tmp_path / "native")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = load(tmp_path / "out", dtype="fp32", device="cpu").model(ids).logits
    peft: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(native), tmp_path / "out/adapter")
    assert (peft(ids).logits - ours).abs().max() <= 1e-5


def test_the_gradient_of_a_shared_a_is_the_sum_of_its_parts(tiny_model: Path):
    def gradients(share: bool) -> tuple[Any, dict[str, Tensor]]:
        model = families.load_model(tiny_model, dtype="fp32", device="cpu")
        methods.prepare(model, torch.float32)
        methods.attach(model, Lora(rank=2, targets=QKV, share_a=share), 0)
        for i, layer in enumerate(layer for layer in methods.blocks(model).values() if layer.lora_B is not None):
            nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(i))
            layer.lora_A.data = torch.linspace(-1, 1, layer.lora_A.numel()).view_as(layer.lora_A)
        model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
        return model, {n: p.grad for n, p in methods.trainable(model).items()}

    _, apart = gradients(False)
    _, shared = gradients(True)
    for name, gradient in shared.items():
        if name.endswith("lora_A"):
            parts = [apart[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            assert torch.allclose(gradient, parts[0] + parts[1] + parts[2], atol=1e-6)


# --- what MODEL is --------------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("name", published.FAMILIES)
def test_doctor_says_what_a_folder_is(name: str, made):
    from glmtune import doctor

    found = doctor.model(made(name))
    assert found["LoRA targets"] and found["special tokens"] and found["an answer ends at"]
    if name in ("chatglm3-6b", "glm-4-9b-chat"):
        assert "not fp16" in found["advice"] and "query_key_value = q_proj+k_proj+v_proj" in found["their published names"]
    if "auto_map" in json.loads((made(name) / "config.json").read_text()):
        assert "never run" in found["code in the folder"]


def test_rope_ratio_divides_positions_of_chatglm2_and_multiplies_the_base_of_later_ones(tmp_path: Path):
    for name, rope in (("chatglm2-6b-32k", "linear"), ("chatglm3-6b-32k", "default")):
        folder = published.glm(tmp_path / name, f"THUDM/{name}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_ratio": 50}))
        model = families.load_model(folder, device="cpu")
        cos, _ = model.model.rotary_emb(torch.zeros(1, 1, 4), torch.tensor([[100]]))
        half = 6 // 2  # of the 12 numbers of a head the first 6 are turned
        base, position = (10000.0, 100 / 50) if rope == "linear" else (10000.0 * 50, 100.0)
        want = torch.cos(torch.tensor([position * base ** (-2 * j / 6) for j in range(half)]))
        assert torch.allclose(cos[0, 0, :half], want, atol=1e-6)


def test_tools_and_observations_of_chatglm3_become_the_published_pieces(goldens: Path):
    """build_single_message and build_chat_input of the published tokenizer: header line and content encoded apart, tools as JSON behind
    the system text; a special token in a tool's description stays text."""
    folder = goldens.parent / "tokenizers" / "chatglm3"
    if not folder.is_dir():
        pytest.skip("the published tokenizers are not beside the project")
    template = families.open_template(folder)
    tokens = template.tokens
    tools = [{"name": "get_weather", "description": "天气 <|user|> of a city", "parameters": {"city": {"type": "string"}}}]
    messages = [
        {"role": "system", "content": "Answer with tools.", "tools": tools},
        {"role": "user", "content": "北京天气?"},
        {"role": "assistant", "metadata": "get_weather", "content": " ```python\ntool_call(city='北京')\n```"},
        {"role": "tool", "content": '{"t": 3}\n'},
        {"role": "assistant", "content": "\n3 度。"},
    ]

    def single(role: str, metadata: str, content: str) -> list[int]:
        return [tokens.special[f"<|{role}|>"], *tokens.encode(metadata + "\n"), *tokens.encode(content)]

    want = [tokens.special["[gMASK]"], tokens.special["sop"]]
    want += single("system", "", "Answer with tools." + "\n" + json.dumps(tools, indent=4, ensure_ascii=False))
    want += single("user", "", "北京天气?") + single("assistant", "get_weather", messages[2]["content"])
    want += single("observation", "", '{"t": 3}\n')
    assert template.prompt(messages) == [*want, tokens.special["<|assistant|>"]]
    example = template.encode(messages)
    assert example.ids == want + single("assistant", "", "\n3 度。") + [2]
    learned = [token for token, weight in zip(example.next_ids, example.weights) if weight]
    call = single("assistant", "get_weather", messages[2]["content"])[1:]
    assert learned == [*call, tokens.special["<|observation|>"], *single("assistant", "", "\n3 度。")[1:], 2]


# --- what readers of the change found --------------------------------------------------------------------------------------------


def renamed(folder: Path, target: Path, **config: Any) -> Path:
    """A copy that does not say which model it is."""
    shutil.copytree(folder, target)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        found = json.loads((target / name).read_text())
        found.pop(key, None)
        if name == "config.json":
            found = {**found, **config}
        (target / name).write_text(json.dumps(found))
    return target


def test_a_folder_is_told_by_its_files_before_its_name_and_the_cache_knows_them_apart(made, tmp_path: Path):
    chatglm3 = made("chatglm3-6b")
    two = families.open_template(renamed(chatglm3, tmp_path / "my-chatglm2"))
    three = families.open_template(renamed(chatglm3, tmp_path / "my-chatglm3"))
    assert two.context and not three.context
    stray = renamed(chatglm3, tmp_path / "glm-4-compare", seq_length=8192)
    assert families.family_of(stray).name == "ChatGLM3-6B"  # its tokenizer.model is no tiktoken file
    old = renamed(chatglm3, tmp_path / "a", transformers_version="4.4.0", seq_length=32768)
    assert families.family_of(old).name == "ChatGLM2-6B"
    assert not families.open_template(old, "chatglm3").context  # and the other one can be asked for


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat", "internlm-chat-7b"])
def test_files_of_another_tokenizer_are_refused(name: str, made, tmp_path: Path):
    folder = tmp_path / "m"
    shutil.copytree(made(name), folder)
    other = {"glm-4-9b-chat": "chatglm2-6b"}.get(name, "glm-4-9b-chat")
    shutil.copyfile(made(other) / "tokenizer.model", folder / "tokenizer.model")
    with pytest.raises(UserError):
        families.open_template(folder)
    vocabulary = published.sentencepiece("bpe", 600, normalization_rule_name="identity")
    (folder / "tokenizer.model").write_bytes(vocabulary)
    with pytest.raises(UserError):
        families.open_template(folder)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", published.FAMILIES)
@pytest.mark.parametrize("value", [None, "x", *(pytest.param(odd, marks=pytest.mark.slow) for odd in (0, -1, [], {}))])
def test_a_config_that_makes_no_sense_is_an_error_for_people(name: str, value: Any, made, tmp_path: Path):
    """Each field in turn is missing, or of a wrong kind: the folder loads, or one UserError says what is wrong."""
    config = json.loads((made(name) / "config.json").read_text())
    folder = tmp_path / "m"
    shutil.copytree(made(name), folder)
    keys = [
        key
        for key in config
        if key not in ("auto_map", "_name_or_path", "architectures", "model_type", "transformers_version", "dtype")
    ]
    for key in keys:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with contextlib.suppress(UserError):
            families.load_model(folder, device="meta")


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", '"x"', "{", "nul\x00l"])
def test_a_neighbour_file_that_is_no_object_is_named(file: str, content: str, made, tmp_path: Path):
    folder = tmp_path / "m"
    shutil.copytree(made("baichuan2-7b-chat"), folder)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=file):
        load(folder, device="cpu")


def test_a_damaged_tokenizer_cache_is_made_anew(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path))
    first = families.open_template(made("chatglm3-6b"))
    [kept] = (tmp_path / "tokenizers").iterdir()
    kept.write_text(kept.read_text()[:100])
    assert families.open_template(made("chatglm3-6b")).tokens.json == first.tokens.json


def test_an_empty_turn_of_chatglm3_is_written(made):
    template = families.open_template(made("chatglm3-6b"))
    tokens = template.tokens
    asked = template.prompt([{"role": "system", "content": ""}, {"role": "user", "content": ""}])
    marks = [tokens.special[name] for name in ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>")]
    newline = tokens.encode("\n")
    assert asked == [*marks[:3], *newline, marks[3], *newline, marks[4]]


def test_a_turn_that_a_format_cannot_write_is_told_with_its_place(made):
    template = families.open_template(made("chatglm2-6b"))
    talk = Conversation((Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")), "rows.json:7")
    with pytest.raises(UserError, match="rows.json:7.*no way to write a system turn"):
        template.encode(talk)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat", "internlm2-chat-7b", "qwen2.5"])
def test_the_end_mark_of_an_empty_answer_is_learned(name: str, made):
    template = families.open_template(made(name))
    example = template.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}])
    learned = [token for token, weight in zip(example.next_ids, example.weights) if weight]
    assert learned and learned[-1] in template.stop_ids


def test_the_question_of_chatglm_6b_cannot_be_learned(made):
    with pytest.raises(UserError, match="learn=all"):
        families.open_template(made("chatglm-6b"), learn="everything")


def test_the_first_weeks_config_of_chatglm_6b_is_read(made, tmp_path: Path):
    """It named only <sop> and <eop>; the other marks stand right before them."""
    folder = tmp_path / "m"
    shutil.copytree(made("chatglm-6b-early"), folder)
    config = json.loads((folder / "config.json").read_text())
    want = {key: config.pop(key) for key in ("gmask_token_id", "mask_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    found = families.config_of(folder)
    sp = 1  # in our tiny vocabulary one unused piece more stands between
    assert found["bos_token_id"] - found["gmask_token_id"] == 3 and want["gmask_token_id"] == config["bos_token_id"] - 3 * sp


@pytest.mark.parametrize("where", ["file/x", "link", "."])
def test_an_export_that_has_nowhere_to_go_says_so(where: str, made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    if where == "link":
        assert export(made("chatglm2-6b"), tmp_path / "link").joinpath("config.json").is_file()
        return
    with pytest.raises(UserError):
        export(made("chatglm2-6b"), tmp_path / where if where != "." else Path("../file"))
