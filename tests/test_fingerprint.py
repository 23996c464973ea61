"""A model's fingerprint follows from what it computes with, and from nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmtune.errors import UserError
from glmtune.families.fingerprint import fingerprint

from .cases import cases


def changed(source: Path, to: Path, change) -> Path:
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@cases(10)
@given(st.data())
def test_every_number_counts(tiny_model, tmp_path_factory, data):
    def change(tensors):
        name = data.draw(st.sampled_from(sorted(tensors)))
        flat = tensors[name].view(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] += 1e-3

    assert fingerprint(changed(tiny_model, tmp_path_factory.mktemp("m") / "m", change)) != fingerprint(tiny_model)


def test_shards_place_and_metadata_do_not_count(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    (tmp_path / "cut" / "model.safetensors").unlink()
    names, where = sorted(tensors, reverse=True), {}
    for number in (1, 2, 3):
        file = f"model-0000{number}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number - 1 :: 3]}
        save_file(part, tmp_path / "cut" / file, metadata={"format": "pt", "other": "words"})
        where |= dict.fromkeys(part, file)
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere", "transformers_version": "9"}))
    assert fingerprint(tmp_path / "cut") == fingerprint(tiny_model)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}])
def test_the_config_counts(tiny_model, tmp_path, change):
    shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    assert fingerprint(tmp_path / "m") != fingerprint(tiny_model)


def test_a_file_that_changes_in_place_is_read_again(tiny_model, tmp_path):
    """Also where the copy brings its size and mtime along."""
    folder = changed(tiny_model, tmp_path / "m", lambda tensors: None)
    other = changed(tiny_model, tmp_path / "o", lambda tensors: tensors["model.norm.weight"].mul_(2)) / "model.safetensors"
    file = folder / "model.safetensors"
    os.utime(file, ns=(1, 1))
    before = fingerprint(folder)
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(1, 1))
    assert fingerprint(folder) != before == fingerprint(tiny_model)


def test_bin_files_count(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    tensors["model.norm.weight"][0] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    assert fingerprint(folder) != before


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        fingerprint(tmp_path)
