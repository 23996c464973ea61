"""Peak memory and time of loading a ChatGLM3-6B-sized folder (6.2 B parameters, random numbers, bf16) and running one forward.

python bench/load_6b.py FOLDER [bf16|fp16|fp32] [--save NAME] [--small]     FOLDER is made first where it is missing (12.5 GB in shards)
"""

import json
import tempfile
import time
from pathlib import Path

import _common as common

CONFIG = {
    "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "ffn_hidden_size": 13696, "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 8192, "torch_dtype": "bfloat16", "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "num_layers": 2,
    "padded_vocab_size": 512,
}
SHARD = 1.8e9  # bytes


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("dtype", nargs="?", choices=("bf16", "fp16", "fp32"), default="bf16")
    options = common.parse(parser)
    with tempfile.TemporaryDirectory() as work:
        if options.small:
            folder = Path(work) / "model"
            make(folder, CONFIG | SMALL, 1e5)
        elif not options.folder:
            parser.error("name a folder (it is made where it is missing), or --small")
        else:
            folder = Path(options.folder)
            if not folder.is_dir():
                make(folder, CONFIG, SHARD)
        measure(options, folder)


def measure(options, folder: Path) -> None:
    import torch
    import transformers.models.glm.modeling_glm  # noqa: F401  (so that its code is not counted)

    from glmtune import families

    say = common.saying(options)
    say(common.told("FOLDER", options.dtype))
    before, start = common.peak_gb(), time.time()
    model = families.load_model(folder, dtype=options.dtype, device="cpu")
    loaded, seconds = common.peak_gb(), time.time() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {weights:.2f} GB as {model.dtype}")
    above = loaded - before
    say(f"loaded in {seconds:.0f} s; peak above the start {above:.2f} GB = {above / weights:.3f} times the weights")
    start = time.time()
    with torch.inference_mode():
        logits = model(torch.arange(16).unsqueeze(0)).logits
    say(
        f"one forward of 16 tokens: {time.time() - start:.1f} s, logits {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}; "
        f"peak {common.peak_gb():.2f} GB"
    )


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    width, inner, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads = config["num_attention_heads"] + 2 * config["multi_query_group_num"]
    found: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, width)}
    for i in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        found |= {
            at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,),
            at + "self_attention.query_key_value.weight": (heads * config["kv_channels"], width),
            at + "self_attention.query_key_value.bias": (heads * config["kv_channels"],), at + "self_attention.dense.weight": (width, width),
            at + "mlp.dense_h_to_4h.weight": (2 * inner, width), at + "mlp.dense_4h_to_h.weight": (width, inner),
        }  # fmt: skip
    return found | {"transformer.encoder.final_layernorm.weight": (width,), "transformer.output_layer.weight": (vocab, width)}


def make(folder: Path, config: dict, shard: float) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator, where = torch.Generator().manual_seed(0), {}
    pattern = (torch.randn(1 << 20, generator=generator) * 0.02).to(torch.bfloat16)
    groups, size = [[]], 0
    for name, shape in shapes(config).items():
        if size > shard:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += 2 * torch.Size(shape).numel()
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        save_file(
            {n: pattern.repeat(-(-torch.Size(s).numel() >> 20))[: torch.Size(s).numel()].view(s) for n, s in group}, folder / file
        )
        where |= {n: file for n, _ in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
