"""Packed frozen weights: what each kind stands for, exact products and gradients, loading without a 16-bit copy."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glmtune import families, quant
from glmtune.errors import UserError

from . import published

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
KINDS = sorted(quant.KINDS)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return bool((a.double() - b.double()).norm() <= relative * b.double().norm())


def test_the_kinds_that_are_known_before_torch_is_loaded_are_those_there_are():
    assert set(families.QUANTS) == set(quant.KINDS) and all(name == made.kind for name, made in quant.KINDS.items())


# --- products and gradients -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that a small weight comes in several pieces."""
    monkeypatch.setattr(quant, "UNPACKING", 1 << 12)
    monkeypatch.setattr(quant, "PACKING", 1 << 12)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_dense_weight(
    kind: str, dtype: torch.dtype, relative: float, small_pieces: None
):
    packed = quant.pack(weight(150, 128), kind)
    assert len(list(packed.pieces())) > 1
    dense = packed.dense(dtype)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = packed(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(grad)
    assert y.dtype == x.dtype == x.grad.dtype and close(y, x.detach().double() @ dense.double().T, relative)
    assert close(x.grad, grad.double() @ dense.double(), relative)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_in_16_bits_is_the_rounded_one(kind: str):
    packed = quant.pack(weight(64, 128), kind)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(packed.dense(dtype), packed.dense().to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_in_between_leaves_gradients_as_they_were(kind: str, dtype: torch.dtype):
    packed, x = quant.pack(weight(64, 64), kind), weight(3, 64, dtype, seed=1).requires_grad_()

    def gradient() -> Tensor:
        packed.train()
        (made,) = torch.autograd.grad(packed(x).square().sum(), x)
        return made

    before = gradient()
    packed.eval()
    with torch.no_grad():
        first = packed(x)
    with torch.inference_mode():
        second = packed(x)
    assert torch.equal(gradient(), before) and before.abs().sum() > 0 and torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(37, 54), (5, 6), (1, 2), (96, 48)])
def test_any_width_is_packed(kind: str, shape: tuple[int, int]):
    """bitsandbytes' own layer crashes on widths not divisible by 32, and takes wrong scales on those not divisible by 64."""
    dense = quant.pack(weight(*shape), kind).dense()
    steps = {"nf4": 0.16, "int8": 0.004, "chatglm-int4": 0.08, "chatglm-int8": 0.0045}  # half the widest step, of the largest
    assert dense.shape == shape
    largest = weight(*shape).abs().max() if kind == "nf4" else weight(*shape).abs().amax(-1, keepdim=True)
    assert ((dense - weight(*shape)).abs() <= steps[kind] * largest).all()


def test_an_odd_width_has_no_two_numbers_a_byte():
    with pytest.raises(UserError, match=r"layers\.0\.up_proj \[4, 5\].*5 columns"):
        quant.pack(weight(4, 5), "chatglm-int4", "layers.0.up_proj")
    assert quant.pack(weight(4, 5), "nf4").dense().shape == (4, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_no_scale_can_hold_are_refused(kind: str, bad: float):
    broken = weight(4, 64)
    broken[2, 7] = bad
    if bad == 1e30 and not kind.startswith("chatglm"):
        assert quant.pack(broken, kind).dense().isfinite().all()
    else:
        with pytest.raises(UserError, match="not finite"):
            quant.pack(broken, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_one(kind: str):
    some = weight(4, 128)
    some[1] = 0
    assert not quant.pack(some, kind).dense()[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_of_the_model_moves_no_number(kind: str):
    packed = quant.pack(weight(64, 64), kind)
    before = packed.dense()
    holder = nn.Sequential(packed).to(torch.bfloat16).half().float()
    assert torch.equal(holder[0].dense(), before) and not list(holder.parameters()) and not holder.state_dict()


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 0.516), ("int8", 1.0), ("chatglm-int4", 0.5), ("chatglm-int8", 1.0)])
def test_bytes_for_each_weight(kind: str, expected: float):
    packed = quant.pack(weight(512, 4096), kind)
    assert packed.nbytes / (512 * 4096) == pytest.approx(expected, rel=0.003)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS)
def test_packing_gives_the_same_bits_with_any_number_of_threads(kind: str):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(list(quant.pack(weight(700, 4096), kind).buffers()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


# --- what the numbers are -------------------------------------------------------------------------------------------------


def test_chatglm_numbers_by_hand():
    """int4: scale = fp16(0.875 / 7) = 0.125, codes 0.875 / 0.125 = 7, -0.5 -> -4, 0.1875 -> 1.5 -> 2 (half to even), 0.0625 -> 0.5 -> 0;
    bytes 0x7c and 0x20. int8: scale = fp16(0.875 / 127) = 0.0068893..., codes 127, -73 (72.58), 27 (27.2), 9 (9.07)."""
    row = torch.tensor([[0.875, -0.5, 0.1875, 0.0625]]).half()
    four: Any = quant.pack(row, "chatglm-int4")
    assert four.scale.tolist() == [0.125] and four.codes.tolist() == [[0x7C, 0x20]]
    assert four.dense().tolist() == [[0.875, -0.5, 0.25, 0.0]]
    eight: Any = quant.pack(row, "chatglm-int8")
    assert eight.scale.dtype == torch.float16 and eight.scale.item() == np.float16(0.875 / 127)
    assert eight.codes.tolist() == [[127, -73, 27, 9]]


def by_numpy(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The published quantize() on fp16 weights, one operation after another in fp16."""
    scale = (np.abs(weight).max(-1) / np.float16(2 ** (bits - 1) - 1)).astype(np.float16)
    codes = np.rint((weight / scale[:, None]).astype(np.float16)).astype(np.int16).astype(np.int8)
    if bits == 4:
        codes = ((codes[:, 0::2].astype(np.uint8) << 4) | (codes[:, 1::2].astype(np.uint8) & 15)).astype(np.uint8).view(np.int8)
    return codes, scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1.0, 0.02, 2e-4])  # the last: scales are fp16 subnormals, and some numbers wrap as they did
def test_chatglm_packing_equals_an_independent_one_bit_for_bit(bits: int, size: float):
    some = (weight(200, 256) * 50 * size).half()
    codes, scale = by_numpy(some.numpy(), bits)
    packed: Any = quant.pack(some, f"chatglm-int{bits}")
    assert np.array_equal(packed.codes.numpy(), codes) and np.array_equal(packed.scale.numpy(), scale)
    for other in (torch.float32, torch.float64):  # `.half()` comes first
        again: Any = quant.pack(some.to(other), f"chatglm-int{bits}")
        assert torch.equal(again.codes, packed.codes) and torch.equal(again.scale, packed.scale)
    assert bits == 4 or size > 1e-3 or (packed.codes == -128).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_codes_are_those_of_bitsandbytes(dtype: torch.dtype):
    import bitsandbytes.functional as functional

    some = weight(300, 128, dtype)
    codes, state = functional.quantize_4bit(some, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed: Any = quant.pack(some, "nf4")
    assert torch.equal(packed.codes.flatten(), codes.flatten())
    assert close(packed.dense(), functional.dequantize_4bit(codes, state).float(), 1e-6 if dtype == torch.float32 else 1e-2)


def test_nf4_by_the_table():
    """One block with the largest number 2: each number is the nearest of the sixteen times 2, but for the 8 bits of the scale itself."""
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type("nf4", device="cpu")
    assert torch.allclose(quant.pack(2 * table.repeat(4)[None], "nf4").dense(), 2 * table.repeat(4)[None], rtol=1e-6)


def test_int8_has_the_weights_of_llm_int8():
    import bitsandbytes.functional as functional

    some = weight(64, 256).half()
    codes, largest, _ = functional.int8_vectorwise_quant(some.clone())
    packed: Any = quant.pack(some, "int8")
    assert (packed.codes.int() - codes.int()).abs().max() <= 1 and (
        packed.codes != codes
    ).float().mean() < 0.02  # theirs rounds in fp16
    assert torch.allclose(packed.scale * 127, largest.flatten(), rtol=1e-6)


# --- loading --------------------------------------------------------------------------------------------------------------


def logits(model: Any, family: str) -> Tensor:
    ids = torch.arange(20, 44).unsqueeze(0)
    if family.startswith("chatglm-6b"):
        config = model.config
        ids = torch.cat([ids[:, :12], torch.tensor([[config.gmask_token_id, config.bos_token_id]]), ids[:, 12:]], 1)
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = published.FAMILIES[family](tmp_path_factory.mktemp("models") / family)
        return folders[family]

    return make


@pytest.mark.few(1)
@pytest.mark.parametrize("family", published.FAMILIES)
def test_every_family_loads_packed(family: str, made: Any):
    folder = made(family)
    dense = logits(families.load_model(folder, dtype="fp32", device="cpu"), family)
    own = family.startswith(("chatglm", "glm"))
    for kind in KINDS:
        if kind.startswith("chatglm") and not own:
            with pytest.raises(UserError, match="quant=nf4 or quant=int8"):
                families.load_model(folder, dtype="fp32", device="cpu", quant=kind)
            continue
        model = families.load_model(folder, dtype="fp32", device="cpu", quant=kind)
        layers = {name for name, module in model.named_modules() if isinstance(module, quant.QuantLinear)}
        assert layers == set(families.linear_names(folder))
        assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == ["lm_head"]
        assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
        found = logits(model, family)
        assert close(found, dense, 0.02 if "8" in kind else 0.3) and not torch.equal(found, dense)


@pytest.mark.parametrize("kind", ["nf4", "chatglm-int8"])
def test_weights_are_packed_from_the_file_and_not_from_the_cast_ones(kind: str, made: Any):
    """fp32 weights, opened in bf16: a second rounding would come on top."""
    folder = made("chatglm2-6b")
    a, b = (families.load_model(folder, dtype=dtype, device="cpu", quant=kind) for dtype in ("fp32", "bf16"))
    layers = [name for name, module in a.named_modules() if isinstance(module, quant.Packed)]
    assert layers and all(torch.equal(a.get_submodule(name).dense(), b.get_submodule(name).dense()) for name in layers)
    assert b.lm_head.weight.dtype == b.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def as_published(plain: Path, folder: Path, bits: int) -> Path:
    """A copy of a folder as its int4 and int8 versions were published: the blocks' linear layers and their scales."""
    folder.mkdir()
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if name.endswith("weight") and tensor.ndim == 2 and ".layers." in name]:
        codes, scale = by_numpy(tensors[name].half().numpy(), bits)
        tensors[name], tensors[name + "_scale"] = torch.from_numpy(codes), torch.from_numpy(scale)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    return folder


@pytest.mark.few(1)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["chatglm-6b", "chatglm2-6b"])
def test_a_published_packed_checkpoint_stays_packed(family: str, bits: int, made: Any, tmp_path: Path):
    """Rows of the fused tensors carry their scales along: the same function as unpacked; and as packing the 16-bit folder at load."""
    folder = as_published(made(family), tmp_path / "packed", bits)
    ours = families.load_model(made(family), dtype="fp32", device="cpu", quant=f"chatglm-int{bits}")
    unpacked = families.load_model(folder, dtype="fp32", device="cpu")
    for wanted in ("keep", f"chatglm-int{bits}"):
        kept = families.load_model(folder, dtype="fp32", device="cpu", quant=wanted)
        layers = [name for name, module in kept.named_modules() if isinstance(module, quant.QuantLinear)]
        assert set(layers) == set(families.linear_names(folder)) == set(families.linear_names(made(family)))
        for name in layers:
            packed = kept.get_submodule(name).packed
            assert packed.kind == f"chatglm-int{bits}" and torch.equal(packed.dense(), unpacked.get_submodule(name).weight), name
        assert close(logits(kept, family), logits(unpacked, family), 1e-6)
        assert torch.equal(logits(kept, family), logits(ours, family))
    assert families.num_parameters(folder) == families.num_parameters(made(family))
    with pytest.raises(UserError, match=f"published as chatglm-int{bits}.*16-bit"):
        families.load_model(folder, device="cpu", quant="nf4")


MEASURE = """
import resource, sys
import glmtune
from glmtune import families, quant
import torch, transformers.models.glm.modeling_glm
for kind in quant.KINDS:
    families.load_model(sys.argv[1], dtype="bf16", device="cpu", quant=kind)     # everything is imported and warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = families.load_model(sys.argv[2], dtype="bf16", device="cpu", quant=sys.argv[3])
held = sum(p.nbytes for p in model.parameters()) + sum(m.nbytes for m in model.modules() if isinstance(m, quant.Packed))
print(held, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "chatglm-int4", "int8"])
def test_loading_holds_no_16_bit_copy(kind: str, tmp_path: Path):
    """Peak above what the process had: what stays, and the pieces on the way (20 MB, whatever the model), not the weights in 16 bits."""
    small = published.glm(tmp_path / "small", "THUDM/chatglm3-6b")
    big = published.big_glm(tmp_path / "big", dtype="float16", shards=2)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(small), str(big), kind], capture_output=True, text=True, check=True)
    held, peak = map(int, done.stdout.split())
    dense = 2 * families.num_parameters(big)
    assert held < 0.7 * dense and peak < held + 0.4 * dense, (held, peak, dense)


# --- folders that transformers saved packed, and families that only it can place -----------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, None),
    ],
)
def test_a_folder_saved_with_bitsandbytes_is_opened(settings: dict[str, Any], kind: str | None, made: Any, tmp_path: Path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = made("qwen2.5")
    config: Any = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32, device_map="cpu").save_pretrained(
        tmp_path
    )
    if kind is None:
        with pytest.raises(UserError, match="fp4.*take the original model"):
            families.load_model(tmp_path, device="cpu")
        return
    assert families.published_quant(tmp_path) == kind and families.tensor_shapes(tmp_path) == families.tensor_shapes(plain)
    kept = families.load_model(tmp_path, dtype="fp32", device="cpu", quant="keep")
    unpacked = families.load_model(tmp_path, dtype="fp32", device="cpu")
    ours = families.load_model(plain, dtype="fp32", device="cpu", quant=kind)
    assert {m.packed.kind for m in kept.modules() if isinstance(m, quant.QuantLinear)} == {kind}
    assert not any(isinstance(m, quant.QuantLinear) for m in unpacked.modules())
    assert close(logits(kept, ""), logits(unpacked, ""), 1e-5)
    assert close(logits(kept, ""), logits(ours, ""), 1e-5 if math.prod(("double" in str(settings), kind == "nf4")) else 0.02)
    assert "quantization_config" not in kept.config.to_dict()
    kept.to("meta")
    with pytest.raises(UserError, match="round rounded weights"):
        families.load_model(tmp_path, device="cpu", quant="int8" if kind == "nf4" else "nf4")


def test_a_family_whose_names_only_transformers_knows_is_packed_too(tmp_path: Path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    plain: Any = PhiForCausalLM(PhiConfig(**sizes)).eval()
    plain.save_pretrained(tmp_path)
    model = families.load_model(tmp_path, dtype="fp32", device="cpu", quant="int8")
    assert sum(isinstance(module, quant.QuantLinear) for module in model.modules()) == 12
    assert close(logits(model, ""), logits(plain, ""), 0.02)


def test_a_family_whose_blocks_are_not_linear_layers_is_refused(tmp_path: Path):
    """GPT-2's are of another class: nothing would be packed, and nothing said."""
    from transformers import GPT2Config, GPT2LMHeadModel

    plain: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    plain.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only 0% of the weights"):
        families.load_model(tmp_path, device="cpu", quant="int8")


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("nf5", "'nf5' is not known.*did you mean.*nf4"), ("keep", "published in int4 or int8"), ("chatglm-int4", "ChatGLM's own")],
)
def test_wrong_kinds_are_refused(wanted: str, message: str, made: Any):
    with pytest.raises(UserError, match=message):
        families.load_model(made("qwen3"), device="cpu", quant=wanted)


def test_nf4_without_the_library_names_the_extra(made: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r'pip install "glmtune\[quant\]"'):
        families.load_model(made("qwen3"), device="cpu", quant="nf4")
    assert families.load_model(made("qwen3"), device="cpu", quant="int8")
