"""ckpt and sample: what is exported is what is loaded, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from runs import TINY, make_agreement, make_run
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nebula.cli.ckpt import TrainedModel, load_model, pack
from nebula.cli.main import main
from nebula.models.init import initial, parameter_shapes

VOCABULARY = {"<|end|>": 0, "def": 1, "x": 2}
TOKENIZER = Tokenizer(WordLevel(VOCABULARY, unk_token="x")).to_str()


@pytest.fixture(scope="module")
def model():
    tensors = {name: initial(name, shape, TINY, 0) for name, shape in parameter_shapes(TINY).items()}
    return TrainedModel(make_agreement(TOKENIZER), TOKENIZER, tensors, {"version": "6", "digest": "sha256:0"})


@pytest.fixture
def run_dir(tmp_path, model, monkeypatch):
    """A run's folder whose coordinator state is `model`."""
    folder = make_run(tmp_path, 6, tokenizer=TOKENIZER)
    told = {"version": 6, "digest": "sha256:0"}
    monkeypatch.setattr("nebula.federation.restore.load_global", lambda *_: (model.tensors, told))
    return folder


def test_export_and_load_give_the_same_model(run_dir, model, capsys):
    assert main(["ckpt", "export", str(run_dir)]) == 0
    file = run_dir / "model.safetensors"
    assert str(file) in capsys.readouterr().out
    for source in (file, run_dir):
        loaded = load_model(source)
        assert (loaded.agreement, loaded.tokenizer, loaded.info) == (model.agreement, model.tokenizer, model.info)
        assert loaded.tensors.keys() == model.tensors.keys()
        assert all(torch.equal(loaded.tensors[name], model.tensors[name]) for name in model.tensors)
    assert [p.name for p in run_dir.iterdir() if p.name.startswith(".")] == []


def test_export_to_where_nothing_can_be_written(run_dir, tmp_path, capsys):
    assert main(["ckpt", "export", str(run_dir), "--out", str(tmp_path / "no" / "m.safetensors")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["run", "file"])
def test_sample_continues_the_prompt_the_same_way_for_the_same_seed(run_dir, model, source, capsys):
    path = run_dir
    if source == "file":
        path = run_dir / "m.safetensors"
        path.write_bytes(pack(model))
    texts = []
    for _ in range(2):
        assert main(["sample", str(path), "--prompt", "def", "--tokens", "12", "--seed", "1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def")
    assert texts[0] == texts[1]
    assert main(["sample", str(path), "--prompt", "", "--json"]) == 2
    assert "prompt is empty" in json.loads(capsys.readouterr().out)["error"]["message"]


def broken(model, path, how):
    """Write a file that is not quite an exported model."""
    data = pack(model)
    name = next(iter(model.tensors))
    without = {key: tensor for key, tensor in model.tensors.items() if key != name}
    match how:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "huge header":
            path.write_bytes(b"\xff" * 64)
        case "foreign":
            save_file({"w": torch.zeros(2)}, path)
        case "other agreement":
            save_file(dict(model.tensors), path, metadata={"nebula.agreement": "{}", "nebula.tokenizer": ""})
        case "parameter missing":
            path.write_bytes(pack(replace(model, tensors=without)))
        case "wrong shape":
            path.write_bytes(pack(replace(model, tensors={**model.tensors, name: torch.zeros(3)})))
        case "extra parameter":
            path.write_bytes(pack(replace(model, tensors={**model.tensors, "more": torch.zeros(3)})))
        case "other tokenizer":
            path.write_bytes(pack(replace(model, tokenizer="{}")))


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "empty",
        "truncated",
        "huge header",
        "foreign",
        "other agreement",
        "parameter missing",
        "wrong shape",
        "extra parameter",
        "other tokenizer",
    ],
)
def test_a_file_that_is_no_model_is_told(tmp_path, model, how, capsys):
    path = tmp_path / "m.safetensors"
    broken(model, path, how)
    assert main(["sample", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(path) in printed.err
    assert "hint: " in printed.err
    assert "unexpected" not in printed.err


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert main(["sample", str(tmp_path)]) == 2
    assert main(["ckpt", "list", str(tmp_path)]) == 2
    assert main(["ckpt", "export", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("is not a run's folder") == 3
