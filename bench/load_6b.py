"""Peak memory and time of loading a ChatGLM3-6B-sized folder (6.2 B parameters, random numbers, bf16) and running one forward.

python bench/load_6b.py FOLDER [bf16|fp16|fp32]     FOLDER is made first where it is missing (12.5 GB in shards)
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from glmtune import families

CONFIG = {
    "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "ffn_hidden_size": 13696, "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 8192, "torch_dtype": "bfloat16", "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    width, inner, vocab = 4096, 13696, 65024
    found: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, width)}
    for i in range(28):
        at = f"transformer.encoder.layers.{i}."
        found |= {
            at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,),
            at + "self_attention.query_key_value.weight": (4608, width), at + "self_attention.query_key_value.bias": (4608,),
            at + "self_attention.dense.weight": (width, width), at + "mlp.dense_h_to_4h.weight": (2 * inner, width),
            at + "mlp.dense_4h_to_h.weight": (width, inner),
        }  # fmt: skip
    return found | {"transformer.encoder.final_layernorm.weight": (width,), "transformer.output_layer.weight": (vocab, width)}


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator, names, where = torch.Generator().manual_seed(0), list(shapes().items()), {}
    pattern = (torch.randn(1 << 20, generator=generator) * 0.02).to(torch.bfloat16)
    groups, size = [[]], 0
    for name, shape in names:
        if size > 1.8e9:
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
    (folder / "config.json").write_text(json.dumps(CONFIG))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


folder = Path(sys.argv[1])
if not folder.is_dir():
    make(folder)
import transformers.models.glm.modeling_glm  # noqa: E402, F401  (so that its code is not counted)

before, start = peak(), time.time()
model = families.load_model(folder, dtype=sys.argv[2] if len(sys.argv) > 2 else "bf16", device="cpu")
loaded, seconds = peak(), time.time() - start
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {weights:.2f} GB as {model.dtype}")
print(
    f"loaded in {seconds:.0f} s; peak above the start {loaded - before:.2f} GB = {(loaded - before) / weights:.3f} times the weights"
)
start = time.time()
with torch.inference_mode():
    logits = model(torch.arange(16).unsqueeze(0)).logits
print(
    f"one forward of 16 tokens: {time.time() - start:.1f} s, logits {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}; peak {peak():.2f} GB"
)
