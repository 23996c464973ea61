"""Run files of the older tools: what they say is said again, and what has no counterpart is named with its reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from glmtune import oldruns, options, sources
from glmtune.errors import UserError
from glmtune.oldfiles import ALIASES, DEFAULTS, EFFICIENT, LLAMA_FACTORY, MARKS, NO_COUNTERPART, NOT_NEEDED, TRAINING_ARGUMENTS
from glmtune.run import Run

from .cases import cases

LF: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "stage": "sft", "do_train": True, "finetuning_type": "lora", "dataset": "ours",
    "template": "qwen", "output_dir": "saves/lora",
}  # fmt: skip
C = "python src/train_bash.py --stage sft --do_train --dataset ours --output_dir out "
E = "python train_lora.py --train_args_file args.json --data_path train.jsonl "
A = "python main.py --DATA_PATH train.json "
D = "python {} --tokenized_dataset rows --output_dir out "


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An old working folder: a registry with one data set, rows, and chatglm_tuning's argument file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = [{"q": "Where is Paris?", "a": "In France."}]
    (tmp_path / "data/ours.json").write_text(json.dumps(rows))
    info = {"ours": {"file_name": "ours.json", "columns": {"prompt": "q", "response": "a"}}, "code": {"script_url": "x"}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "out", "learning_rate": 1e-3, "max_steps": 30}))
    return tmp_path


def convert(old: dict[str, Any] | str) -> tuple[Run, str]:
    """The run that comes of an old YAML (a tree) or of a shell command, and the text of its file."""
    path = Path("old.sh" if isinstance(old, str) else "old.yaml")
    path.write_text(old if isinstance(old, str) else yaml.safe_dump(old))
    Path("new.yaml").unlink(missing_ok=True)
    return oldruns.convert(path, "new.yaml"), Path("new.yaml").read_text(encoding="utf-8")


def lf(**changes: Any) -> tuple[Run, str]:
    return convert({**LF, **changes})


# --- the whole ------------------------------------------------------------------------------------------------------------


def test_a_whole_llama_factory_file():
    run, _ = lf(
        lora_rank=16, lora_alpha=64, lora_dropout=0.05, lora_target="q_proj,v_proj", additional_target="embed_tokens,lm_head",
        use_dora=True, use_rslora=True, loraplus_lr_ratio=16.0, quantization_bit=4, cutoff_len=512, max_samples=100,
        per_device_train_batch_size=2, gradient_accumulation_steps=8, learning_rate="1e-4", num_train_epochs=2.0,
        lr_scheduler_type="cosine", warmup_ratio=0.1, weight_decay=0.01, max_grad_norm=0.5, optim="adamw_8bit", neftune_noise_alpha=5,
        bf16=True, val_size=0.1, eval_strategy="steps", eval_steps=50, save_steps=200, save_total_limit=3, seed=7,
        report_to="wandb", default_system="Be brief.", gradient_checkpointing=True,
    )  # fmt: skip
    kept = options.changed(options.plain(run), options.plain(Run.model_construct(model="", data=[], out="")))
    assert kept == {
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "data": [{"path": "ours", "weight": 1.0, "max_samples": 100}],
        "out": "saves/lora",
        "registry": "data/dataset_info.json",
        "eval": {"share": 0.1, "every_steps": 50},
        "method": {
            "rank": 16, "alpha": 64.0, "dropout": 0.05, "targets": ["q_proj", "v_proj"], "dora": True, "rslora": True, "lr_ratio": 16.0,
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
        "quant": "nf4", "neftune": 5.0,
        "optim": {"kind": "adamw8bit", "lr": 1e-4, "epochs": 2.0, "batch_size": 16, "micro_tokens": None, "schedule": "cosine", "steps": None,
                  "warmup": 0.1, "weight_decay": 0.01, "clip": 0.5},
        "max_length": 512, "system": "Be brief.", "precision": "bf16", "checkpointing": True,
        "save": {"every_steps": 200, "keep": 3}, "seed": 7, "report_to": ["wandb"],
    }  # fmt: skip


def test_every_value_says_where_it_comes_from():
    _, text = lf(lora_rank=4, quantization_bit=8, val_size=20)
    values = [line for line in text.splitlines() if re.match(r" *\w+: \S", line)]
    assert len(values) > 20
    assert not [line for line in values if "  # " not in line]


ALL = [name for table in (NOT_NEEDED, NO_COUNTERPART) for names in table for name in names.split()]


@pytest.mark.parametrize("tool", [LLAMA_FACTORY, EFFICIENT])
def test_no_argument_is_lost(tool):
    """Every argument stands in the new file: behind an option, or in a remark that gives a reason."""
    old = {**LF, "brand_new_option": 3, "freeze_trainable_layers": 4, **{name: "x3" for name in ALL if name not in LF}}
    if tool == EFFICIENT:
        old = {**old, "pre_seq_len": 8, "finetuning_type": "p_tuning", "template": None}
        del old["template"]
    old["do_train"] = True
    old |= {
        "logging_steps": 10, "quantization_type": "fp4", "eval_steps": 5, "warmup_ratio": 0.1, "warmup_steps": 9, "num_train_epochs": 2,
        "max_steps": 7, "packing": True, "adafactor": False, "optim": "adamw_torch", "load_best_model_at_end": True, "data_seed": 3, "fp16": True,
        "save_strategy": "epoch", "save_steps": 5, "gradient_checkpointing": False, "disable_gradient_checkpointing": True, "lora_rank": 4,
        "use_swanlab": False, "create_new_adapter": True, "mask_history": False, "bf16": True, "mix_strategy": "concat", "interleave_probs": "1",
        "model_revision": "main", "neat_packing": True, "train_on_prompt": False, "default_system": None, "use_dora": False, "max_grad_norm": 0,
    }  # fmt: skip
    said: list[str] = []
    Path("old.yaml").write_text(yaml.safe_dump(old))
    oldruns.convert("old.yaml", "new.yaml", said.append)
    text = Path("new.yaml").read_text(encoding="utf-8")
    assert tool in said[0]
    assert not [name for name in old if not re.search(rf"\b{name}\b", text)]
    remarks = [line[2:] for line in text.splitlines() if line.startswith("# ")][1:]
    assert remarks == said[1:]
    assert all(re.match(r"(changed|not needed|no counterpart|not imported|guessed): .+: ?.+", line) for line in remarks)
    unknown = next(line for line in remarks if "brand_new_option" in line)
    assert unknown.startswith("no counterpart: brand_new_option (3): this name is not known here")


@pytest.mark.parametrize("key", ["hf_hub_token", "swanlab_api_key", "password", "API_KEYS", "proxy_auth"])
def test_a_secret_is_not_copied(key):
    for value in ("s3cret", ["s3cret"]):
        _, text = lf(**{key: value}, extra={"inside": "s3cret"})
        assert key in text and "s3cret" not in text


@pytest.mark.parametrize(
    "old",
    [
        {"my_note": "line one\nline two"},
        {"template": "zz\nseed: 7"},
        {"optim": "lion\r\nseed: 7"},
        {"a\nseed: 7": 1},
        {"lora_target": "q_proj,v\nseed: 7"},
        {"dataset": "ours,a\u2028seed: 7\x85x\x00"},
        {"output_dir": "o\nseed: 7", "model_revision": "v\n---\nx", "default_system": "a\nb"},
    ],
)
def test_no_text_of_the_old_file_leaves_its_comment(old):
    said: list[str] = []
    Path("old.json").write_text(json.dumps({**LF, **old, "more": "\ud800\n"}))
    run = oldruns.convert("old.json", "new.yaml", said.append)
    text = Path("new.yaml").read_text(encoding="utf-8")
    assert run.seed == 0 and "seed" not in yaml.safe_load(text)
    assert [line[2:] for line in text.splitlines() if line.startswith("# ")][1:] == said[1:]
    assert all(line.isprintable() for line in said)


def test_a_file_that_cannot_be_read_again_is_not_left_behind(monkeypatch):
    monkeypatch.setattr(oldruns, "_line", str)
    with pytest.raises(UserError):
        lf(my_note="one\ntwo: [")
    assert not Path("new.yaml").exists()


def test_what_comes_out_is_never_written_over():
    lf()
    with pytest.raises(UserError, match=r"new\.yaml exists already"):
        oldruns.convert("old.yaml", "new.yaml")


# --- defaults of each tool ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, alpha, dropout, model",
    [
        (dict(LF, lora_rank=6), 12, 0.0, "Qwen/Qwen2.5-0.5B-Instruct"),
        (C, 32, 0.1, "THUDM/chatglm-6b"),
        (E, 32, 0.05, "THUDM/chatglm-6b"),
        (A, 16, 0.05, "THUDM/chatglm2-6b"),
        (D.format("chatglm2_lora_tuning.py"), 32, 0.1, "THUDM/chatglm2-6b"),
        (D.format("qwen1.5_lora_tuning.py"), 16, 0.1, "Qwen/Qwen1.5-4B-Chat"),
        (D.format("baichuan2_lora_tuning.py --model_version base-7b"), 32, 0.1, "baichuan-inc/Baichuan2-7B-Base"),
    ],
)
def test_absent_options_take_the_old_tools_defaults(old, alpha, dropout, model):
    run, _ = convert(old)
    assert (run.method.alpha, run.method.dropout, run.model) == (alpha, dropout, model)
    assert run.optim.weight_decay == 0 and run.optim.clip == 1


EMPTY = ("learning_rate", "lora_rank", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_target", "cutoff_len", "stage",
         "finetuning_type", "lr_scheduler_type", "save_steps", "dataset_dir")  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("value", [None, "", " none", []])
def test_empty_means_the_old_tools_default(name, value):
    run, text = lf(**{name: value})
    assert run == lf()[0]
    assert f"# changed: {name}: empty, so the old default, " in text


def test_empty_where_there_is_no_default():
    run, _ = lf(seed=None, quantization_bit=None, max_samples=None, max_grad_norm=None, save_total_limit=None, report_to=None)
    assert (run.seed, run.quant, run.data[0].max_samples, run.optim.clip, run.report_to) == (0, None, None, None, [])


def test_the_trainers_defaults_are_not_ours():
    optim = lf()[0].optim
    assert (optim.lr, optim.epochs, optim.batch_size, optim.schedule, optim.warmup) == (5e-5, 3, 8, "linear", 0)


def test_what_llm_tuning_writes_into_its_scripts():
    run, _ = convert(D.format("baichuan_lora_tuning.py"))
    assert run.method.targets == ["W_pack"] and run.stage.learn == "everything"
    run, _ = convert(D.format("baichuan2_lora_tuning.py") + "--no_prompt_loss 1")
    assert run.stage.learn == "all"
    run, _ = convert(D.format("chatglm_lora_tuning.py"))
    assert run.method.targets == ["query_key_value"] and run.stage.learn == "all"


def test_llm_tunings_rows_come_from_its_first_step():
    first = "python tokenize_dataset_rows.py --input_file ours.json --prompt_key q --target_key a --save_name rows --max_seq_length 300\n"
    run, _ = convert(first + D.format("chatglm_lora_tuning.py"))
    assert (run.data[0].path, run.data[0].columns, run.max_length) == ("data/ours.json", {"prompt": "q", "response": "a"}, 300)
    assert run.too_long == "error"
    run, text = convert(first.strip() + " --skip_overlength False --model_checkpoint m\n" + D.format("chatglm_lora_tuning.py"))
    assert run.too_long == "skip" and "model_checkpoint: the model is that of the training script" in text
    run, text = convert(
        D.format("internlm_lora_tuning.py") + "--train_size 500 --eval_size 100 --evaluation_strategy steps --eval_steps 25"
    )
    assert (run.data[0].max_samples, run.eval.share, run.eval.every_steps) == (600, 100, 25)
    assert "'rows' is a folder of tokens" in text


# --- values that change their meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, rows",
    [
        (C + "--per_device_train_batch_size 4 --gradient_accumulation_steps 3", 12),
        ("CUDA_VISIBLE_DEVICES=0,1 " + C + "--per_device_train_batch_size 4 --gradient_accumulation_steps 3", 24),
        (C.replace("python", "torchrun --nproc_per_node=4") + "--per_device_train_batch_size 2", 8),
        (C.replace("python", "torchrun --nnodes 2 --nproc-per-node 4") + "--per_device_train_batch_size 2", 16),
        (C.replace("python", "accelerate launch --num_processes 3") + "--per_device_train_batch_size 2", 6),
        ("export CUDA_VISIBLE_DEVICES=0,1,2\nB=5\n" + E + "--per_device_train_batch_size ${B}", 15),
        (A + "--MICRO_BATCH_SIZE 4 --BATCH_SIZE 16", 16),
        (A + "--MICRO_BATCH_SIZE 4 --BATCH_SIZE 10", 8),
        ("CUDA_VISIBLE_DEVICES=0,1 " + D.format("llama2_lora_tuning.py") + "--per_device_train_batch_size 4", 4),
    ],
)
def test_batch_size_is_rows_times_pieces_times_processes(command, rows):
    assert convert(command)[0].optim.batch_size == rows


def test_an_unknown_number_of_cards_is_said():
    assert "does not say on how many cards" in convert(C)[1]
    assert "does not say on how many cards" not in convert("CUDA_VISIBLE_DEVICES=1 " + C)[1]


@pytest.mark.parametrize(
    "given, schedule, warmup",
    [
        ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.03}, "cosine", 0.03),
        ({"lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "warmup_steps": 50}, "cosine", 50),
        ({"lr_scheduler_type": "constant", "warmup_steps": 50}, "constant", 0),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 50}, "constant", 50),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "cosine", 0),
        ({"lr_scheduler_type": "polynomial"}, "linear", 0),
    ],
)
def test_schedules(given, schedule, warmup):
    run, text = lf(**given)
    assert (run.optim.schedule, run.optim.warmup) == (schedule, warmup)
    name = given["lr_scheduler_type"]
    assert (f"changed: lr_scheduler_type {name}" in text) == (name not in ("cosine", "constant", "constant_with_warmup"))


def test_lengths_become_one_limit():
    assert convert(C)[0].max_length == 1024
    assert convert(E + "--max_input_length 128 --max_output_length 256")[0].max_length == 384
    assert convert(A + "--CONTEXT_LEN 64 --TARGET_LEN 192")[0].max_length == 256
    assert lf()[0].max_length == 2048


def test_steps_come_before_epochs():
    run, _ = lf(max_steps=40, num_train_epochs=9)
    assert run.optim.steps == 40 and run.optim.epochs == 3


@pytest.mark.parametrize("size, share", [(0.2, 0.2), (200, 200), ("0.05", 0.05)])
def test_dev_rows(size, share):
    assert lf(val_size=size)[0].eval.share == share
    assert convert(C + f"--dev_ratio {size}")[0].eval.share == share


def test_what_is_learned():
    assert lf()[0].stage.learn == "all"
    assert lf(mask_history=True)[0].stage.learn == "last"
    assert lf(train_on_prompt=True)[0].stage.learn == "everything"
    assert convert(C)[0].stage.learn == "last"


@pytest.mark.parametrize(
    "name, ours", [("qwen3_nothink", "auto"), ("llama3", "auto"), ("chatglm3", "chatglm3"), ("intern2", "internlm2")]
)
def test_template_names(name, ours):
    assert lf(template=name)[0].template == ours


def test_templates_in_words():
    template: Any = lf(template="fewshot")[0].template
    assert template.user == "{content}" and template.assistant == "{content}{stop}\n\n"
    template = convert(A)[0].template
    assert template.user == template.system == "{content}"
    assert convert(A + "--DATA_TYPE txt")[0].stage.kind == "pretrain"


@pytest.mark.parametrize("stage, kind", [("pt", "pretrain"), ("rm", "reward"), ("dpo", "dpo"), ("kto", "kto"), ("ppo", "ppo")])
def test_stages(stage, kind):
    assert lf(stage=stage)[0].stage.kind == kind


# --- methods --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, target, share_a", [
    ("THUDM/chatglm3-6b", "query_key_value", True),
    ("THUDM/chatglm3-6b", "dense_h_to_4h", False),
    ("THUDM/chatglm3-6b", "all", True),
    ("THUDM/glm-4-9b-chat-hf", "all", False),
    ("baichuan-inc/Baichuan2-7B-Chat", "W_pack", True),
    ("Qwen/Qwen2.5-0.5B-Instruct", "all", False),
    ("Qwen/Qwen2.5-0.5B-Instruct", "q_proj,v_proj", False),
])  # fmt: skip
def test_a_fused_layer_keeps_its_one_a(model, target, share_a):
    run, _ = lf(model_name_or_path=model, lora_target=target)
    assert run.method.share_a == share_a
    assert run.method.targets == (None if target == "all" else target.split(","))


def test_lora_outside_of_the_blocks_is_named():
    run, text = lf(lora_target="q_proj,lm_head")
    assert run.method.targets == ["q_proj"]
    assert "lora_target lm_head: LoRA sits on the linear layers of the blocks" in text


@pytest.mark.parametrize("given, start, under", [
    ({"adapter_name_or_path": "a"}, "a", []),
    ({"adapter_name_or_path": "a,b"}, "b", ["a"]),
    ({"adapter_name_or_path": "a,b", "create_new_adapter": True}, None, ["a", "b"]),
])  # fmt: skip
def test_earlier_adapters(given, start, under):
    run, text = lf(**given)
    assert (run.method.start, run.method.under) == (start, under)
    assert "imported first: glmtune import" in text


def test_earlier_adapters_of_the_other_tools():
    run, _ = convert(C + "--checkpoint_dir a,b --resume_lora_training False")
    assert (run.method.start, run.method.under) == (None, ["a", "b"])
    assert convert(C + "--checkpoint_dir a")[0].method.start == "a"
    assert convert(D.format("internlm_lora_tuning.py") + "--previous_lora_weights a")[0].method.start == "a"
    assert convert(E + "--resume_from_checkpoint a")[0].method.start == "a"


def test_prefixes():
    run, _ = convert(C + "--finetuning_type p_tuning --prefix_projection --quantization_bit 8")
    method = run.method
    assert (method.kind, method.num_virtual_tokens, method.projection, method.dropout, run.quant) == (
        "prefix",
        64,
        True,
        0.1,
        "chatglm-int8",
    )
    run, _ = convert(E.replace("train_lora", "train_ptuning") + "--pre_seq_len 128 --quantization_bit 4 --ptuning_checkpoint p")
    assert (run.method.num_virtual_tokens, run.quant, run.method.start, run.optim.steps) == (128, "chatglm-int4", "p", 30)
    assert convert(E.replace("train_lora", "train_ptuning"))[0].method.kind == "full"


def test_freezing():
    run, text = convert(C + "--finetuning_type freeze --num_layer_trainable -2 --name_module_trainable qkv")
    assert (run.method.first, run.method.last, run.method.modules) == (2, None, "attention")
    assert "'7.mlp' also trained layers 17 and 27" in text
    method = lf(finetuning_type="freeze", freeze_extra_modules="embed_tokens,norm")[0].method
    assert (method.last, method.modules, method.others) == (2, "all", ["embed_tokens", "norm"])
    assert convert(C + "--finetuning_type freeze")[0].method.modules == "mlp"


@pytest.mark.parametrize("old, quant", [
    (dict(LF, quantization_bit=8), "int8"), (dict(LF, quantization_bit=4, quantization_method="bnb"), "nf4"),
    (dict(LF, quantization_bit=4, quantization_method="hqq"), None), (dict(LF, quantization_bit=4, finetuning_type="full"), None),
    (dict(LF, quantization_bit=3), None),
    (A + "--BIT_4", "nf4"), (A + "--BIT_8", "int8"), (E + "--int8", "int8"), (C + "--quantization_bit 4", "nf4"),
])  # fmt: skip
def test_quantised_bases(old, quant):
    run, text = convert(old)
    assert run.quant == quant
    assert quant or "changed: quant: left out" in text
    assert "it was off" not in text


@pytest.mark.parametrize(
    "name, kind", [("adamw_torch", "adamw"), ("paged_adamw_8bit", "adamw8bit"), ("adafactor", "adafactor"), ("lion", "adamw")]
)
def test_optimizers(name, kind):
    run, text = lf(optim=name)
    assert run.optim.kind == kind
    assert (f"optim {name}: not there" in text) == (name == "lion")


# --- data -----------------------------------------------------------------------------------------------------------------


def test_a_data_set_is_found_through_the_old_registry(here):
    run, _ = lf()
    found = sources.find(run.data, run.registry)
    assert [path.name for path, _ in found[0].files] == ["ours.json"] and found[0].columns == {"prompt": "q", "response": "a"}
    (here / "examples").mkdir()
    (here / "examples/old.sh").write_text(C.replace("src", "../src") + "--dataset_dir ../data")
    run = oldruns.convert("examples/old.sh", "from_examples.yaml")
    assert sources.find(run.data, run.registry)[0].columns


def test_names_that_lead_nowhere_are_said():
    _, text = lf(dataset="ours,code,nothing")
    assert "'code' cannot be used: it is a loading script" in text
    assert "no data set is called 'nothing'" in text
    _, text = lf(dataset="alpaca_zh", dataset_dir="elsewhere")
    assert "there is no elsewhere/dataset_info.json" in text
    assert "'alpaca_zh' is taken to be glmtune's data set of that name" in text


def test_mixing_keeps_the_shares():
    run, text = lf(dataset="ours,code", mix_strategy="interleave_over", interleave_probs="0.7,0.3")
    assert [one.share for one in run.data] == [None, 0.3] and "mix_strategy interleave_over" in text


def test_instruction_and_input_stand_as_there():
    assert convert(C)[0].join == "" and lf()[0].join is None and convert(E)[0].join is None


# --- other ways to say it -------------------------------------------------------------------------------------------------


def test_chatglm_tunings_file_alone_is_a_guess_that_is_said():
    Path("p_tuning.json").write_text(json.dumps({"output_dir": "o", "learning_rate": 2e-2, "per_device_train_batch_size": 4}))
    run = oldruns.convert("p_tuning.json", "new.yaml")
    assert (run.method.kind, run.method.num_virtual_tokens, run.optim.lr) == ("prefix", 128, 2e-2)
    text = Path("new.yaml").read_text(encoding="utf-8")
    assert "guessed: model, data and method" in text and "put your file in place of train.jsonl" in text
    assert oldruns.convert("args.json", "lora.yaml").method.kind == "lora"


def test_llama_factorys_command_with_a_file_and_changes():
    Path("lf.yaml").write_text(yaml.safe_dump(LF))
    run, _ = convert("FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train lf.yaml learning_rate=3e-4 lora_rank=2")
    assert (run.optim.lr, run.method.rank, run.optim.batch_size) == (3e-4, 2, 16)


def test_json_text_and_yaml_say_the_same():
    plain, _ = lf(lora_rank=4, bf16=True)
    Path("old.json").write_text(json.dumps({**LF, "lora_rank": 4, "bf16": True}))
    flags = " ".join(f"--{key} {value}" for key, value in {**LF, "lora_rank": 4}.items()) + " --bf16"
    Path("old.txt").write_text(flags)
    assert oldruns.convert("old.json", "b.yaml") == oldruns.convert("old.txt", "c.yaml") == plain


def test_several_commands_in_one_file():
    text = f"# a comment with a ' in it\nset -x\n{C} --lora_rank 3\n{C} --lora_rank 4\n{C.replace('--do_train', '--do_predict')}\npython src/cli_demo.py --x y\n"
    run, written = convert(text)
    assert run.method.rank == 3
    assert (
        "1 more trainings in this file" in written
        and "glmtune predict" in written
        and "cli_demo.py: here that is `glmtune chat`" in written
    )


@pytest.mark.few(15)
@pytest.mark.parametrize(
    "old, said",
    [
        ({k: v for k, v in LF.items() if k != "do_train"} | {"do_predict": True}, "glmtune predict MODEL DATA"),
        ({"model_name_or_path": "m", "adapter_name_or_path": "a", "export_dir": "x"}, "glmtune export m --adapter a --to x"),
        ({"model_name_or_path": "m", "template": "qwen", "infer_backend": "vllm"}, "glmtune chat"),
        (dict(LF, finetuning_type="oft"), "'oft' has no counterpart"),
        (dict(LF, stage="grpo"), "stage 'grpo' is not known"),
        (dict(LF, lora_rank="many"), "lora_rank: wanted a number, got 'many'"),
        (dict(LF, bf16="perhaps"), "bf16: wanted true or false, got 'perhaps'"),
        (dict(LF, lora_rank=0), "method.rank"),
        ({"model": "m", "data": "d", "out": "o"}, "a run file of glmtune already"),
        ({"colour": "red"}, "not a run file of a tool that is known here"),
        ("python src/cli_demo.py --model_name_or_path m", "trains nothing (it runs cli_demo.py); here that is: glmtune chat"),
        (C + "--lora_rank $R", "lora_rank is $R, and $R is set nowhere"),
        (C + "--lora_rank '8", "cannot be read as a command line"),
        ("python train_lora.py --data_path x", "needs --train_args_file"),
        (A + "--MICRO_BATCH_SIZE 0", "MICRO_BATCH_SIZE: wanted a whole number of 1 or more, got 0"),
        (dict(LF, learning_rate="abc"), "old.yaml: learning_rate: wanted a number, got 'abc'"),
        (dict(LF, learning_rate=float("nan")), "old.yaml: learning_rate: wanted a number, got nan"),
        (dict(LF, packing=["x"]), "old.yaml: packing: wanted true or false, got ['x']"),
        (dict(LF, lora_target="lm_head"), "old.yaml: lora_target lm_head: names no linear layer"),
        (dict(LF, lora_target=", "), "names no linear layer"),
        (dict(LF, finetuning_type="p_tuning"), "old.yaml: pre_seq_len: wanted a whole number of 1 or more, got None"),
        (dict(LF, stage="a\nb\nc\nd"), r"stage 'a\nb\nc\nd' is not known"),
        (dict(LF, interleave_probs="0.5,x"), "old.yaml: interleave_probs: wanted a number, got 'x'"),
        ("llamafactory-cli train lf.yaml num_train_epochs='['", "old.sh: num_train_epochs: wanted a number, got '['"),
    ]
    + [
        (dict(LF, **{name: value}), f"old.yaml: {name}: wanted a whole number")
        for name, value in (
            ("per_device_train_batch_size", 1.5),
            ("per_device_train_batch_size", 0),
            ("cutoff_len", 1024.5),
            ("cutoff_len", 0),
            ("max_steps", 1.5),
            ("val_size", 1.5),
            ("max_samples", 1.5),
            ("save_steps", "1.5"),
            ("seed", 0.5),
            ("lora_rank", 8.5),
        )
    ]
    + [
        (dict(LF, **{name: value}), f"old.yaml: {name}: wanted a text, got {value}")
        for name in ("model_name_or_path", "output_dir", "template", "optim", "dataset_dir", "default_system", "lr_scheduler_type")
        for value in (["a"], {"a": 1}, True)
    ]
    + [(dict(LF, **{name: {"a": 1}}), f"old.yaml: {name}: wanted a text") for name in ("dataset", "lora_target", "report_to")],
)
def test_what_is_no_training_is_refused_with_the_way_out(old, said):
    Path("lf.yaml").write_text(yaml.safe_dump(LF))
    with pytest.raises(UserError, match=re.escape(said)):
        convert(old)
    assert not Path("new.yaml").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name, content, said",
    [
        ("old.sh", b"# \xff\xfe", "not UTF-8"),
        ("old.txt", b"\x80", "not UTF-8"),
        ("old.json", b"[" * 10**5, "not valid JSON: nested too deep"),
        ("old.yaml", b"[" * 10**4, "not valid YAML: nested too deep"),
        ("old.yaml", b"a: 2024-13-45", "not valid YAML"),
        ("old.json", b'{"output_dir": "o", "learning_rate": "x"}', "learning_rate: wanted a number, got 'x'"),
        ("old.json", b'{"output_dir": "o", "learning_rate": [1]}', "learning_rate: wanted a number, got [1]"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, said):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{name}: {re.escape(said)}"):
        oldruns.convert(name, "new.yaml")


def test_odd_values_of_unknown_names_are_passed_over():
    Path("odd.yaml").write_text(yaml.safe_dump(LF) + "x: &a [*a]\ny: {2024-01-01: z}\n")
    oldruns.convert("odd.yaml", "new.yaml")
    assert "no counterpart: x ([...]), y ({...}): this name is not known here" in Path("new.yaml").read_text(encoding="utf-8")
    Path("args.json").write_text('{"output_dir": "o", "learning_rate": null}')
    assert oldruns.convert("args.json", "args.yaml").optim.lr == 5e-5


def test_which_files_are_run_files():
    for name in ("a.yaml", "b.json", "c.sh", "adapter_config.json", "pytorch_model.bin"):
        Path(name).write_text("{}")
    Path("folder.yaml").mkdir()
    found = [
        name
        for name in ("a.yaml", "b.json", "c.sh", "adapter_config.json", "pytorch_model.bin", "folder.yaml", "none.yaml")
        if oldruns.is_run_file(name)
    ]
    assert found == ["a.yaml", "b.json", "c.sh"]


def test_defaults_are_known_for_every_tool():
    assert set(DEFAULTS) == set(ALIASES)


# --- whose file it is -----------------------------------------------------------------------------------------------------

V1: dict[str, Any] = {
    "model": "Qwen/Qwen3-0.6B", "model_class": "llm", "train_dataset": "data/sets.yaml", "output_dir": "outputs/v1", "micro_batch_size": 2,
    "cutoff_len": 512, "learning_rate": 1e-4, "max_steps": 10,
}  # fmt: skip
PEFT = {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all"}


def refused(old: dict[str, Any] | str, name: str = "old.yaml") -> str:
    Path(name).write_text(old if isinstance(old, str) else json.dumps(old))  # JSON is YAML too
    with pytest.raises(UserError) as error:
        oldruns.convert(name, "refused.yaml")
    assert not Path("refused.yaml").exists()
    return str(error.value)


def test_llama_factorys_v1_form():
    Path("data/sets.yaml").write_text(
        "one:\n  path: data/ours.json\n  source: local\n  converter: alpaca\n  size: 20\n  weight: 2\n"
        "two:\n  path: owner/name\n  split: train_sft\n  converter: strange\n"
    )
    run, text = convert({**V1, "peft_config": PEFT, "quant_config": {"name": "bnb", "quantization_bit": 4}, "kernel_config": {"name": "auto"},
                         "dist_config": {"name": "fsdp2", "dcp_path": None}, "sample_backend": "hf", "max_new_tokens": 128})  # fmt: skip
    assert "a run of LLaMA-Factory v1" in text
    assert (run.model, run.out, run.quant, run.precision, run.join) == ("Qwen/Qwen3-0.6B", "outputs/v1", "nf4", "bf16", "")
    assert (run.method.rank, run.method.alpha, run.method.dropout, run.method.targets) == (16, 32, 0.05, None)
    assert (run.optim.lr, run.optim.steps, run.optim.batch_size, run.optim.schedule) == (1e-4, 10, 2, "constant")
    assert run.optim.weight_decay == 0.01  # torch's AdamW, which it makes without saying so
    assert [(one.path, one.format, one.max_samples, one.weight) for one in run.data] == [
        ("data/ours.json", "alpaca", 20, 2),
        ("hf:owner/name:train_sft", None, None, 1),
    ]
    for said in (
        "dist_config.name (fsdp2)",
        "kernel_config.name",
        "sample_backend (hf)",
        "max_new_tokens (128)",
        "converter strange",
    ):
        assert said in text


@pytest.mark.parametrize(
    "changes, check",
    [
        ({}, lambda run: run.method.kind == "full" and run.quant is None),
        (
            {"peft_config": {"name": "freeze", "freeze_trainable_layers": 3}},
            lambda run: (run.method.kind, run.method.last) == ("freeze", 3),
        ),
        ({"peft_config": json.dumps(PEFT)}, lambda run: run.method.rank == 16),
        ({"peft_config": {**PEFT, "adapter_name_or_path": "a"}}, lambda run: run.method.start == "a"),
        ({"peft_config": {**PEFT, "modules_to_save": ["lm_head"]}}, lambda run: run.method.modules_to_save == ["lm_head"]),
        ({"peft_config": {"name": "lora"}}, lambda run: (run.method.rank, run.method.alpha, run.method.dropout) == (8, 16, 0.05)),
        ({"peft_config": PEFT, "quant_config": {"name": "bnb"}}, lambda run: run.quant == "nf4"),
        ({"peft_config": PEFT, "quant_config": {"name": "auto"}}, lambda run: run.quant is None),
        ({"peft_config": PEFT, "quant_config": {"name": "auto", "quantization_bit": 8}}, lambda run: run.quant == "int8"),
        ({"global_batch_size": 64}, lambda run: run.optim.batch_size == 64),
        (
            {"bf16": False, "enable_activation_checkpointing": False},
            lambda run: (run.precision, run.checkpointing) == ("fp32", False),
        ),
        ({"model_class": "cls"}, lambda run: run.stage.kind == "reward"),
        ({"pref_loss": "sigmoid"}, lambda run: run.stage.kind == "dpo"),
        ({"train_dataset": "data/v1_dpo_demo.yaml"}, lambda run: run.stage.kind == "dpo"),
        ({"train_dataset": "owner/rows"}, lambda run: run.data[0].path == "hf:owner/rows"),
    ],
)
def test_what_llama_factorys_v1_form_says(changes, check):
    run, text = convert({**V1, **changes})
    assert check(run)
    assert run.model == V1["model"] and run.out == V1["output_dir"]
    names = [*changes, *(f"{group}.{name}" for group, inner in changes.items() if isinstance(inner, dict) for name in inner)]
    assert not [
        name for name in names if not isinstance(changes.get(name), dict | str) and not re.search(rf"\b{re.escape(name)}\b", text)
    ]


@pytest.mark.parametrize("command, kind", [("sft", "sft"), ("train", "sft"), ("dpo", "dpo"), ("rm", "reward")])
def test_llama_factorys_v1_command_is_the_stage(command, kind):
    Path("v1.yaml").write_text(yaml.safe_dump(V1))
    run, text = convert(f"USE_V1=1 llamafactory-cli {command} v1.yaml learning_rate=3e-5 --seed 7")
    assert (run.stage.kind, run.optim.lr, run.seed) == (kind, 3e-5, 7) and "guessed" not in text


def test_what_llama_factorys_v1_form_does_else():
    said = refused({"model": "m", "peft_config": {"name": "lora", "adapter_name_or_path": "a", "export_dir": "x"}})
    assert "glmtune export m --adapter a --to x" in said
    assert "glmtune chat" in refused({"model": "m", "model_class": "llm", "sample_backend": "hf"})


OTHERS = {tool: sorted(marks) for tool, marks in MARKS.items() if tool not in DEFAULTS}
MODEL_KEYS = {"TRL": "model_name_or_path", "Axolotl": "base_model", "alpaca-lora": "base_model"}


@st.composite
def foreign_files(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A file of a tool that is not read: its model, some of its own names, some that everybody has."""
    tool = draw(st.sampled_from(sorted(OTHERS)))
    own = draw(st.lists(st.sampled_from(OTHERS[tool]), min_size=2, max_size=8, unique=True))
    common = draw(st.lists(st.sampled_from(["output_dir", "learning_rate", "num_train_epochs", "seed", "per_device_train_batch_size", "bf16",
                                            "gradient_accumulation_steps", "warmup_ratio", "lora_alpha", "weight_decay"]), unique=True))  # fmt: skip
    values = st.sampled_from([True, 1, 2e-4, "x", ["a"], None])
    tree = {name: {"_component_": "x"} if name == "_component_" else draw(values) for name in [*own, *common]}
    if draw(st.booleans()):
        tree[MODEL_KEYS.get(tool, "model")] = "org/model"
    return tool, tree


@cases(80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(foreign_files(), st.sampled_from(["old.yaml", "old.json"]))
def test_a_file_of_another_tool_is_refused_as_what_it_looks_like(file, name):
    tool, tree = file
    said = refused(tree, name)
    assert name in said
    if "looks like" in said and len([one for one in OTHERS if set(tree) & set(OTHERS[one])]) == 1:
        assert tool in said


@cases(100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*sorted(TRAINING_ARGUMENTS), "stage", "dataset", "template", "lora_rank", "data_path", "strange"]),
                       st.sampled_from([1, "x", True]), max_size=6),
       st.sampled_from(["model", "base_model", "model_id_or_path", "pretrain"]))  # fmt: skip
def test_a_file_that_names_its_model_never_becomes_one_of_another_model(tree, key):
    """Whatever else it holds: `model:` is no LLaMA-Factory, and no ChatGLM-6B that is guessed."""
    said = refused({**tree, key: "org/model"})
    assert "looks like" in said or "not a run file of a tool that is known here" in said


@pytest.mark.parametrize("command, tool", [
    ("swift sft --model Qwen/Qwen2.5-7B --dataset 'a#500' --response_prefix '' --tuner_type lora --output_dir o", "ms-swift"),
    ("NPROC_PER_NODE=2 swift rlhf --rlhf_type dpo --model m --dataset d", "ms-swift"),
    ("accelerate launch -m axolotl.cli.train config.yml", "Axolotl"),
    ("trl sft --model_name_or_path m --dataset_name d --output_dir o", "TRL"),
    ("tune run --nproc_per_node 2 lora_finetune_distributed --config llama3/8B_lora", "torchtune"),
    ("python -m mlx_lm.lora --model m --train --data d --iters 600", "mlx-lm"),
    ("mlx_lm.lora --config c.yaml", "mlx-lm"),
    ("python3 main.py --do_train --train_file t.json --prompt_column content --response_column summary --model_name_or_path THUDM/chatglm-6b"
     " --output_dir o --max_source_length 64 --pre_seq_len 128 --learning_rate 2e-2", "ptuning"),
    ("python finetune.py --base_model m --data_path d --lora_r 8 --lora_target_modules q_proj --num_epochs 3 --val_set_size 9", "alpaca-lora"),
    ("torchrun train.py --model_name_or_path m --data_path d --model_max_length 512 --lazy_preprocess True --output_dir o", "FastChat"),
    ("python sft.py --model_name_or_path m --dataset_name d --use_peft --lora_r 8", "TRL"),
])  # fmt: skip
def test_a_command_of_another_tool_is_refused_as_what_it_is(command, tool):
    said = refused(command, "old.sh")
    assert said.startswith("old.sh") and tool in said


def test_a_command_of_another_tool_beside_a_training_is_told():
    run, text = convert(f"{C} --lora_rank 3\nswift sft --model m --dataset d\n")
    assert run.method.rank == 3 and "not imported: swift: a command of ms-swift" in text


@pytest.mark.parametrize("old", [
    "python main.py --model m",
    "python main.py",
    "python finetune.py --dataset_dir d --model_path m --finetuning_type lora --output_dir o",
    "python src/train_bash.py --do_train --stage sft --data_file d.json --output_dir o",
    "python src/train_bash.py --do_train --stage sft --base m --dataset ours --output_dir o",
    "python finetune.py --dataset_path data/a --chatglm_path '' --base_model x --output_dir o",
])  # fmt: skip
def test_no_default_stands_for_what_the_file_says_under_another_name(old):
    said = refused(old, "old.sh")
    assert "old.sh" in said


def test_a_model_on_a_line_that_the_shell_drops_is_asked_for():
    said = refused("python finetune.py --dataset_path data/a --output_dir o\n    --chatglm_path m\n", "old.sh")
    assert "--chatglm_path stands on a line of its own" in said
    _, text = convert(RUN + "\n --hf_hub_token s3cret\n")
    assert "--hf_hub_token" in text and "s3cret" not in text


def test_texts_of_several_lines_come_back():
    system = "a\n\n b: {c}\n# d"
    assert lf(default_system=system)[0].system == system
    assert lf(default_system=system, template="fewshot")[0].system == system


def test_keys_that_stand_twice_are_refused():
    assert "'stage' stands twice" in refused('{"stage": "sft", "model_name_or_path": "m", "stage": "pt"}', "old.json")


# --- scripts --------------------------------------------------------------------------------------------------------------

RUN = "llamafactory-cli train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --stage sft --do_train --dataset ours --template qwen --output_dir x "


@pytest.mark.parametrize("name", ["cache_dir", "report_to", "default_system", "resume_from_checkpoint", "strange", "deepspeed"])
@pytest.mark.parametrize("empty", ["''", '""'])
def test_an_empty_argument_ends_nothing(name, empty):
    run, text = convert(f"{RUN} --{name} {empty} --finetuning_type full --learning_rate 3e-6 --num_train_epochs 7")
    assert (run.method.kind, run.optim.lr, run.optim.epochs) == ("full", 3e-6, 7)
    assert re.search(rf"\b{name}\b", text) and "more trainings" not in text
    assert name != "default_system" or run.system == ""


def test_scripts_as_they_are_written():
    run, _ = convert(RUN + "--learning_rate 1e-4 # was 1e-5\n")
    assert run.optim.lr == 1e-4
    run, _ = convert(RUN + "--learning_rate 1e-4 \\")
    assert run.optim.lr == 1e-4
    run, _ = convert(RUN + "--learning_rate 1e-4 \\\n")
    assert run.optim.lr == 1e-4
    run, text = convert(RUN + "\\\n --learning_rate 1e-4 \\\n # --num_train_epochs 9 \\\n --lora_rank 2\n")
    assert (run.optim.lr, run.optim.epochs, run.method.rank) == (1e-4, 3, 8)
    assert "not imported: line 4: --lora_rank (2): the line before does not go on" in text
    run, text = convert(RUN + "\\   \n --learning_rate 1e-4")
    assert run.optim.lr == 1e-4 and "blanks behind the backslash" in text
    run, _ = convert(f"cd x && {RUN} --learning_rate 1e-4 > log.txt 2>&1 &")
    assert run.optim.lr == 1e-4
    run, _ = convert(f"ARGS=(--learning_rate 1e-4 --default_system 'Be brief.')\n{RUN} \"${{ARGS[@]}}\" 2>&1 | tee log")
    assert (run.optim.lr, run.system) == (1e-4, "Be brief.")
    run, text = convert(f"for r in 2 4; do {RUN} --lora_rank $r; done")
    assert run.method.rank == 2 and "1 more trainings" in text
    run, _ = convert(f"cat > made.yaml <<EOF\n{yaml.safe_dump(LF)}EOF\nllamafactory-cli train made.yaml lora_rank=4")
    assert run.method.rank == 4
    run, text = convert(RUN + '--lora_rank 4 --lora_rank 6 "$@"')
    assert run.method.rank == 6 and "lora_rank (4): given again further on" in text


def test_what_only_a_running_shell_knows_is_asked_for_where_it_matters():
    assert "output_dir is out-$(date), and $(date) is set nowhere in this file" in refused(
        RUN + '--output_dir "out-$(date)"', "old.sh"
    )
    _, text = convert(RUN + '--run_name "r-$(date)" --hub_model_id $USER/x')
    assert "not needed: run_name" in text and "hub_model_id ($USER/x)" in text


VALUES = {
    "lora_rank": st.integers(1, 64), "learning_rate": st.sampled_from(["1e-4", "3e-05", "0.001"]), "num_train_epochs": st.integers(1, 9),
    "cutoff_len": st.integers(16, 4096), "warmup_ratio": st.sampled_from(["0.1", "0"]), "seed": st.integers(0, 99),
    "default_system": st.text(st.sampled_from("ab '\"$`\\#;&|<>(){}*=\n中-"), max_size=8).filter(lambda text: text.strip().lower() not in ("", "none", "null")
                                                                                            and "\\n" not in text),
    "cache_dir": st.just(""), "report_to": st.just("none"), "use_galore": st.just(None), "plot_loss": st.just(None),
    "brand_new": st.sampled_from(["", "x y", "#1", "-1"]), "other_new": st.just(None),
}  # fmt: skip


@st.composite
def trainings(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A script with one training of LLaMA-Factory, and what it says."""
    import shlex

    names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=9))
    said = {name: draw(VALUES[name]) for name in names}
    lines = ["#!/bin/bash", "set -x"]
    text = RUN.strip()
    for index, (name, value) in enumerate(said.items()):
        text += draw(st.sampled_from([" ", " \\\n    ", "  "])) + f"--{name}"
        if value is None:
            continue
        quoted = draw(st.sampled_from([shlex.quote(str(value)), '"' + re.sub(r'(["\\$`])', r"\\\1", str(value)) + '"']))
        if draw(st.booleans()) and value != "":
            lines.append(f"V{index}={quoted}")
            quoted = f'"${{V{index}}}"'
        text += draw(st.sampled_from([" ", "=", " \\\n "])) + quoted
    end = draw(
        st.sampled_from(
            ["", " # don't", " \\\n", " 2>&1 | tee log.txt", " && echo done", " &", "\n# --lora_rank 999\n", " > log 2> err"]
        )
    )
    return "\n".join([*lines, text + end]), said


@cases(12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trainings())
def test_nothing_that_a_script_says_is_lost(training):
    script, said = training
    run, text = convert(script)
    now = {"lora_rank": run.method.rank, "learning_rate": run.optim.lr, "num_train_epochs": run.optim.epochs, "cutoff_len": run.max_length,
           "warmup_ratio": run.optim.warmup, "seed": run.seed, "default_system": run.system}  # fmt: skip
    for name, value in said.items():
        assert re.search(rf"\b{name}\b", text), name
        if name in now:
            assert now[name] == (value if name == "default_system" else float(value))
    absent = {"lora_rank": 8, "learning_rate": 5e-5, "num_train_epochs": 3, "cutoff_len": 2048, "default_system": None}
    assert all(now[name] == value for name, value in absent.items() if name not in said)


# --- each tool's own ------------------------------------------------------------------------------------------------------


def test_lora_trainers_version_with_one_limit():
    run, text = convert(A + "--CUTOFF_LEN 256 --EPOCHS 50 --OUTPUT_DIR o")
    assert (run.quant, run.max_length, run.method.targets, run.method.share_a, run.stage.learn) == (
        "int8",
        256,
        ["query_key_value"],
        True,
        "everything",
    )
    template: Any = run.template
    assert "### Instruction: \n{content}" in template.user and template.assistant == "### Answer: \n{content}{stop}"
    assert "written into its version with CUTOFF_LEN" in text and "written into that program" not in text
    assert convert(A + "--CUTOFF_LEN 256 --BIT_4")[0].quant == "nf4"
    run, text = convert(A + "--CUTOFF_LEN 512 --DATA_TYPE txt")
    assert (run.max_length, run.stage.kind) == (512, "pretrain") and "CUTOFF_LEN (512)" not in text


def test_prefixes_start_at_random_as_published():
    for command in (
        C + "--finetuning_type p_tuning",
        C + "--finetuning_type ptuning",
        E.replace("train_lora", "train_ptuning") + "--pre_seq_len 8",
    ):
        run, text = convert(command)
        assert run.method.init == "random" and "init: random  # as published" in text


def test_llm_tunings_parent():
    text = ("python tokenize_dataset_rows.py --jsonl_path data/a.jsonl --save_path data/a --max_seq_length 200\n"
            "python finetune.py --dataset_path data/a --lora_rank 4 --per_device_train_batch_size 6 --max_steps 50 --fp16 --output_dir o\n")  # fmt: skip
    run, said = convert(text)
    assert (run.model, run.method.rank, run.method.alpha, run.method.dropout, run.quant) == ("THUDM/chatglm-6b", 4, 32, 0.1, "int8")
    assert (run.data[0].path, run.data[0].columns, run.max_length) == (
        "data/a.jsonl",
        {"prompt": "context", "response": "target"},
        200,
    )
    assert "a run of ChatGLM-Tuning" in said
    run, said = convert(text.splitlines()[1] + " --chatglm_path m/chatglm2")
    assert (run.model, run.data[0].path) == ("m/chatglm2", "data/a.jsonl") and "is a folder of tokens" in said


@pytest.mark.parametrize("old, ours", [
    ("python cli_demo.py --model_name_or_path m", "glmtune chat"),
    ("sh x.sh; python inference.py --PROMPT hi", "glmtune chat"),
    ("python tokenize_dataset_rows.py --input_file a.json --save_name a", "glmtune data tokenize"),
    ("CUDA_VISIBLE_DEVICES=0 python predict.py --llm_ckp m", "glmtune predict"),
    ("llamafactory-cli chat examples/x.yaml", "glmtune chat"),
])  # fmt: skip
def test_what_trains_nothing_is_told_what_does_it_here(old, ours):
    said = refused(old, "old.sh")
    assert "trains nothing" in said and f"here that is: {ours}" in said


def test_programs_are_not_read():
    for name, said in (
        ("06-lora.py", "programs are not run or read"),
        ("lora.ipynb", "migrating.md"),
        ("cli_demo.py", "glmtune chat"),
    ):
        assert oldruns.is_run_file(name) is False
        assert said in refused("{}", name)
        assert oldruns.is_run_file(name)


@pytest.mark.parametrize(
    "model, said",
    [("THUDM/chatglm-6b", True), ("path_to_chatglm6b_model", True), ("path_to_chatglm2_6b", False), ("THUDM/chatglm2-6b", False)],
)
def test_chatglm_6b_alone_was_trained_in_other_rounds(model, said):
    assert ("there ChatGLM-6B was trained" in convert(C + f"--model_name_or_path {model}")[1]) == said


def test_what_is_said_of_decoding_is_true():
    _, text = convert(RUN + "--num_beams 2 --top_k 50 --repetition_penalty 1.1")
    beams, options_ = (next(line for line in text.splitlines() if name in line) for name in ("num_beams", "top_k"))
    assert "no beams" in beams and "take these as options" in options_ and "repetition_penalty" in options_


@pytest.mark.parametrize("model, warned", [
    ("THUDM/chatglm3-6b", True), ("THUDM/glm-4-9b-chat-hf", True), ("THUDM/chatglm2-6b", False), ("Qwen/Qwen3-4B", False), ("zai-org/GLM-4.5-Air", False),
])  # fmt: skip
def test_fp16_is_warned_of_where_numbers_pass_it(model, warned):
    run, text = convert({**LF, "model_name_or_path": model, "fp16": True})
    assert run.precision == "fp16" and ("pass its largest number" in text) == warned
