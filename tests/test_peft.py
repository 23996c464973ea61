"""What plain PEFT opens on the same folders, glmtune opens and computes the same, or refuses with the reason."""

import shutil
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glmtune import families, methods
from glmtune.errors import UserError
from glmtune.importing import import_adapter

from . import tiny
from .cases import cases

IDS = torch.tensor([[11, 45, 200, 30, 31, 32, 99, 7]])
warnings.filterwarnings("ignore", module="peft")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[tuple[bool, bool], Path]:
    """By (tied, resized): the last have eight rows more than their tokenizer's model had."""
    made = {}
    for tied in (True, False):
        made[tied, False] = tiny.llama(tmp_path_factory.mktemp("base") / "m", tie_word_embeddings=tied, seed=int(tied))
        made[tied, True] = shutil.copytree(made[tied, False], tmp_path_factory.mktemp("base") / "m")
        model = opened(made[tied, False])
        torch.manual_seed(5)
        model.resize_token_embeddings(360)
        model.save_pretrained(made[tied, True])
    return made


def opened(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def made(base: Path, to: Path, start: Path | None = None, **config: Any) -> Path:
    """An adapter that PEFT trained: every number that has a gradient is moved. start: the base before it was resized."""
    model = opened(start or base)
    if start is not None:
        torch.manual_seed(5)
        model.resize_token_embeddings(360)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **deepcopy(config)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(str(to))
    return to


@torch.no_grad()
def theirs(base: Path, adapter: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(opened(base), str(adapter)).eval()(IDS).logits


@torch.no_grad()
def ours(base: Path, adapter: Path) -> torch.Tensor:
    model = families.load_model(base, dtype="fp32", device="cpu")
    return methods.load(model, adapter)(IDS).logits


def same(base: Path, adapter: Path) -> None:
    torch.testing.assert_close(ours(base, adapter), theirs(base, adapter), rtol=0, atol=3e-5)


CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 6),
        "lora_alpha": st.integers(0, 16),
        "target_modules": st.sampled_from(
            [["q_proj"], ["q_proj", "down_proj"], "all-linear", ["k_proj", "o_proj", "gate_proj"], r".*\.1\..*_proj", ["lm_head", "q_proj"], ["embed_tokens", "v_proj"]]
        ),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    },
    optional={
        "modules_to_save": st.lists(st.sampled_from(["embed_tokens", "lm_head", "norm", "input_layernorm", "mlp"]), min_size=1, max_size=3, unique=True),
        "trainable_token_indices": st.lists(st.integers(0, 350), min_size=1, max_size=3, unique=True),
        "layers_to_transform": st.sampled_from([0, [1], [0, 1]]),
        "exclude_modules": st.sampled_from([["q_proj"], r".*\.0\..*"]),
        "rank_pattern": st.sampled_from([{"q_proj": 2}, {"layers.1.*": 3}, {"model.layers.0.self_attn.q_proj": 5}]),
        "alpha_pattern": st.sampled_from([{"q_proj": 2}, {r".*\.1\..*": 9}]),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "fan_in_fan_out": st.booleans(),
        "ensure_weight_tying": st.booleans(),
        "lora_bias": st.booleans(),
    },
)  # fmt: skip


CONFIGS = CONFIGS.map(  # PEFT takes layers_to_transform beside a list of names only
    lambda one: {k: v for k, v in one.items() if k != "layers_to_transform" or isinstance(one["target_modules"], list)}
)


@cases(60, quick=3, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(config=CONFIGS, tied=st.booleans(), resized=st.booleans())
def test_any_config_of_peft_computes_the_same_or_is_refused(bases, tmp_path_factory, config, tied, resized):
    base, to = bases[tied, resized], tmp_path_factory.mktemp("a")
    try:
        made(base, to, start=bases[tied, False] if resized else None, **config)
        wanted = theirs(base, to)
    except Exception:
        return  # PEFT does not make or open such a one
    try:
        got = ours(base, to)
    except UserError as refusal:
        assert len(str(refusal)) > 40
        return
    torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5)


BOTH = ["embed_tokens", "lm_head"]


@pytest.mark.few(1)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": BOTH}], ids=["plain", "whole"])
def test_an_adapter_that_was_trained_on_a_resized_model_opens_on_it(bases, tmp_path, tied, config):
    adapter = made(bases[tied, True], tmp_path / "a", bases[tied, False], r=4, target_modules=["q_proj"], **config)
    if tied and config:  # PEFT trained the two sides apart
        with pytest.raises(UserError, match="are tied"):
            ours(bases[tied, True], adapter)
    else:
        same(bases[tied, True], adapter)


@pytest.mark.few(1)
@pytest.mark.parametrize("saved", [BOTH, ["embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("resized", [True, False])
def test_tied_weights_that_peft_kept_tied_open(bases, tmp_path, saved, resized):
    start = bases[True, False] if resized else None
    adapter = made(
        bases[True, resized], tmp_path / "a", start, r=4, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True
    )
    same(bases[True, resized], adapter)


@pytest.mark.few(1)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": BOTH, "ensure_weight_tying": True}], ids=["plain", "whole"])
def test_on_a_base_that_was_not_resized_the_sizes_are_told(bases, tmp_path, tied, config):
    adapter = made(bases[tied, True], tmp_path / "a", bases[tied, False], r=4, target_modules=["q_proj"], **config)
    for open_ in (lambda: ours(bases[tied, False], adapter), lambda: import_adapter(adapter, bases[tied, False], tmp_path / "to")):
        with pytest.raises(UserError, match="360 tokens.*this model 352.*resize_token_embeddings"):
            open_()


@pytest.mark.few(1)
@pytest.mark.parametrize("change", ["other copy", "other shape", "no original", "only the copy"])
def test_doubles_that_differ_are_refused_and_others_count_once(bases, tmp_path, change):
    base = bases[False, True]
    adapter = made(base, tmp_path / "a", bases[False, False], r=4, target_modules=["q_proj"], modules_to_save=BOTH)
    file, name = adapter / "adapter_model.safetensors", "base_model.model.lm_head"
    tensors = load_file(file)
    assert f"{name}.modules_to_save.weight" in tensors and f"{name}.original_module.weight" in tensors
    if change == "other copy":
        tensors[f"{name}.modules_to_save.weight"] = tensors[f"{name}.modules_to_save.weight"] + 1
    elif change == "other shape":
        tensors[f"{name}.modules_to_save.weight"] = tensors[f"{name}.modules_to_save.weight"][:9].clone()
    elif change == "no original":
        del tensors[f"{name}.original_module.weight"]
    else:
        del tensors[f"{name}.weight"]
    save_file(tensors, file)
    if change == "no original":
        same(base, adapter)
    else:
        with pytest.raises(UserError, match="save the adapter again"):
            ours(base, adapter)


def test_an_imported_one_computes_the_same(bases, tmp_path):
    adapter = made(bases[False, True], tmp_path / "a", bases[False, False], r=4, target_modules=["q_proj"], modules_to_save=BOTH)
    imported = import_adapter(adapter, bases[False, True], tmp_path / "to")
    torch.testing.assert_close(ours(bases[False, True], imported), theirs(bases[False, True], adapter), rtol=0, atol=3e-5)
    same(bases[False, True], imported)
