"""The methods' laws: nothing changes before step one, only named parameters learn, what is saved is what comes back."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmtune import families, methods
from glmtune import tensors as tensors_module
from glmtune.errors import UserError
from glmtune.run import Full, Lora, load_run
from glmtune.training import train

from . import tiny

IDS = torch.tensor([[11, 45, 200, 30, 31, 32, 99, 7]])
LEAVES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def prepared(folder: Path, compute: torch.dtype = torch.float32) -> Any:
    model = families.load_model(folder, dtype=compute)
    methods.prepare(model, compute)
    return model


def with_lora(folder: Path, seed: int = 1, **options: Any) -> Any:
    """A prepared model with an adapter that does something: B is random, not zero."""
    model = prepared(folder)
    methods.attach(model, Lora(**options), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in methods.trainable(model).items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def saved(tiny_model, tmp_path) -> Path:
    """An adapter folder of rank 4 on every linear layer of the blocks."""
    folder = tmp_path / "adapter"
    methods.save_adapter(with_lora(tiny_model, rank=4), folder, Lora(rank=4), str(tiny_model))
    return folder


# --- attach -------------------------------------------------------------------------------------------------------------


def test_the_prepared_model_computes_what_transformers_computes(tiny_model):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(logits(prepared(tiny_model)), logits(theirs))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_lora_changes_nothing_before_the_first_step(tiny_model, compute):
    model = prepared(tiny_model, compute)
    before = logits(model)
    methods.attach(model, Lora(rank=4), seed=0)
    assert torch.equal(logits(model), before)


def test_the_update_is_scaled_by_alpha_over_rank(tiny_model):
    """By hand on one layer: y = x W^T + (alpha / rank) (x A^T) B^T."""
    layer = methods.blocks(with_lora(tiny_model, rank=2, alpha=6))["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.weight.T + 3 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_the_seed_decides_where_an_adapter_starts(tiny_model):
    starts = []
    for seed in (0, 0, 1):
        model = prepared(tiny_model)
        methods.attach(model, Lora(rank=4), seed)
        starts.append(methods.adapter_tensors(model))
    same = [all(torch.equal(starts[0][n], other[n]) for n in other) for other in starts[1:]]
    assert same == [True, False]


def test_only_named_parameters_get_gradients(tiny_model):
    model = prepared(tiny_model)
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    methods.attach(model, Lora(rank=4, targets=["q_proj", "down_proj"]), seed=0)
    model(IDS).logits.sum().backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == set(methods.trainable(model))
    wanted = {f"model.layers.{i}.{n}.lora_{m}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj") for m in "AB"}
    assert graded == wanted
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


def test_full_tuning_gives_every_weight_a_gradient_in_fp32(tiny_model):
    model = prepared(tiny_model, torch.bfloat16)
    methods.attach(model, Full(), seed=0)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_disabled_is_the_base_and_ends_by_itself(tiny_model):
    base, model = logits(prepared(tiny_model)), with_lora(tiny_model)
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    with methods.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ZeroDivisionError), methods.disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), adapted)


# --- targets ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (None, 14),
        (["q_proj"], 2),
        (["self_attn.v_proj", "mlp.up_proj"], 4),
        (["model.layers.1.mlp.down_proj"], 1),
        (["1.mlp.down_proj"], 1),
        ([r".*layers\.0\..*"], 7),
        ([r".*\.(q|k)_proj"], 4),
        (["q_proj", r".*\.q_proj"], 2),
    ],
)
def test_targets_by_last_name_dotted_end_or_pattern(tiny_model, targets, count):
    model = prepared(tiny_model)
    methods.attach(model, Lora(rank=2, targets=targets), seed=0)
    assert sum(layer.lora_A is not None for layer in methods.blocks(model).values()) == count
    assert len(families.pick_targets(targets, families.linear_names(tiny_model))) == count  # as the plan sees it, without a model


def test_the_head_and_the_embedding_are_no_targets(tiny_model):
    assert {name.split(".")[-1] for name in methods.blocks(prepared(tiny_model))} == set(LEAVES)
    assert {name.split(".")[-1] for name in families.linear_names(tiny_model)} == set(LEAVES)


@pytest.mark.few(2)
@pytest.mark.parametrize("target", ["query_key_value", "q_porj", "proj", "lm_head", "(", ""])
def test_a_target_that_matches_nothing_lists_the_names(tiny_model, target):
    with pytest.raises(UserError) as error:
        methods.attach(prepared(tiny_model), Lora(targets=["v_proj", target]), seed=0)
    said = str(error.value)
    assert f"'{target}' matches no Linear layer" in said and str(LEAVES) in said
    assert ("did you mean 'q_proj'?" in said) == (target == "q_porj")


def test_an_empty_list_of_targets_is_refused(tiny_model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    run = load_run(None, [f"model={tiny_model}", f"data={rows}", f"out={tmp_path / 'a'}", "method.targets=[]", "samples=[]"])
    with pytest.raises(UserError, match="targets"):
        train(run)


# --- precision ----------------------------------------------------------------------------------------------------------


def test_products_run_in_bf16_and_sums_in_fp32(tiny_model):
    model = prepared(tiny_model, torch.bfloat16)
    methods.attach(model, Lora(rank=4), seed=0)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in methods.blocks(model).values())
    assert all(parameter.dtype == torch.float32 for parameter in methods.trainable(model).values())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "norm" in n)
    with torch.no_grad():
        out = model.model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and all(hidden.dtype == torch.float32 for hidden in out.hidden_states)
    assert logits(model).dtype == torch.float32


def test_a_small_update_is_not_rounded_away_in_bf16(tiny_model):
    """B of 1e-5 moves an fp32 sum; beside bf16 activations of size 1 (8 bits) it would be lost."""
    model = prepared(tiny_model, torch.bfloat16)
    methods.attach(model, Lora(rank=4), seed=0)
    layer = methods.blocks(model)["model.layers.0.self_attn.q_proj"]
    x = torch.ones(1, layer.in_features)
    before = layer(x)
    with torch.no_grad():
        layer.lora_B.fill_(1e-5)
    moved = layer(x) - before
    expected = 4 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(moved, expected, rtol=0.05, atol=2e-7)
    assert (moved.abs() > 0).any()


# --- save and load ------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_bit_identical(tiny_model, tmp_path):
    model = with_lora(tiny_model, rank=3, alpha=5, targets=["q_proj", "1.mlp.down_proj"])
    methods.save_adapter(model, tmp_path / "a", Lora(rank=3, alpha=5, targets=["q_proj", "1.mlp.down_proj"]), str(tiny_model))
    loaded = methods.load(prepared(tiny_model), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    ours, theirs = methods.adapter_tensors(model), methods.adapter_tensors(loaded)
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not methods.trainable(loaded)
    methods.save_adapter(model, tmp_path / "b", Lora(rank=3, alpha=5), str(tiny_model))
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_load_takes_a_plain_transformers_model(tiny_model, saved):
    plain = families.load_model(tiny_model, dtype=torch.float32)
    assert torch.equal(logits(methods.load(plain, saved)), logits(methods.load(prepared(tiny_model), saved)))


def test_an_adapter_of_peft_loads_and_gives_the_same_logits(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 3},
        init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), options).eval()
    theirs.save_pretrained(tmp_path)
    assert torch.equal(logits(methods.load(prepared(tiny_model), tmp_path)), logits(theirs))


def change(folder: Path, edit) -> Path:
    """Edits the tensors of an adapter folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def refused(tiny_model: Path, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        methods.load(prepared(tiny_model), folder)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def test_what_is_wrong_with_several_layers_is_told_in_one_error(tiny_model, saved):
    def misshape(tensors):
        for name in (Q0, Q1):
            tensors[f"{name}.lora_A.weight"] = torch.zeros(4, 7)

    def halve(tensors):
        del tensors[f"{Q0}.lora_B.weight"], tensors[f"{Q1}.lora_A.weight"]

    said = refused(tiny_model, change(saved, misshape))
    for layer in (0, 1):
        assert f"layers.{layer}.self_attn.q_proj: A [4, 7] and B [32, 4] do not fit a layer of 32 -> 32" in said
    said = refused(tiny_model, change(saved, halve))
    assert "layers.0.self_attn.q_proj has no B" in said and "layers.1.self_attn.q_proj has no A" in said


def test_a_refused_adapter_leaves_the_model_as_it_was(tiny_model, saved, tmp_path):
    model = methods.load(prepared(tiny_model), shutil.copytree(saved, tmp_path / "good"))
    before = logits(model)
    change(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.zeros(4, 7)}))
    for text in (None, "{"):
        if text is not None:
            (saved / "adapter_config.json").write_text(text)
        with pytest.raises(UserError):
            methods.load(model, saved)
        assert torch.equal(logits(model), before)


def test_a_file_of_names_without_dots_is_told(tiny_model, saved):
    assert "weight is no LoRA tensor" in refused(
        tiny_model, change(saved, lambda tensors: tensors.update({"weight": torch.ones(3)}))
    )


def test_an_adapter_in_a_bin_file_is_read_without_running_code(tiny_model, saved):
    expected = logits(methods.load(prepared(tiny_model), saved))
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    assert torch.equal(logits(methods.load(prepared(tiny_model), saved)), expected)


def test_an_adapter_of_another_model_is_told_with_its_base(tmp_path, tiny_model):
    other = tiny.llama(tmp_path / "wide", hidden_size=64, num_hidden_layers=3)
    methods.save_adapter(with_lora(other), tmp_path / "adapter", Lora(), "their/wide-model")
    said = refused(tiny_model, tmp_path / "adapter")
    assert "was made for another model (their/wide-model)" in said
    assert "do not fit" in said and "and 18 more" in said


def test_tensors_that_are_no_lora_are_told(tiny_model, saved):
    said = refused(tiny_model, change(saved, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)})))
    assert "model.norm.weight" in said


def test_an_adapter_without_some_of_its_layers_is_refused(tiny_model, saved):
    """adapter_config.json names q_proj (in both blocks); a file with that of one block only is partial."""

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(Q1)]:
            del tensors[name]

    assert "layers.1.self_attn.q_proj" in refused(tiny_model, change(saved, edit))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_are_no_ordinary_numbers_are_refused(tiny_model, saved, kind):
    assert "an adapter's tensors are" in refused(
        tiny_model, change(saved, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32).to(kind)}))
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("saved_modules", [["embed_tokens"], ["lm_head"], ["norm"], ["mlp"]])
def test_whole_modules_of_peft_are_loaded_or_refused(tmp_path, saved_modules):
    """Of tied weights PEFT trains one side apart: then it is refused; everything else gives PEFT's logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for tied in (True, False):
        base = tiny.llama(tmp_path / f"base{tied}", tie_word_embeddings=tied)
        options = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved_modules, init_lora_weights=False)
        theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), options).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "modules_to_save" in name:
                    parameter += torch.randn(parameter.shape) * 0.1
        theirs.save_pretrained(tmp_path / f"a{tied}")
        if tied and saved_modules[0] in ("embed_tokens", "lm_head"):
            assert "are tied" in refused(base, tmp_path / f"a{tied}")
        else:
            torch.testing.assert_close(
                logits(methods.load(prepared(base), tmp_path / f"a{tied}")), logits(theirs), rtol=0, atol=2e-5
            )


def test_a_refused_prefix_leaves_the_one_that_is_on(tiny_model, tmp_path):
    from glmtune import prefix
    from glmtune.run import Prefix

    model = prepared(tiny_model).requires_grad_(False)
    prefix.attach(model, 5)
    methods.save_adapter(model, tmp_path / "good", Prefix(num_virtual_tokens=5), str(tiny_model))
    before = logits(methods.load(model, tmp_path / "good"))
    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    for changed in ({"num_virtual_tokens": 9}, {"num_virtual_tokens": "x"}):
        (bad / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(UserError, match="its prefix has 5 virtual tokens"):
            methods.load(model, bad)
        assert torch.equal(logits(model), before)
    (bad / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="this is no prefix: other is none of"):
        methods.load(model, change(bad, lambda tensors: tensors.update(other=torch.ones(3))))
    assert torch.equal(logits(model), before)


@pytest.mark.few(1)
@pytest.mark.parametrize(("alpha", "zero"), [(0, "B"), (16, "A")])
def test_an_adapter_without_effect_is_known(tiny_model, saved, alpha, zero):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    if zero == "A":
        change(saved, lambda tensors: tensors.update({name: t * 0 for name, t in tensors.items() if "lora_A" in name}))
    assert methods.changes_nothing(methods.load(prepared(tiny_model), saved))


def test_an_adapter_without_any_tensor_is_refused(tiny_model, saved):
    refused(tiny_model, change(saved, lambda tensors: tensors.clear()))


def test_half_a_file_is_told(tiny_model, saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is cut short or damaged" in refused(tiny_model, saved)


@pytest.mark.few(1)
@pytest.mark.parametrize("text", ["", '{"peft_type": "LORA", "r": 4', '{"peft_type": "LORA", "r": 4}', "[]"])
def test_a_broken_adapter_config_is_told(tiny_model, saved, text):
    (saved / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused(tiny_model, saved)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "this is no prefix"),
        ({"peft_type": "IA3"}, "its peft_type is IA3; LoRA"),
        ({"r": 8}, "has rank 4, its adapter_config.json says 8"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern is"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"target_modules": [None]}, "target_modules is"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"peft_type": ["LORA"]}, "its peft_type is"),
        ({"use_dora": True}, "lora_magnitude_vector and use_dora do not go together"),
        ({"modules_to_save": ["lm_head"]}, "lm_head: named in modules_to_save, but not there"),
        ({"bias": "all"}, "bias is all"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out, which cannot be read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which also changed the base's weights"),
    ],
)
def test_a_config_that_does_not_go_with_the_tensors_is_refused(tiny_model, saved, changed, said):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    assert said in refused(tiny_model, saved)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
def test_a_pickled_adapter_is_never_opened(tiny_model, saved, tmp_path, name):
    (saved / "adapter_model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    said = refused(tiny_model, saved)
    assert (
        name in said
        and {"bin": "holds code, which is never run", "pt": "it holds none of", "safetensors": "is cut short or damaged"}[
            name.split(".")[1]
        ]
        in said
    )
    assert not (tmp_path / "marker").exists()


def test_a_missing_folder_is_told(tiny_model, tmp_path):
    assert "there is no adapter" in refused(tiny_model, tmp_path / "nowhere")


def test_a_disk_that_lies_is_found_when_saving(tiny_model, tmp_path, monkeypatch):
    def lie(tensors, path, metadata=None):
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(tensors_module, "save_file", lie)
    with pytest.raises(OSError, match="does not read back"):
        methods.save_adapter(with_lora(tiny_model), tmp_path, Lora(), "")


# --- full tuning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_fully_tuned_folder_opens_in_plain_transformers(tiny_model, tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import glmtune

    base = tiny_model if tied else tiny.llama(tmp_path / "untied", tie_word_embeddings=False)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(6))
    given = [f"model={base}", f"data={rows}", f"out={tmp_path / 'a'}", "method=full", "optim.steps=2", "optim.lr=1e-3"]
    train(load_run(None, [*given, "samples=[]", "report_to=[]", "optim.batch_size=4"]))
    folder = tmp_path / "a" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = glmtune.load(tmp_path / "a", dtype=torch.float32).model
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(theirs), logits(families.load_model(base, dtype=torch.float32)))
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert ("lm_head.weight" in names) is not tied and "model.embed_tokens.weight" in names
    assert set(families.tensor_shapes(base)) == names
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML


def test_a_tuned_model_is_a_base_for_the_next_run(tiny_model, tmp_path):
    """Full tuning first, then LoRA on the folder it left, wherever that folder is moved to."""
    import glmtune

    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    common = [f"data={rows}", "samples=[]", "report_to=[]", "optim.steps=1", "optim.lr=1e-3"]
    train(load_run(None, [f"model={tiny_model}", f"out={tmp_path / 'a'}", "method=full", *common]))
    shutil.move(tmp_path / "a" / "model", tmp_path / "mine")
    train(load_run(None, [f"model={tmp_path / 'mine'}", f"out={tmp_path / 'b'}", *common]))
    model = glmtune.load(tmp_path / "b", dtype=torch.float32).model
    with methods.disabled(model):
        assert torch.equal(logits(model), logits(families.load_model(tmp_path / "mine", dtype=torch.float32)))
