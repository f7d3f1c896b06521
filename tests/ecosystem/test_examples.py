"""The examples, run as their README says, with two processes or workers on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import lsg_patch
from tests.models import tiny_model
from tests.tokenizers import real_tokenizer, text_of

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def model_folder(folder: Path, head: str) -> Path:
    folder.mkdir()
    real_tokenizer(folder)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    tiny_model("bert", getattr(transformers, head), **dropout).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Training


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small run: the class is told by a word behind what the model reads unpatched."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # the example changes it
    AcceleratorState._reset_state(True)
    words = {"few": "w7", "many": "w9"}
    rows = [
        {"text": f"{text_of(70 + 5 * i)} {word}", "label": label}
        for i in range(6)
        for label, word in words.items()
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    model = model_folder(tmp_path / "tiny", "BertForSequenceClassification")
    arguments = ["--model", str(model), "--data", str(data), "--max-length", "128"]
    return [*arguments, "--block-size", "8", "--max-steps", "4", "--save-steps", "2"]


def losses(out: Path) -> Any:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["losses"]


def test_training_on_two_processes_is_as_on_one(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP from the beginning; FSDP2 from the checkpoint that a run of one process left behind."""
    train = example("train_long_classifier")
    script = ROOT / "examples" / "train_long_classifier.py"
    one = ["--accumulate", "4", "--out"]
    train.main([*training, *one, str(tmp_path / "one")])
    wanted = lsg_patch.from_pretrained(tmp_path / "one" / "model")
    assert type(wanted).__name__ == "BertForSequenceClassification"
    assert lsg_patch.get_config(wanted).max_position_embeddings == 128

    def cut(*args: Any) -> float:
        if args[3] == 3:
            raise KeyboardInterrupt
        return step(*args)

    step = train.step
    monkeypatch.setattr(train, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        train.main([*training, *one, str(tmp_path / "cut")])
    monkeypatch.undo()
    shutil.copytree(tmp_path / "cut", tmp_path / "fsdp")
    train.main([*training, *one, str(tmp_path / "cut"), "--resume"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "one")

    two = [script, *training, "--accumulate", "2", "--out"]
    run(*LAUNCH, "--multi_gpu", *two, tmp_path / "ddp")
    said = run(*LAUNCH, "--use_fsdp", "--fsdp_version", "2", *two, tmp_path / "fsdp", "--resume")
    assert "FSDP2; from step 2" in said
    for way in ("ddp", "fsdp"):  # one process saves anew what several have left
        shutil.rmtree(tmp_path / way / "model")
        train.main([*training, *one, str(tmp_path / way), "--resume"])
    for way in ("cut", "ddp", "fsdp"):
        assert losses(tmp_path / way) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        found = lsg_patch.from_pretrained(tmp_path / way / "model")
        for name, value in wanted.state_dict().items():
            assert torch.allclose(found.state_dict()[name], value, atol=2e-4), (way, name)


def test_training_refuses(training: list[str], tmp_path: Path) -> None:
    main, out = example("train_long_classifier").main, tmp_path / "out"
    with pytest.raises(SystemExit, match=r"--data .*nowhere.jsonl: a file is wanted with a line"):
        main([*training, "--data", str(tmp_path / "nowhere.jsonl")])
    one_class = write_rows(tmp_path / "one.jsonl", [{"text": "w5", "label": "a"}] * 3)
    with pytest.raises(SystemExit, match="3 documents of 1 classes: two classes at least"):
        main([*training, "--data", str(one_class)])
    with pytest.raises(SystemExit, match="block_size"):
        main([*training, "--block-size", "0"])
    with pytest.raises(SystemExit, match="FSDP divides a model among processes, and there is one"):
        main([*training, "--fsdp"])
    out.mkdir()
    torch.save({"settings": {"lr": 1.0}, "losses": []}, out / "checkpoint.pt")
    with pytest.raises(SystemExit, match="--resume goes on from it"):
        main([*training, "--out", str(out)])
    with pytest.raises(SystemExit, match="is of another run, {'lr': 1.0}, not"):
        main([*training, "--out", str(out), "--resume"])


def test_documents_of_libraries() -> None:
    """Long, of both classes, and without the marks that tell the class."""
    documents = example("train_long_classifier").library_documents(["networkx"])
    assert {label for _, label in documents} == {"cites", "cites nothing"}
    assert len(documents) > 50 and all(len(text) > 3000 for text, _ in documents)
    assert not any(".. [1]" in text or "[1]_" in text for text, _ in documents)


# Embedding


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    rows = [{"id": f"text {i}", "text": text_of(20 + 17 * i)} for i in range(7)]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    model = model_folder(tmp_path / "tiny", "BertModel")
    arguments = ["--input", str(data), "--model", str(model), "--max-length", "128"]
    return [*arguments, "--block-size", "8", "--shard-size", "2", "--batch-tokens", "150"]


def table(out: Path) -> tuple[list[str], list[int], torch.Tensor]:
    files = sorted(out.glob("*.parquet"))
    assert len(files) == 4 and not list(out.glob("*.partial"))
    columns = pyarrow.concat_tables(map(pyarrow.parquet.read_table, files)).to_pydict()
    return columns["id"], columns["tokens"], torch.tensor(columns["embedding"])


@pytest.fixture
def plain(corpus: list[str], tmp_path: Path) -> tuple[list[str], list[int], torch.Tensor]:
    """Each text by itself."""
    texts = [json.loads(line)["text"] for line in Path(corpus[1]).read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus[3])
    model = transformers.AutoModel.from_pretrained(corpus[3]).eval()
    settings = {"max_position_embeddings": 128, "block_size": 8}
    lsg_patch.patch_model(model, tokenizer=tokenizer, **settings)
    tokens, found = [], []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        tokens.append(inputs["input_ids"].shape[1])
        found.append(mean / mean.norm())
    return [f"text {i}" for i in range(7)], tokens, torch.stack(found)


@pytest.mark.parametrize("engine", ["ray", "datasets"])
def test_two_workers_embed_as_a_plain_loop(
    engine: str, corpus: list[str], plain: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = ROOT / "examples" / "embed_corpus.py"
    command = [*corpus, "--out", str(out), "--workers", "2"]
    run(sys.executable, script, *command, "--engine", engine)
    ids, tokens, embeddings = table(out)
    assert (ids, tokens) == plain[:2] and max(tokens) == 124
    assert torch.allclose(embeddings, plain[2], atol=1e-5)

    # what is there is left alone, also by another engine
    (out / "000002.parquet").unlink()
    written = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    example("embed_corpus").main([*command, "--engine", "loop"])
    again = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert {name for name, time in again.items() if written.get(name) != time} == {"000002.parquet"}
    assert torch.allclose(table(out)[2], plain[2], atol=1e-5)


def test_a_model_that_was_saved_patched_embeds(
    corpus: list[str], plain: Any, tmp_path: Path
) -> None:
    """From a parquet file; positions that the model has not are not read."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus[3])
    model = transformers.AutoModel.from_pretrained(corpus[3])
    settings = {"max_position_embeddings": 128, "block_size": 8}
    lsg_patch.patch_model(model, tokenizer=tokenizer, **settings)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    rows = [json.loads(line) for line in Path(corpus[1]).read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "texts.parquet")
    more = ["--input", str(tmp_path / "texts.parquet"), "--model", str(tmp_path / "saved")]
    more += ["--max-length", "4096", "--out", str(tmp_path / "out"), "--engine", "loop"]
    example("embed_corpus").main([*corpus, *more])
    ids, tokens, embeddings = table(tmp_path / "out")
    assert (ids, tokens) == plain[:2] and torch.allclose(embeddings, plain[2], atol=1e-5)


def test_embedding_refuses(corpus: list[str], tmp_path: Path) -> None:
    main, out = example("embed_corpus").main, tmp_path / "out"
    loop = [*corpus, "--engine", "loop", "--out", str(out)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="--input .*empty: there is no text"):
        main([*loop, "--input", str(tmp_path / "empty")])
    for wrong in ("nowhere.jsonl", "nowhere.parquet", "nowhere"):
        with pytest.raises(SystemExit, match=f"--input .*{wrong}: "):
            main([*loop, "--input", str(tmp_path / wrong)])
    other = write_rows(tmp_path / "other.jsonl", [{"body": "w5"}])
    with pytest.raises(SystemExit, match="row 0 has no `text`"):
        main([*loop, "--input", str(other)])
    with pytest.raises(SystemExit, match="--model nothing: "):
        main([*loop, "--model", "nothing"])
    assert not out.exists()
    main(loop)
    with pytest.raises(SystemExit, match="another corpus, model or setting: another --out"):
        main([*loop, "--max-length", "64"])
