"""A patched model as an ONNX file, which onnxruntime compares with the model before it is in place."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lsg_patch.checkpoints import load_any
from lsg_patch.config import LSGConfig
from lsg_patch.families import find_base
from lsg_patch.holders import Holder, module_of
from lsg_patch.patching import get_config, is_patched, patch_model
from lsg_patch.tokenizer import tokenizer_at

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST_OPSET = 18  # of the exporter that makes one program of all sizes
LONGEST = 4096  # tokens of the inputs that are compared
# Of the largest output: of any, and on average. Rounding may choose another of two like sparse tokens.
FAR, FAR_ON_AVERAGE = 1e-2, 1e-4
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], list[Tensor]]


class Exported(NamedTuple):
    """What was written. ``difference`` is the largest from the model's outputs; of the int8 file it is
    the cosine to those of the other file, over all checked texts (None: there is no such file).
    """

    path: Path
    difference: float
    int8_path: Path | None = None
    mean_cosine: float | None = None
    least_cosine: float | None = None


def export_onnx(
    model: nn.Module | Holder,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    int8: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a patched encoder as ONNX: one program for all batch sizes, and lengths that it reads.

    Its inputs are input_ids and attention_mask (B, T), and token_type_ids where the model has several
    token types; its outputs are the tensors that the model gives, by their names. onnxruntime then
    runs it on texts of up to 4,096 tokens, with padding. Only what agrees is put in its place.

    Args:
        model: a patched model in float32, with or without a head, or what holds one.
        path: the file. Weights of more than 1.5 GB lie beside it, in ``path + ".data"``.
        opset: of ONNX, 18 or later. None: the exporter's own choice.
        int8: write ``NAME.int8.onnx`` beside it as well: weights of 8 bits, by onnxruntime's dynamic
            quantization.
        overwrite: replace files that are there.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing, or torch is older than 2.7.
        ValueError: the model is not patched, has a decoder, is in training mode or not in float32, a
            file is there already, its folder is not, or ``opset`` is too old or not known to onnx.
        RuntimeError: the model cannot be exported, or the file gives other outputs than the model.

    After an error nothing is written.
    """
    _require_packages()
    config, program, out = get_config(model), Program(module_of(model)), Path(path)
    files = (out, out.with_suffix(".int8.onnx"))[: 1 + int8]
    places = (*map(_weights_of, files), *files)  # who finds a model finds its weights
    _check(program, places, opset, overwrite)
    two, longest = 2 * config.block_size, min(LONGEST, config.max_position_embeddings)
    # the third text is left-padded: without a global token in its place a head reads padding there
    most = 3 if config.num_global_tokens and config.pool_with_global else 2
    sizes = ((1, 1), (most, two), (most, two + 3), (2, 2 * two + 1), (1, longest))
    examples = [program.example(batch, min(length, longest)) for batch, length in sizes]
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of what it does itself
        made = [Path(folder, file.name) for file in files]
        program.write(made[0], min(two + 7, longest), opset)
        run = opened(made[0])
        done = Exported(out, max(program.difference(run, given) for given in examples))
        if int8:
            quantize(*made)
            small = opened(made[1])
            cosines = torch.cat(
                [
                    torch.cosine_similarity(_rows(found, given), _rows(expected, given))
                    for given in examples
                    for found, expected in zip(small(given), run(given), strict=True)
                ]
            )
            done = Exported(*done[:2], files[1], float(cosines.mean()), float(cosines.min()))
        for place in places:
            new = Path(folder, place.name)
            new.replace(place) if new.exists() else place.unlink(missing_ok=True)
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
    _require_packages()
    given = dict(settings or {})
    if max_length is not None:
        given["max_position_embeddings"] = max_length
    model = load_any(source, None, **given)
    if not is_patched(model):
        patch_model(model, LSGConfig(**given), tokenizer=tokenizer_at(source)[0])
    return export_onnx(model.float().eval(), out, **options)


class Program(nn.Module):
    """A model as the exporter wants it: tensors in, tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        base, family = find_base(model)
        self.model, self.config = model, cast(Any, base).config
        self.training = model.training
        has_types = family.token_types is not None and self.config.type_vocab_size > 1
        self.inputs = ("input_ids", "attention_mask", "token_type_ids")[: 2 + has_types]

    def outputs(self, given: Inputs) -> Inputs:
        """The tensors that the model gives, by their names."""
        # those of sentence-transformers take a dictionary, and add to it
        takes_one = isinstance(self.model, nn.Sequential)
        found = self.model({**given}) if takes_one else self.model(**given, return_dict=True)
        return {name: x for name, x in found.items() if isinstance(x, Tensor) and name not in given}

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(dict(zip(self.inputs, given, strict=True))).values())

    def example(self, batch: int, length: int) -> Inputs:
        """Drawn words; the second text is padded on its right, the third on its left."""
        padding = self.config.pad_token_id or 0
        ids = torch.randint(
            self.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length)
        )
        mask, types = torch.ones_like(ids), torch.zeros_like(ids)
        mask[1:2, length - length // 3 :] = 0
        mask[2:3, : length // 3] = 0
        types[:, length // 2 :] = 1
        word = int(padding == 0)  # some word that is no padding
        ids = ids.masked_fill(ids == padding, word).masked_fill(mask == 0, padding)
        device = next(self.parameters()).device
        given = zip(self.inputs, (ids, mask, types), strict=False)
        return {name: x.to(device) for name, x in given}

    @torch.no_grad()
    def write(self, file: Path, length: int, opset: int | None = None) -> None:
        """The file, recorded with an example of ``length`` tokens; or a RuntimeError."""
        example = self.example(2, length)
        sizes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        try:
            made: Any = torch.onnx.export(
                self,
                tuple(example.values()),
                file,
                dynamo=True,
                opset_version=opset,
                input_names=self.inputs,
                output_names=list(self.outputs(example)),
                dynamic_shapes=((sizes,) * len(example),),
                external_data=False,  # where one file can hold it
                verbose=False,
            )
            if opset not in (None, made.model.opset_imports[""]):
                raise ValueError("the exporter wrote another")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            name = type(self.model).__name__
            raise RuntimeError(f"{name} cannot be exported with opset={opset}: {reason}") from error

    @torch.no_grad()
    def difference(self, run: Run, given: Inputs) -> float:
        """The largest one between what ``run`` and the model give, padding left out; or a RuntimeError."""
        largest = 0.0
        for found, (name, expected) in zip(run(given), self.outputs(given).items(), strict=True):
            expected = _rows(expected, given)
            off = (_rows(found, given) - expected).abs()
            scale = max(1.0, float(expected.abs().max()))
            largest = max(largest, float(off.max()))
            if not (off.max() <= FAR * scale and off.mean() <= FAR_ON_AVERAGE * scale):
                raise RuntimeError(
                    f"{name} of onnxruntime is {float(off.max()):.1e} from the model's for input_ids of "
                    f"shape {tuple(given['input_ids'].shape)}, so nothing was written: try another "
                    "opset, or newer releases of torch, onnxscript and onnxruntime"
                )
        return largest


def opened(file: Path) -> Run:
    """The model of a file in onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # it would keep what the largest input took
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(given: Inputs) -> list[Tensor]:
        feed = {name: x.cpu().numpy() for name, x in given.items()}
        return [torch.from_numpy(x) for x in session.run(None, feed)]

    return run


def quantize(file: Path, out: Path) -> None:
    """``file`` with weights of 8 bits, unsigned: signed ones overflow on processors without VNNI."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large, kind = _weights_of(file).exists(), QuantType.QUInt8
    quantize_dynamic(file, out, per_channel=True, weight_type=kind, use_external_data_format=large)


def _weights_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.data")


def _rows(output: Tensor, given: Inputs) -> Tensor:
    """(B, N), with zeros for padding where there is an output for each token."""
    output, mask = output.cpu(), given["attention_mask"].cpu().bool()
    if output.shape[:2] == mask.shape:
        output = output.masked_fill(~mask.view(*mask.shape, *[1] * (output.dim() - 2)), 0)
    return output.flatten(1)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"an export needs {', '.join(missing)}: pip install lsg-patch[onnx]")
    if not hasattr(torch.compiler, "is_exporting"):
        raise ImportError("this torch exports one length alone: pip install 'torch>=2.7'")


def _check(program: Program, places: tuple[Path, ...], opset: int | None, overwrite: bool) -> None:
    newest = import_module("onnx.defs").onnx_opset_version()
    name, folder = type(program.model).__name__, places[0].parent
    there = [str(place) for place in places if place.exists() and not overwrite]
    is_half = any(x.dtype != torch.float32 for x in program.parameters() if x.is_floating_point())
    has_decoder = program.config.is_encoder_decoder or getattr(program.config, "is_decoder", False)
    for wrong, said in (
        (has_decoder, f"{name} is or has a decoder: only encoders can be exported"),
        (is_half, f"{name} is not in float32: model.float() first"),
        (program.model.training, f"{name} is in training mode: model.eval() first"),
        (
            not get_config(program.model).adaptive,
            f"{name} is patched with adaptive=False, a program takes any length: pass adaptive=True",
        ),
        (
            opset is not None and not OLDEST_OPSET <= opset <= newest,
            f"opset={opset} is none of {OLDEST_OPSET} to {newest}: pass one of these, or leave it out",
        ),
        (not folder.is_dir(), f"there is no folder {str(folder)!r}: make it first"),
        (there, f"{there and there[0]!r} is there already: name another, or pass overwrite=True"),
    ):
        if wrong:
            raise ValueError(said)
