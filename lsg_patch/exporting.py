"""A patched model as ONNX, for all batch sizes and lengths, checked before it is said to be done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lsg_patch.checkpoints import from_pretrained, load
from lsg_patch.config import KEY, LSGConfig
from lsg_patch.families import find_base
from lsg_patch.holders import module_of
from lsg_patch.patching import get_config, patch_model
from lsg_patch.published import is_published
from lsg_patch.tokenizer import tokenizer_at
from lsg_patch.weights import Source

OLDEST_OPSET = 18  # of the exporter that makes one program of all sizes
TOLERANCE = 1e-3  # of the largest output
ONE_FILE = 2**31 - 2**27  # bytes of weights that a file of ONNX can hold


class Exported(NamedTuple):
    """What was written. ``difference`` is the largest from the model's outputs; of the int8 file it is
    the cosine to those of the other file, over all checked inputs (None: there is no such file).
    """

    path: Path
    difference: float
    int8_path: Path | None = None
    mean_cosine: float | None = None
    least_cosine: float | None = None


class Outputs(nn.Module):
    """A model as an exporter wants it: tensors in, tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names: list[str] = []  # of the outputs, when it has run

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        output = self.model(**dict(zip(names, given, strict=False)), return_dict=True)
        found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        self.names = list(found)
        return tuple(found.values())


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    int8: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a patched model as ONNX: one program for all batch sizes, and lengths that the model reads.

    onnxruntime then runs it on texts of several lengths, with padding, and the outputs are compared
    with the model's. Only what agrees is put in its place.

    Args:
        model: a patched encoder in float32, with or without a head.
        path: the file to write. Its inputs are input_ids and attention_mask (B, T), and token_type_ids
            where the model has several token types; its outputs are the tensors that the model gives.
        opset: of ONNX, 18 or later. None: the exporter's own choice.
        int8: write ``NAME.int8.onnx`` beside it as well: weights of 8 bits by onnxruntime's dynamic
            quantization.
        overwrite: replace files that are there.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: the model is not patched or cannot be exported, a file is there already, or
            ``opset`` is too old. Nothing is written.
        RuntimeError: what was exported gives other outputs than the model. Nothing is written.
    """
    config = get_config(model)
    base, family = find_base(module_of(model))
    stated: Any = base.config
    target = model if hasattr(model, "config") else base
    if getattr(stated, "is_decoder", False) or stated.is_encoder_decoder:
        raise ValueError(
            f"{type(base).__name__} has a decoder, whose steps are no one program: export an encoder"
        )
    if opset is not None and opset < OLDEST_OPSET:
        raise ValueError(f"opset={opset} is too old: pass {OLDEST_OPSET} or later, or leave it out")
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError("this torch exports one length alone: pip install 'torch>=2.7'")
    if any(x.dtype != torch.float32 for x in target.parameters() if x.is_floating_point()):
        raise ValueError("the model is not in float32: model.float() first")
    out = Path(path)
    small = out.with_suffix(".int8.onnx")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {str(out.parent)!r}: make it first")
    for file in (out, small)[: 1 + int8]:
        if file.exists() and not overwrite:
            raise ValueError(
                f"{str(file)!r} is there already: name another, or pass overwrite=True"
            )
    runtime = _package("onnxruntime")
    _package("onnx"), _package("onnxscript")
    has_types = family.token_types is not None and stated.type_vocab_size > 1
    names = ["input_ids", "attention_mask", "token_type_ids"][: 2 + has_types]
    with _ready(target) as module, tempfile.TemporaryDirectory(dir=out.parent) as folder:
        examples = list(_examples(config, stated, names, next(module.parameters()).device))
        made = str(Path(folder) / out.name)
        with torch.no_grad():
            expected = [module(*example) for example in examples]
        write(module, made, examples[0], names, config.max_position_embeddings, opset)
        found = _run(runtime, made, names, examples)
        difference, scale = 0.0, 0.0
        for (_, mask, *_), ours, theirs in zip(examples, found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                real = mask.bool() if b.shape[:2] == mask.shape else slice(None)
                difference = max(difference, float((a - b.cpu())[real].abs().max()))
                scale = max(scale, float(b[real].abs().max()))
        if not difference <= TOLERANCE * max(1.0, scale):
            raise RuntimeError(
                f"onnxruntime's outputs are {difference:.1e} from the model's, so nothing was written: "
                "try another opset, or newer releases of torch, onnxscript and onnxruntime"
            )
        done = Exported(out, difference)
        if int8:
            quantized = str(Path(folder) / small.name)
            quantize(made, quantized)
            cosines = torch.cat(
                [
                    torch.cosine_similarity(a[0].flatten(1), b[0].flatten(1))
                    for a, b in zip(found, _run(runtime, quantized, names, examples), strict=True)
                ]
            )
            done = Exported(out, difference, small, float(cosines.mean()), float(cosines.min()))
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, out.parent / file.name)
    return done


def export_checkpoint(
    source: str,
    out: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Exported:
    """``export_onnx`` of a checkpoint: one that was saved patched, or an ordinary one, patched here.

    Args:
        source: a folder or a repository of the hub.
        max_length: tokens that it reads. None: 4096, or those of a patched source.
        settings: those of ``LSGConfig``, by name; they win over saved ones.
        options: of ``export_onnx``.

    Raises:
        As ``export_onnx``, ``from_pretrained`` and ``patch_model``.
    """
    given = {**(settings or {}), **({"max_position_embeddings": max_length} if max_length else {})}
    found = Source.of(source, {})
    said = found.config()
    if is_published(said) or KEY in said:
        model = from_pretrained(found.path, **given)
    else:
        model, _ = load(found, said, None, {})
        patch_model(model, LSGConfig(**given), tokenizer=tokenizer_at(found.path)[0])
    return export_onnx(model.float(), out, **options)


def write(
    module: Outputs,
    path: str,
    example: tuple[Tensor, ...],
    names: list[str],
    most: int,
    opset: int | None = None,
) -> None:
    """One program for all batch sizes, and lengths up to ``most`` tokens, recorded with an ``example``."""
    size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=most)}
    with torch.no_grad():
        module(*example)  # it knows the names of its outputs then
        torch.onnx.export(
            module,
            example,
            path,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=module.names,
            dynamic_shapes=(tuple(size for _ in names),),
            external_data=sum(x.nbytes for x in module.parameters()) > ONE_FILE,
            verbose=False,
        )


def quantize(path: str, out: str) -> None:
    """Write the model in ``path`` with weights of 8 bits without a sign, the most exact kind here."""
    quantization = _package("onnxruntime.quantization")
    kind = quantization.QuantType.QUInt8
    quantization.quantize_dynamic(path, out, per_channel=True, weight_type=kind)


@contextmanager
def _ready(model: nn.Module) -> Iterator[Outputs]:
    was_training = model.training
    try:
        yield Outputs(model.eval())
    finally:
        model.train(was_training)


def _examples(
    config: LSGConfig, stated: Any, names: list[str], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of random words, padded; the first one is what the program is recorded with."""
    generator, block = torch.Generator().manual_seed(0), config.block_size
    for batch, blocks, more in ((2, 2, 7), (1, 1, 3), (3, 0, 5), (2, 5, 1)):
        length = min(blocks * block + more, config.max_position_embeddings)
        ids = torch.randint(
            min(100, stated.vocab_size - 1), stated.vocab_size, (batch, length), generator=generator
        )
        lengths = torch.tensor([length, *[max(1, length - 4)] * (batch - 1)])
        mask = (torch.arange(length) < lengths[:, None]).long()
        types = torch.zeros_like(ids)
        types[:, length // 2 :] = 1
        yield tuple(x.to(device) for x in (ids, mask, types)[: len(names)])


def _run(
    runtime: Any, path: str, names: list[str], examples: list[tuple[Tensor, ...]]
) -> list[list[Tensor]]:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [
        [
            torch.from_numpy(x)
            for x in session.run(
                None, {n: x.cpu().numpy() for n, x in zip(names, example, strict=True)}
            )
        ]
        for example in examples
    ]


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"exporting needs {name}: pip install lsg-patch[onnx]") from error
