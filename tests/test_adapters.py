"""Adapters of other tools: imported, exported back and mixed without a change of what they compute; broken ones are refused."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from glmtune import blend, cli, families, methods
from glmtune.adapters import Adapter, Layer, read
from glmtune.blend import mix
from glmtune.errors import UserError
from glmtune.export import export
from glmtune.importing import export_published, import_adapter
from glmtune.prompts import PROMPTS, trained_form
from glmtune.run import Lora

from . import published, tiny

PUBLISHED = {
    "chatglm-6b": published.chatglm1,
    "chatglm3-6b": lambda folder: published.glm(folder, "THUDM/chatglm3-6b"),
    "internlm2-chat-7b": published.internlm2,
    "baichuan2-7b-chat": published.FAMILIES["baichuan2-7b-chat"],
}
FUSED = {  # a published linear layer that is cut, and one that is not
    "chatglm3-6b": ("query_key_value", "dense_h_to_4h"),
    "internlm2-chat-7b": ("wqkv", "w2"),
    "baichuan2-7b-chat": ("W_pack", "o_proj"),
    "chatglm-6b": ("query_key_value", "dense"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("published") / name) for name, make in PUBLISHED.items()}


@pytest.fixture(scope="module", params=list(PUBLISHED))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def opened(folder: Path, adapter: Path | None = None) -> Any:
    model = families.load_model(folder, dtype=torch.float32, device="cpu")
    methods.prepare(model, torch.float32)
    return model if adapter is None else methods.load(model, adapter)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[11, 45, 200, 30, 31, 32, 99, 7]])
    if "gmask_token_id" in vars(model.config):
        ids = torch.cat([ids, torch.tensor([[model.config.gmask_token_id, model.config.bos_token_id, 12, 13]])], 1)
    return model(ids).logits


def old_adapter(
    folder: Path, base: Path, leaves: tuple[str, ...], rank: int = 4, form: str = "bin", dora: bool = False, **config: Any
) -> Path:
    """An adapter on the published layers, as the older tools left it: random A and B for every layer of these last names."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for key, weight in load_file(base / "model.safetensors").items():
        parts = key.split(".")
        if parts[-1] == "weight" and parts[-2] in leaves and weight.ndim == 2:
            at = "base_model.model." + key.removesuffix(".weight")
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.2
            tensors[f"{at}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.2
            if dora:
                tensors[f"{at}.lora_magnitude_vector"] = weight.float().norm(dim=1) * (
                    0.5 + torch.rand(weight.shape[0], generator=generator)
                )
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none", "target_modules": list(leaves),
        "base_model_name_or_path": "THUDM/x", "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": dora, **config}))
    if form == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: Path, adapter: Path, to: Path) -> Path:
    """The oracle: a published folder whose own weights hold what the adapter of the published layout adds (LoRA, equation 3; DoRA, equation 5)."""
    shutil.copytree(base, to)
    weights = load_file(base / "model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        k.removeprefix("base_model.model."): v for k, v in torch.load(adapter / "adapter_model.bin", weights_only=True).items()
    }
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        A, B = tensors[key], tensors[f"{layer}.lora_B.weight"]
        scaling = config["lora_alpha"] / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        weight = weights[f"{layer}.weight"] + scaling * B @ A
        if f"{layer}.lora_magnitude_vector" in tensors:
            weight = weight * (tensors[f"{layer}.lora_magnitude_vector"] / weight.norm(dim=1)).unsqueeze(1)
        weights[f"{layer}.weight"] = weight
    weights |= {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    save_file(weights, to / "model.safetensors")
    return to


def trained(base: Path, folder: Path, seed: int = 1, **options: Any) -> Path:
    """A native adapter that does something, as our training saves it."""
    model = opened(base)
    methods.attach(model, Lora(**options), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in methods.trainable(model).items():
            if key.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=generator)
    methods.save_adapter(model, folder, Lora(**options), str(base))
    return folder


# --- against the recorded outputs of the published code -------------------------------------------------------------------

GOLDENS = ["chatglm1", "chatglm2", "chatglm3", "glm4"]


def golden_logits(model: Any, folder: Path, wanted: torch.Tensor) -> float:
    """The largest difference from recorded logits of batch b1_pair, where positions count."""
    kept = load_file(folder / "golden.safetensors")
    ids = kept["b1_pair.input_ids"]
    given = {key: kept[f"b1_pair.{key}"] for key in ("attention_mask", "position_ids") if f"b1_pair.{key}" in kept}
    with torch.no_grad():
        found = model(ids, **given).logits
    return float((found - wanted)[kept.get("b1_pair.valid", torch.ones_like(ids)).bool()].abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora_qkv", "lora_all"])
@pytest.mark.parametrize("family", GOLDENS)
def test_an_adapter_of_the_published_layout_gives_the_published_logits_and_comes_back_bit_for_bit(shared, tmp_path, family, kind):
    folder = shared / "goldens" / family
    if not folder.is_dir():
        pytest.skip("the recorded references are not beside the project")
    import_adapter(folder / kind, folder, tmp_path / "native")
    wanted = load_file(folder / kind / "golden.safetensors")["b1_pair.logits"]
    model = opened(folder, tmp_path / "native")
    assert golden_logits(model, folder, wanted) <= 3e-5  # the adapter beside the weights rounds otherwise than within them
    methods.merge(model)  # as the reference was made
    model.set_attn_implementation("eager" if family == "chatglm1" else "sdpa")
    assert golden_logits(model, folder, wanted) <= 1e-5
    export_published(tmp_path / "native", folder, tmp_path / "back")
    old = next(path for path in (folder / kind).iterdir() if path.name.startswith("adapter_model"))
    old = load_file(old) if old.suffix == ".safetensors" else torch.load(old, weights_only=True)
    for back in (
        torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True),
        load_file(tmp_path / "back" / "adapter_model.safetensors"),
    ):
        assert set(back) == set(old) and all(torch.equal(back[key], old[key]) for key in old)
    config, before = (json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / "back", folder / kind))
    assert {k: config[k] for k in ("r", "lora_alpha", "bias")} == {k: before[k] for k in ("r", "lora_alpha", "bias")}
    assert set(config["target_modules"]) == set(before["target_modules"]) and set(config) <= set(before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("family", GOLDENS[:3])
def test_a_published_prefix_gives_the_published_logits_and_comes_back_bit_for_bit(shared, tmp_path, family, number):
    folder = shared / "goldens" / family
    if not folder.is_dir():
        pytest.skip("the recorded references are not beside the project")
    tensors = load_file(folder / f"ptuning_proj{number}.safetensors")
    (tmp_path / "old").mkdir()
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    import_adapter(tmp_path / "old", folder, tmp_path / "native")
    wanted = load_file(folder / "golden.safetensors")[f"ptuning_proj{number}.b1_pair.logits"]
    assert golden_logits(opened(folder, tmp_path / "native"), folder, wanted) <= 3e-5
    export_published(tmp_path / "native", folder, tmp_path / "back")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert set(back) == set(tensors) and all(torch.equal(back[key], tensors[key]) for key in tensors)


# --- import ---------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_imported_adapter_computes_what_it_computed_on_the_published_weights(models, name, dora, tmp_path):
    old = old_adapter(tmp_path / "old", models[name], FUSED[name], dora=dora, use_rslora=dora)
    import_adapter(old, models[name], tmp_path / "new")
    wanted = logits(opened(merged(models[name], old, tmp_path / "merged")))
    assert torch.allclose(logits(opened(models[name], tmp_path / "new")), wanted, atol=3e-5)
    assert (wanted - logits(opened(models[name]))).abs().max() > 0.1  # it does something


def test_ranks_alphas_and_whole_modules_go_to_the_native_names(models, tmp_path):
    base = models["chatglm3-6b"]
    old = old_adapter(tmp_path / "old", base, ("query_key_value", "dense"))
    tensors = torch.load(old / "adapter_model.bin", weights_only=True)
    for key, tensor in tensors.items():
        if "0.self_attention.dense" in key:
            tensors[key] = tensor[:2] if "lora_A" in key else tensor[:, :2]
    tensors["base_model.model.transformer.output_layer.weight"] = torch.randn_like(
        load_file(base / "model.safetensors")["transformer.output_layer.weight"]
    )
    torch.save(tensors, old / "adapter_model.bin")
    config = json.loads((old / "adapter_config.json").read_text())
    config |= {
        "modules_to_save": ["output_layer"],
        "rank_pattern": {"0.self_attention.dense": 2},
        "alpha_pattern": {"0.self_attention.dense": 3},
    }
    (old / "adapter_config.json").write_text(json.dumps(config))
    import_adapter(old, base, tmp_path / "new")
    made = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert made["modules_to_save"] == ["lm_head"] and made["rank_pattern"] == {"model.layers.0.self_attn.o_proj": 2}
    assert made["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    config["lora_alpha"] = 6  # 3 / 2 = 6 / 4: one scaling for all, as the oracle has it
    wanted = logits(opened(merged(base, _scaled(old), tmp_path / "merged")))
    assert torch.allclose(logits(opened(base, tmp_path / "new")), wanted, atol=3e-5)
    export_published(tmp_path / "new", base, tmp_path / "back")  # filled up to one rank, for peft before 0.6
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert back["r"] == 4 and "rank_pattern" not in back and back["modules_to_save"] == ["output_layer"]
    assert torch.allclose(logits(opened(merged(base, tmp_path / "back", tmp_path / "merged2"))), wanted, atol=3e-5)


def _scaled(adapter: Path) -> Path:
    """For the oracle, which knows one alpha / rank per layer's own rank: alpha 6 at rank 4 and 3 at rank 2 are both 1.5."""
    to = adapter.with_name("scaled")
    shutil.copytree(adapter, to)
    tensors = torch.load(to / "adapter_model.bin", weights_only=True)
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        rank = tensors[key].shape[1]
        tensors[key] = tensors[key] * (1.5 / (6 / rank))
    torch.save(tensors, to / "adapter_model.bin")
    return to


def test_an_adapter_on_native_names_is_copied_and_told_so(models, tmp_path):
    base, said = models["chatglm3-6b"], []
    old = trained(base, tmp_path / "old", rank=2)
    import_adapter(old, base, tmp_path / "new", say=said.append)
    assert any("native names already" in text for text in said)
    old_tensors, new = (load_file(at / "adapter_model.safetensors") for at in (old, tmp_path / "new"))
    assert set(old_tensors) == set(new) and all(torch.equal(old_tensors[key], new[key]) for key in new)


def test_names_that_trainers_write_into_pytorch_model_bin_are_read(models, tmp_path):
    base = models["chatglm3-6b"]
    old = old_adapter(tmp_path / "old", base, ("dense",))
    tensors = torch.load(old / "adapter_model.bin", weights_only=True)
    (old / "adapter_model.bin").unlink()
    torch.save({re.sub(r"(lora_[AB])", r"\1.default", key): value for key, value in tensors.items()}, old / "pytorch_model.bin")
    import_adapter(old, base, tmp_path / "new")
    assert set(read(tmp_path / "new").layers) == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}


def test_value_heads_are_left_out_and_said(models, tmp_path):
    base, said = models["chatglm3-6b"], []
    old = old_adapter(tmp_path / "old", base, ("dense",))
    torch.save({"summary.weight": torch.ones(1, 4)}, old / "value_head.bin")
    import_adapter(old, base, tmp_path / "new", say=said.append)
    assert any("value head" in text for text in said) and not (tmp_path / "new" / "value_head.bin").exists()


def test_an_adapter_of_zeros_is_imported_with_a_warning(models, tmp_path):
    old = old_adapter(tmp_path / "old", models["chatglm3-6b"], ("dense",))
    tensors = torch.load(old / "adapter_model.bin", weights_only=True)
    torch.save({key: tensor * ("lora_A" in key) for key, tensor in tensors.items()}, old / "adapter_model.bin")
    said: list[str] = []
    import_adapter(old, models["chatglm3-6b"], tmp_path / "new", say=said.append)
    assert any("this adapter changes nothing" in text for text in said)


# --- bad input --------------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "ran"))


def _break(old: Path, how: str) -> None:
    file, config = old / "adapter_model.bin", json.loads((old / "adapter_config.json").read_text())
    tensors = torch.load(file, weights_only=True)
    if how == "no config":
        (old / "adapter_config.json").unlink()
    elif how == "no weights":
        file.unlink()
    elif how == "rank":
        (old / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    elif how == "kind":
        (old / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ADALORA"}))
    elif how == "broken config":
        (old / "adapter_config.json").write_text('{"r": 4,')
    elif how == "bias":
        (old / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    elif how == "pissa":
        (old / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    elif how == "merged layers":
        (old / "adapter_config.json").write_text(json.dumps({**config, "enable_lora": [True, False, True]}))
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-400])
    elif how == "truncated safetensors":
        save_file(tensors, old / "adapter_model.safetensors")
        whole = (old / "adapter_model.safetensors").read_bytes()
        (old / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "code":
        file.write_bytes(pickle.dumps({"x": Evil(old / "RAN")}, protocol=2))
    elif how == "code in a zip":
        torch.save({"x": Evil(old / "RAN")}, file)
    elif how == "empty":
        torch.save({}, file)
    elif how == "names":
        torch.save({key.replace("dense", "denser"): tensor for key, tensor in tensors.items()}, file)
    elif how == "sizes":
        torch.save({key: torch.cat([tensor, tensor], 1 if "lora_A" in key else 0) for key, tensor in tensors.items()}, file)
    elif how == "fewer layers":
        torch.save({key: tensor for key, tensor in tensors.items() if "layers.0." in key}, file)
    elif how == "half a layer":
        torch.save({key: tensor for key, tensor in tensors.items() if "lora_B" in key}, file)
    elif how == "not finite":
        torch.save({key: tensor / 0 for key, tensor in tensors.items()}, file)
    elif how == "freeze":
        torch.save({"transformer.encoder.layers.1.mlp.dense_h_to_4h.weight": torch.ones(4, 4)}, file)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("how", "told"),
    {
        "no config": "holds no adapter_config.json", "no weights": "it holds none of adapter_model.safetensors", "rank": "has rank 4, its adapter_config.json says 8",
        "kind": "its peft_type is ADALORA", "broken config": "not valid JSON", "bias": "bias is all", "pissa": "also changed the base's weights",
        "merged layers": "enable_lora", "truncated": "cut short", "truncated safetensors": "cut short", "code": "holds code, which is never run",
        "code in a zip": "holds code, which is never run", "empty": "holds no tensors", "names": "no such layer in this model",
        "sizes": r"A \[4, 96\] and B \[64, 4\] do not fit a layer of 48 -> 32", "fewer layers": "layers.1.self_attention.dense: the adapter has no A and B",
        "half a layer": "has no A", "not finite": "not finite", "freeze": "no LoRA tensor",
    }.items(),
)  # fmt: skip
def test_broken_adapters_are_refused_with_the_reason(models, tmp_path, how, told, capsys):
    base = models["chatglm3-6b"]
    old = old_adapter(tmp_path / "old", base, ("dense",))
    _break(old, how)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["import", str(old), "--model", str(base), "--to", str(tmp_path / "new")])
    assert stopped.value.code == 2 and re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "new").exists() and not (old / "RAN").exists() and not list(tmp_path.glob(".*.part"))


def test_an_adapter_of_another_family_is_refused(models, tmp_path):
    old = old_adapter(tmp_path / "old", models["baichuan2-7b-chat"], ("W_pack",))
    with pytest.raises(UserError, match=r"made for another model .* no such layer"):
        import_adapter(old, models["chatglm3-6b"], tmp_path / "new")
    with pytest.raises(UserError, match="--model is missing"):
        import_adapter(old, None, tmp_path / "new")
    head = old_adapter(tmp_path / "head", models["chatglm3-6b"], ("output_layer",))
    with pytest.raises(UserError, match="output_layer: LoRA goes on the linear layers of the blocks"):
        import_adapter(head, models["chatglm3-6b"], tmp_path / "new")
    (tmp_path / "run.txt").write_text("")
    with pytest.raises(UserError, match="is no adapter; wanted its folder"):
        import_adapter(tmp_path / "run.txt", models["chatglm3-6b"], tmp_path / "new")
    with pytest.raises(UserError, match="did you mean 'old'"):
        import_adapter(tmp_path / "odl", models["chatglm3-6b"], tmp_path / "new")


# --- export back ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options", [{}, {"share_a": True}, {"rslora": True}, {"dora": True}], ids=["own A", "share_a", "rslora", "dora"]
)
def test_a_native_adapter_in_the_published_layout_computes_the_same(models, name, options, tmp_path):
    base = models[name]
    adapter = trained(base, tmp_path / "adapter", rank=2, alpha=3, **options)
    export_published(adapter, base, tmp_path / "old")
    wanted = logits(opened(base, adapter))
    assert torch.allclose(logits(opened(merged(base, tmp_path / "old", tmp_path / "merged"))), wanted, atol=3e-5)
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    fused = name != "chatglm-6b" and not options.get("share_a")
    assert config["r"] == (6 if fused else 2)
    import_adapter(tmp_path / "old", base, tmp_path / "again")
    assert torch.allclose(logits(opened(base, tmp_path / "again")), wanted, atol=3e-5)


def test_parts_of_a_fused_layer_that_were_not_trained_stay_as_they_are(models, tmp_path):
    base = models["chatglm3-6b"]
    for options in ({}, {"dora": True}):
        at = tmp_path / str(options.get("dora"))
        adapter = trained(base, at / "adapter", rank=2, targets=["q_proj", "v_proj"], **options)
        export_published(adapter, base, at / "old")
        assert read(at / "old").layers["transformer.encoder.layers.0.self_attention.query_key_value"].rank == 4
        found = logits(opened(merged(base, at / "old", at / "merged")))
        assert torch.allclose(found, logits(opened(base, adapter)), atol=3e-5)


def test_a_model_with_one_layout_is_told_so(tiny_model, tmp_path):
    adapter = trained(tiny_model, tmp_path / "adapter", rank=2)
    with pytest.raises(UserError, match="has one layout only"):
        export_published(adapter, tiny_model, tmp_path / "old")
    with pytest.raises(UserError, match="has no adapter"):
        export_published(None, tiny_model, tmp_path / "old")


# --- README -----------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b"])
def test_the_lines_of_the_readme_work(models, name, tmp_path, capsys):
    base = models[name]
    old = old_adapter(tmp_path / "old", base, FUSED[name])
    import_adapter(old, base, tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    for word in ("NATIVE", "PUBLISHED"):
        text = text.replace(word, str(tmp_path / word))
    text = text.replace("THIS_FOLDER", str(tmp_path / "new"))
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("glmtune ")]
    assert [command[0] for command in commands] == ["chat", "export", "export"]
    for command in commands:
        more = ["--prompt", "hi", "--max-new-tokens", "2", "--device", "cpu"] if command[0] == "chat" else []
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, *more])
        assert stopped.value.code == 0, capsys.readouterr().err
    made: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], made)  # plain PEFT on the native base
    assert torch.allclose(logits(made["model"]), logits(opened(base, tmp_path / "new")), atol=3e-5)
    assert torch.allclose(logits(opened(merged(base, tmp_path / "PUBLISHED", tmp_path / "m"))), logits(made["model"]), atol=3e-5)


# --- prompts: ids as the older programs built them ----------------------------------------------------------------------------

ASK = [{"role": "user", "content": "今天 the cat?"}]


@pytest.fixture(scope="module")
def glm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.glm(tmp_path_factory.mktemp("glm2") / "chatglm2-6b", "THUDM/chatglm2-6b")


def pieces(folder: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(next(folder.glob("*.model"))))


@pytest.mark.parametrize("project", ["llm-tuning", "chatglm_tuning"])
def test_bare_questions(glm2, models, project):
    """LLM-Tuning: tokenizer.encode(prompt) + tokenizer.encode(target, add_special_tokens=False) + [eos]."""
    for base in (glm2, models["chatglm3-6b"]):
        template, sp = trained_form(base, project), pieces(base)
        start = [template.tokens.special["[gMASK]"], template.tokens.special["sop"]]
        assert template.prompt(ASK) == start + sp.encode(ASK[0]["content"])
        ids = template.encode([*ASK, {"role": "assistant", "content": "The mat"}]).ids
        assert ids == start + sp.encode(ASK[0]["content"]) + sp.encode("The mat") + [2]
    base = models["chatglm-6b"]  # build_inputs_with_special_tokens: q + [gMASK, sop] + a + [eop]
    template = trained_form(base, project)
    marks = template.tokens.special
    asked = template.tokens.encode(ASK[0]["content"])
    assert template.prompt(ASK) == [*asked, marks["[gMASK]"], marks["<sop>"]]
    baichuan = trained_form(models["baichuan2-7b-chat"], project)  # no marks at all
    assert baichuan.prompt(ASK) == pieces(models["baichuan2-7b-chat"]).encode(ASK[0]["content"])


def test_role_marks_as_plain_text(models):
    """self-llm, ChatGLM3: one string, in which the tokenizer knows no marks; GLM-4: marks as ids, a newline behind the last."""
    base = models["chatglm3-6b"]
    template, sp = trained_form(base, "self-llm"), pieces(base)
    text = f"<|system|>\n现在你要扮演皇帝身边的女人--甄嬛\n<|user|>\n{ASK[0]['content']}<|assistant|>\n"
    start = [template.tokens.special["[gMASK]"], template.tokens.special["sop"]]
    asked = [{"role": "system", "content": "现在你要扮演皇帝身边的女人--甄嬛"}, *ASK]
    assert template.prompt(asked) == start + sp.encode(text)
    assert template.encode([*asked, {"role": "assistant", "content": "嗯"}]).ids == start + sp.encode(text) + sp.encode("嗯") + [2]
    assert template.stop_ids == [2]


@pytest.mark.slow
def test_role_marks_as_plain_text_with_the_real_tokenizer(shared):
    """The ids of ChatGLM3's own file: [gMASK] 64790, sop 64792; the mark's id 64795 is not among them."""
    base = shared / "tokenizers" / "chatglm3"
    if not base.is_dir():
        pytest.skip("the published tokenizer is not beside the project")
    template = trained_form(base, "self-llm")
    text = "<|user|>\n你是谁？<|assistant|>\n"
    assert template.prompt([{"role": "user", "content": "你是谁？"}]) == [64790, 64792, *pieces(base).encode(text)]
    asked = trained_form(base, "llm-tuning").prompt([{"role": "user", "content": "你是谁？"}])
    assert asked == [64790, 64792, *pieces(base).encode("你是谁？")]


def test_role_marks_of_glm4_are_ids(tmp_path):
    template = trained_form(published.FAMILIES["glm-4-9b-chat"](tmp_path / "glm-4-9b-chat"), "self-llm")
    marks, encode = template.tokens.special, template.tokens.encode
    wanted = [
        marks["[gMASK]"],
        marks["<sop>"],
        marks["<|system|>"],
        *encode("\nS"),
        marks["<|user|>"],
        *encode("\nq"),
        marks["<|assistant|>"],
    ]
    assert template.prompt([{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]) == [*wanted, *encode("\n")]


def test_rounds_from_one_also_on_chatglm_6b(glm2, models):
    """ChatGLM-Efficient-Tuning: [Round 1] on both; on ChatGLM-6B the marks stand behind."""
    text = f"[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：{ASK[0]['content']}\n\n答："
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *ASK]
    for base, behind in ((glm2, False), (models["chatglm-6b"], True)):
        template = trained_form(base, "chatglm-efficient-tuning")
        special = template.tokens.special
        marks = [special["[gMASK]"], special.get("sop", special.get("<sop>"))]
        asked = template.tokens.encode(text) if behind else pieces(base).encode(text)
        assert template.prompt(turns) == ([*asked, *marks] if behind else [*marks, *asked])
    one = trained_form(models["chatglm-6b"], "chatglm-efficient-tuning")
    assert one.tokens.decode(one.prompt(ASK)).lstrip().startswith("[Round 1]")


def test_headings_and_double_marks_of_the_chatglm2_trainer(glm2):
    """ChatGLM2-LoRA-Trainer: one string with headings (5d9b5ae); later encode(context) + encode(target) + [eos], each with its marks."""
    sp, question = pieces(glm2), ASK[0]["content"]
    template = trained_form(glm2, "chatglm2-lora-trainer-alpaca")
    start = [template.tokens.special["[gMASK]"], template.tokens.special["sop"]]
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction: \n{question}\n\n### Answer: \n"
    )
    assert template.prompt(ASK) == start + sp.encode(text)
    answered = [*ASK, {"role": "assistant", "content": "The mat"}]
    assert template.encode(answered).ids == start + sp.encode(text + "The mat") + [2]
    later = trained_form(glm2, "chatglm2-lora-trainer")
    assert later.prompt(ASK) == start + sp.encode(question) + start
    assert later.encode(answered).ids == start + sp.encode(question) + start + sp.encode("The mat") + [2]


def test_llama_factory_trained_on_the_models_own_format(models):
    for base in models.values():
        assert trained_form(base, "llama-factory").prompt(ASK) == families.open_template(base).prompt(ASK)


@pytest.mark.few(2)
@pytest.mark.parametrize("project", list(PROMPTS))
def test_the_saved_folder_asks_as_the_form_does(models, project, tmp_path):
    """What `glmtune chat --adapter` reads back is what was meant, ids and ends."""
    base = models["chatglm3-6b"]
    import_adapter(old_adapter(tmp_path / "old", base, ("dense",)), base, tmp_path / "new", prompt=project)
    kept, meant = families.open_template(tmp_path / "new"), trained_form(base, project)
    answered = [*ASK, {"role": "assistant", "content": "The mat"}]
    assert kept.prompt(ASK) == meant.prompt(ASK) and kept.encode(answered).ids == meant.encode(answered).ids
    assert kept.stop_ids == meant.stop_ids
    assert PROMPTS[project] in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("sign", "project"),
    [
        ("finetuning_args.json", "chatglm-efficient-tuning"),
        ("training_args.yaml", "llama-factory"),
        ("README.md", "llama-factory"),
        ("query_value_key", "chatglm2-lora-trainer"),
        ("output/ChatGLM/checkpoint-900", "self-llm"),
        ("", ""),
    ],
)
def test_who_trained_it_is_recognised_and_said(models, tmp_path, sign, project):
    base, said = models["chatglm3-6b"], []
    where = tmp_path / (sign if "/" in sign else "old")
    more: dict[str, Any] = {"target_modules": ["query_value_key", "dense"]} if sign == "query_value_key" else {}
    old = old_adapter(where, base, ("dense",), **more)
    if "." in sign:
        (old / sign).write_text("tags:\n- llama-factory\n")
    import_adapter(old, base, tmp_path / "new", say=said.append)
    told = next(text for text in said if text.startswith("chat format"))
    assert PROMPTS[project] in told and "told by" in told if project else "nothing tells" in told and "--prompt" in told


def test_unknown_prompts_get_a_suggestion(models, tmp_path):
    with pytest.raises(UserError, match="did you mean 'self-llm'"):
        trained_form(models["chatglm3-6b"], "self-lm")
    with pytest.raises(UserError, match="did not train ChatGLM-6B"):
        trained_form(models["chatglm-6b"], "self-llm")


# --- mix --------------------------------------------------------------------------------------------------------------------


def update(layer: Layer) -> torch.Tensor:
    return layer.scaling * layer.B @ layer.A


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """Different ranks, alphas and layers."""
    folder = tmp_path_factory.mktemp("two")
    return (
        trained(tiny_model, folder / "a", seed=1, rank=2, alpha=8),
        trained(tiny_model, folder / "b", seed=2, rank=4, alpha=4, targets=["q_proj", "down_proj"]),
    )


def weighted(a: Adapter, b: Adapter, wa: float, wb: float) -> dict[str, torch.Tensor]:
    """The weighted sum of the updates, layer by layer; one that has no such layer adds nothing."""
    found = {name: wa * update(layer) for name, layer in a.layers.items()}
    for name, layer in b.layers.items():
        found[name] = found.get(name, 0) + wb * update(layer)
    return found


def test_cat_is_the_weighted_sum_exactly(two, tiny_model, tmp_path):
    a, b = two
    mix([(a, 0.7), (b, -0.3)], tmp_path / "c", model=tiny_model)
    made = read(tmp_path / "c")
    for name, wanted in weighted(read(a), read(b), 0.7, -0.3).items():
        assert torch.allclose(update(made.layers[name]), wanted, atol=1e-7)
    assert {layer.rank for layer in made.layers.values()} == {2, 6}
    model = opened(tiny_model)  # and so is its function: weights that hold the sum give the same logits
    for name, wanted in weighted(read(a), read(b), 0.7, -0.3).items():
        model.get_submodule(name).weight.data += wanted
    assert torch.allclose(logits(opened(tiny_model, tmp_path / "c")), logits(model), atol=1e-5)


def test_svd_is_the_nearest_of_its_rank_and_tells_what_is_kept(two, tmp_path):
    a, b = two
    said: list[str] = []
    mix([(a, 0.5), (b, 0.5)], tmp_path / "c", how="svd", rank=3, say=said.append)
    made, kept, total = read(tmp_path / "c"), 0.0, 0.0
    for name, wanted in weighted(read(a), read(b), 0.5, 0.5).items():
        values = torch.linalg.svdvals(wanted.double())
        missed = (update(made.layers[name]) - wanted).norm()
        assert float(missed) == pytest.approx(float(values[3:].norm()), abs=1e-5)  # Eckart and Young
        kept, total = kept + float(values[:3].square().sum()), total + float(values.square().sum())
    assert 0.5 < kept / total < 1 and any(f"{kept / total:.2%} of the weighted sum's energy" in text for text in said)


@pytest.fixture(scope="module")
def with_peft(tiny_model, tmp_path_factory) -> tuple[Any, Path, Path]:
    """The independent implementation: two adapters of equal rank in one PEFT model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("peft")
    a, b = (trained(tiny_model, folder / x, seed=i, rank=4, targets=["q_proj", "up_proj"]) for i, x in enumerate("ab"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    return model, a, b


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("how", "theirs", "more"),
    [
        ("cat", "cat", {}),
        ("linear", "linear", {}),
        ("svd", "svd", {"rank": 3}),
        ("ties", "ties_svd", {"rank": 5, "density": 0.4}),
        ("dare", "dare_linear_svd", {"rank": 5, "density": 1.0}),  # nothing dropped: theirs draws from another generator
    ],
)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_a_mix_is_what_peft_makes_of_it(with_peft, how, theirs, more, weights, tmp_path):
    model, a, b = with_peft
    mix([(a, weights[0]), (b, weights[1])], tmp_path / "c", how=how, **more)
    model.add_weighted_adapter(
        ["a", "b"], list(weights), tmp_path.name, combination_type=theirs, svd_rank=more.get("rank"), density=more.get("density")
    )
    for name, layer in read(tmp_path / "c").layers.items():
        wanted = model.base_model.model.get_submodule(name).get_delta_weight(tmp_path.name)
        assert torch.allclose(update(layer), wanted.detach(), atol=2e-6), name


def test_wide_updates_are_cut_by_random_projection_nearly_as_well(with_peft, tmp_path, monkeypatch):
    _, a, b = with_peft
    mix([(a, 0.7), (b, 0.3)], tmp_path / "exact", how="ties", rank=4, density=0.2)
    monkeypatch.setattr(blend, "WIDE", 0)
    mix([(a, 0.7), (b, 0.3)], tmp_path / "near", how="ties", rank=4, density=0.2)
    exact, near = read(tmp_path / "exact"), read(tmp_path / "near")
    for name, layer in exact.layers.items():
        assert float(update(near.layers[name]).norm() / update(layer).norm()) == pytest.approx(1, abs=1e-3)


def test_linear_says_that_it_is_not_the_weighted_sum(with_peft, tmp_path):
    _, a, b = with_peft
    said: list[str] = []
    mix([(a, 0.5), (b, 0.5)], tmp_path / "c", how="linear", say=said.append)
    wanted, made = weighted(read(a), read(b), 0.5, 0.5), read(tmp_path / "c")
    missed = sum(float((update(made.layers[n]) - w).square().sum()) for n, w in wanted.items())
    share = math.sqrt(missed / sum(float(w.square().sum()) for w in wanted.values()))
    assert share > 0.1 and any(f"{share:.0%} away from the weighted sum" in text for text in said)


def test_dare_keeps_the_mean_and_repeats(with_peft, tmp_path):
    _, a, b = with_peft
    for to, seed in (("c", 0), ("d", 0), ("e", 1)):
        mix(
            [(a, 0.7), (b, 0.3)], tmp_path / to, how="dare", rank=32, density=0.5, seed=seed
        )  # full rank: nothing is lost behind it
    c, d, e = (read(tmp_path / to) for to in "cde")
    wanted, name = weighted(read(a), read(b), 0.7, 0.3), "model.layers.0.mlp.up_proj"
    assert torch.equal(update(c.layers[name]), update(d.layers[name])) and not torch.equal(c.layers[name].A, e.layers[name].A)
    found = update(c.layers[name])
    # Mean slope of the result on the weighted sum is 1: 48 x 32 numbers, each with the deviation of a halved-or-doubled one.
    assert float((found * wanted[name]).sum() / wanted[name].square().sum()) == pytest.approx(1, abs=0.2)


def test_mixes_that_make_no_sense_are_refused(two, tiny_model, models, tmp_path):
    a, b = two
    other = trained(tiny.llama(tmp_path / "wide", hidden_size=64), tmp_path / "other", rank=2)
    glm = old_adapter(tmp_path / "glm", models["chatglm3-6b"], ("dense",))
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    dora = trained(tiny_model, tmp_path / "dora", rank=2, dora=True)
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([(a, 1.0), (tmp_path / "prefix", 1.0)], {}, "different kinds cannot be added up"),
        ([(a, 1.0), (other, 1.0)], {}, "made for different models"),
        ([(a, 1.0), (glm, 1.0)], {}, "made for different models"),
        ([(glm, 1.0)], {"model": tiny_model}, "made for another model"),
        ([(a, 1.0), (dora, 1.0)], {}, "DoRA"),
        ([(a, 1.0), (b, 1.0)], {"how": "linear"}, "needs equal ranks"),
        ([(a, 1.0)], {"how": "tise"}, "did you mean 'ties'"),
        ([(a, 1.0)], {"rank": 4}, "with cat it follows"),
        ([(a, 1.0)], {"how": "svd", "density": 0.5}, "with ties or dare"),
        ([(a, math.nan)], {}, "finite number"),
        ([(a.with_name("aa"), 1.0)], {}, "did you mean 'a'"),
        ([], {}, "nothing to mix"),
    ]
    for parts, more, told in cases:
        with pytest.raises(UserError, match=told):
            mix(parts, tmp_path / "c", **more)
    assert not (tmp_path / "c").exists()


def test_the_command_mixes_and_the_result_opens(two, tiny_model, tmp_path, capsys):
    a, b = two
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["mix", f"{a}=0.7", f"{b}=0.3", "--to", str(tmp_path / "c"), "--how", "svd", "--rank", "4", "--model", str(tiny_model)]
        )
    assert stopped.value.code == 0 and "energy kept" in capsys.readouterr().err
    opened(tiny_model, tmp_path / "c")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["mix", str(a), "--to", str(tmp_path / "d")])
    assert stopped.value.code == 2 and "wanted ADAPTER=WEIGHT" in capsys.readouterr().err


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["truncated", "published", "another", "bin"])
def test_an_adapter_that_is_left_unmerged_is_looked_at(models, tmp_path, how):
    """What is written beside the base opens there, or nothing is written."""
    base = models["chatglm3-6b"]
    old = old_adapter(tmp_path / "old", base, ("query_key_value",))
    adapter = import_adapter(old, base, tmp_path / "native")
    if how == "truncated":
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "bin":
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    given = old if how == "published" else adapter
    onto = models["baichuan2-7b-chat"] if how == "another" else base
    if how == "bin":
        made = export(onto, tmp_path / "out", adapter=given, unmerged=True, dtype="fp32")
        want, got = logits(opened(onto, given)), logits(opened(made, made / "adapter"))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        return
    with pytest.raises(UserError, match={"truncated": "cut short", "published": "glmtune import"}.get(how, "another model")):
        export(onto, tmp_path / "out", adapter=given, unmerged=True)
    assert not (tmp_path / "out").exists()


def test_a_layer_of_alpha_zero_is_exported_back(models, tmp_path):
    base = models["chatglm3-6b"]
    old = old_adapter(tmp_path / "old", base, ("dense_4h_to_h", "dense"), alpha_pattern={"dense_4h_to_h": 0})
    back = export_published(import_adapter(old, base, tmp_path / "new"), base, tmp_path / "back")
    again = import_adapter(back, base, tmp_path / "again")
    torch.testing.assert_close(logits(opened(base, again)), logits(opened(base, tmp_path / "new")), rtol=0, atol=1e-5)


# --- prefixes of every kind -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(glm2) -> int:
    """Numbers that a token of a prefix has on the tiny ChatGLM2."""
    return families.prefix_parameters(glm2, 1, False)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["published", "ours", "PEFT's", "a lone file"])
def test_a_prefix_that_is_not_finite_is_refused_by_its_tensors_name(glm2, wide, tmp_path, capsys, kind, form):
    tensor = torch.randn(8, wide)
    tensor[3, 1] = kind
    (tmp_path / "p").mkdir()
    name = {"ours": "prefix_encoder.embedding.weight", "PEFT's": "prompt_embeddings"}.get(
        form, "transformer.prefix_encoder.embedding.weight"
    )
    old = tmp_path / "p"
    if form in ("published", "a lone file"):
        torch.save({name: tensor}, old / "pytorch_model.bin")
        old = old / "pytorch_model.bin" if form == "a lone file" else old
    else:
        save_file({name: tensor}, old / "adapter_model.safetensors")
        (old / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["import", str(old), "--model", str(glm2), "--to", str(tmp_path / "to")])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and name in told and "not finite" in told and "Traceback" not in told
    assert not (tmp_path / "to").exists()


@pytest.mark.few(1)
@pytest.mark.parametrize("front", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod."])
def test_what_a_trainer_put_before_the_names_of_a_prefix_is_taken_off(glm2, wide, tmp_path, front):
    made = torch.randn(8, wide)
    for name, first in (("plain", ""), ("wrapped", front)):
        (tmp_path / name).mkdir()
        torch.save({f"{first}transformer.prefix_encoder.embedding.weight": made}, tmp_path / name / "pytorch_model.bin")
        import_adapter(tmp_path / name, glm2, tmp_path / f"{name}-to")
    assert torch.equal(logits(opened(glm2, tmp_path / "plain-to")), logits(opened(glm2, tmp_path / "wrapped-to")))


def test_names_that_are_no_prefix_are_told(glm2, tmp_path):
    torch.save({"encoder.prefix.weight": torch.ones(8, 4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin holds encoder.prefix.weight"):
        import_adapter(tmp_path, glm2, tmp_path / "to")


@pytest.mark.few(1)
@pytest.mark.parametrize("model", ["given", "from the config"])
def test_a_prefix_of_peft_is_imported_with_its_function(tmp_path, model):
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny.llama(tmp_path / "base")
    torch.manual_seed(4)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    to = import_adapter(tmp_path / "theirs", base if model == "given" else None, tmp_path / "to")
    assert torch.equal(logits(opened(base, to)), logits(opened(base, tmp_path / "theirs")))
    with torch.no_grad():
        ids = torch.tensor([[11, 45, 200, 30, 31, 32, 99, 7]])
        torch.testing.assert_close(opened(base, to)(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=3e-5)


# --- mixes of different bases ------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("told", ["by fingerprints", "by names", "one base under two names", "one base"])
def test_a_mix_of_adapters_of_different_bases_is_told(tmp_path, told):
    one, other = tiny.llama(tmp_path / "one"), tiny.llama(tmp_path / "other", seed=1)
    shutil.copytree(one, tmp_path / "copy")
    for name, base in (
        ("a", one),
        ("b", {"by fingerprints": other, "by names": other, "one base": one}.get(told, tmp_path / "copy")),
    ):
        model = opened(base)
        methods.attach(model, Lora(rank=2), 1)
        mark = None if told == "by names" else families.fingerprint(base)
        methods.save_adapter(model, tmp_path / name, Lora(rank=2), str(base), mark)
    said: list[str] = []
    mix([(tmp_path / "a", 0.5), (tmp_path / "b", 0.5)], tmp_path / "to", say=said.append)
    warned = any(text.startswith("warning: the adapters were trained on different bases") for text in said)
    assert warned is (told in ("by fingerprints", "by names"))
    assert (families.trained_on(tmp_path / "to") is not None) is told.startswith("one base")
