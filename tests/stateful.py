"""A patched model in hard use, held after each step to a twin that was never patched.

`python -m tests.stateful --steps 20000 --seed 1` runs many sequences and writes a report.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import pickle
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import lsg_patch
from lsg_patch.config import KEY
from lsg_patch.families import FAMILIES, find_base
from tests import models, seq2seq
from tests.matrix.specimens import SPECIMENS, Specimen

BLOCK = 16
MASKS = {
    "whole": models.right_padded(2 * BLOCK),
    "right padding": models.right_padded(30, 7),
    "two tokens": models.right_padded(2, 2),  # one is cls, and eos where a family has it
}
LONG = models.right_padded(5 * BLOCK + 3, 21)
OPTIONS = st.fixed_dictionaries(
    {
        "sparsity_type": st.sampled_from(lsg_patch.attention.SPARSITY_TYPES),
        "sparsity_factor": st.sampled_from([1, 2, 4]),
        "num_global_tokens": st.sampled_from([0, 1]),
        "max_position_embeddings": st.sampled_from([96, 128, 256]),
        "unpad": st.sampled_from([None, False, True]),
        "backend": st.sampled_from(["auto", "sdpa", "dense"]),
        "seed": st.sampled_from([None, 7]),
    }
)
# what is installed by `tox -e ecosystem` and for the long run
HAS_PEFT = importlib.util.find_spec("peft") is not None
TOLERANCE = 2e-5  # global tokens are made in the dtype of the patch
steps = Counter[str]()


def classes_of(specimen: Specimen) -> list[type[Any]]:
    source: Any = seq2seq if specimen.is_seq2seq else models
    found: list[type[Any]] = source.model_classes(specimen.family)
    return found


# what heads raise that cannot be resized, unpatched either
NO_RESIZE = (
    AttributeError,
    NotImplementedError,  # reason: some heads of transformers raise it, the unpatched twin too
    RuntimeError,
    ValueError,
)


class CountsCalls:
    """A user's hook, before a model and after it: how often it ran, and what masks it saw."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, *given: Any) -> None:
        self.calls += 1


def tensors_of(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Parameters and buffers, those too that are not saved."""
    found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    return {name: (tuple(x.shape), x.dtype, x.requires_grad) for name, x in found}


def shape_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a patch could leave behind in each module."""
    return {
        name: (type(module), sorted(vars(module)), hooks_of(module))
        for name, module in model.named_modules()
    }


def hooks_of(module: nn.Module) -> dict[str, int]:
    return {
        name: len(value)
        for name, value in vars(module).items()
        if name.endswith("hooks") or name.endswith("hooks_with_kwargs")
    }


def copied_by(how: str, module: nn.Module) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(module, f"{folder}/model.pt")
        return torch.load(f"{folder}/model.pt", weights_only=False)


class Sequences(RuleBasedStateMachine):
    """Both models get the same treatment; the patch comes and goes in one of them alone."""

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        present = [specimen for specimen in SPECIMENS if not specimen.is_absent]
        self.specimen = data.draw(st.sampled_from(present))
        cls = data.draw(st.sampled_from(classes_of(self.specimen)))
        self.twin = self.specimen.model(cls)
        self.model = copy.deepcopy(self.twin)
        self.settings: dict[str, Any] | None = None
        self.tokenizer: Any = None
        self.dtype = torch.float32
        self.hooks: list[tuple[Any, Any]] = []
        self.loras: list[Any] = []
        steps[f"model of {self.specimen.family}"] += 1

    # -- what is compared

    def outputs(self, model: Any, mask: Tensor) -> dict[str, Tensor]:
        return self.specimen.run(model, mask)

    def assert_same(self, mask: Tensor) -> None:
        expected, found = (
            # in float64 Splinter has infinite logits
            {name: value.nan_to_num() for name, value in self.outputs(model, mask).items()}
            for model in (self.twin, self.model)
        )
        for name, value in expected.items():
            tolerance = TOLERANCE * max(1.0, float(value.abs().max()))
            models.assert_same({name: found[name]}, {name: value}, mask, tolerance)

    @invariant()
    def short_inputs_are_lossless(self) -> None:
        if hasattr(self, "model"):
            self.assert_same(MASKS["right padding"])

    @invariant()
    def an_unpatched_model_has_nothing_of_a_patch(self) -> None:
        if not hasattr(self, "model") or self.settings is not None:
            return
        assert not lsg_patch.is_patched(self.model)
        assert tensors_of(self.model) == tensors_of(self.twin)
        assert shape_of(self.model) == shape_of(self.twin)
        assert list(self.model.state_dict()) == list(self.twin.state_dict())
        assert self.model.config.to_dict() == self.twin.config.to_dict()

    @invariant()
    def a_patched_model_says_so(self) -> None:
        if not hasattr(self, "model") or self.settings is None:
            return
        found = lsg_patch.get_config(self.model)
        assert {name: getattr(found, name) for name in self.settings} == self.settings
        assert hasattr(self.model.config, KEY)
        if self.tokenizer is not None:
            assert self.tokenizer.model_max_length == found.max_position_embeddings

    # -- what is done

    @precondition(lambda self: self.settings is None)
    @rule(options=OPTIONS)
    def patch(self, options: dict[str, Any]) -> None:
        steps["patch"] += 1
        options = self.fitting(options)
        self.tokenizer = types.SimpleNamespace(
            cls_token_id=models.CLS, mask_token_id=models.MASK, model_max_length=models.POSITIONS
        )
        if options["unpad"] and not self.can_unpad():
            with pytest.raises(ValueError, match="unpad=True"):
                lsg_patch.patch_model(self.model, tokenizer=self.tokenizer, **options)
            assert self.tokenizer.model_max_length == models.POSITIONS
            return
        lsg_patch.patch_model(self.model, tokenizer=self.tokenizer, **options)
        if options["unpad"] is None and not self.can_unpad():
            options.pop("unpad")  # it is False then
        self.settings = options

    def can_unpad(self) -> bool:
        return not (self.specimen.is_seq2seq or self.specimen.family == "xmod")

    def fitting(self, options: dict[str, Any]) -> dict[str, Any]:
        """As they can be asked of this model: nothing but ``unpad`` is to be refused."""
        options = {"block_size": BLOCK, "sparse_block_size": BLOCK, **options}
        if options["unpad"] and type(self.twin).__name__ == "RoFormerForMultipleChoice":
            options["unpad"] = False  # it reads the last position, be it padding
        if options["num_global_tokens"]:
            options.update(
                {} if self.specimen.is_seq2seq else models.stand_in(self.specimen.family)
            )
        if self.specimen.is_seq2seq and options["num_global_tokens"]:
            options["mask_first_token"] = True
        return options

    @precondition(lambda self: self.settings is not None)
    @rule()
    def unpatch(self) -> None:
        steps["unpatch"] += 1
        lsg_patch.unpatch_model(self.model)
        if self.tokenizer is not None:
            assert self.tokenizer.model_max_length == models.POSITIONS
        self.settings = None

    @precondition(lambda self: self.settings is not None)
    @rule(options=OPTIONS)
    def patch_twice(self, options: dict[str, Any]) -> None:
        steps["patch twice"] += 1
        with pytest.raises(ValueError, match="patched already"):
            lsg_patch.patch_model(self.model, num_global_tokens=0, backend=options["backend"])

    @precondition(lambda self: self.settings is None)
    @rule(options=OPTIONS, fails=st.booleans())
    def patched_for_a_while(self, options: dict[str, Any], fails: bool) -> None:
        steps["with"] += 1
        options = {**self.fitting(options), "unpad": None}
        tokenizer = types.SimpleNamespace(cls_token_id=models.CLS, mask_token_id=models.MASK)
        try:
            with lsg_patch.patched(self.model, tokenizer=tokenizer, **options):
                self.assert_same(MASKS["whole"])
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails

    @rule(mask=st.sampled_from(sorted(MASKS)))
    def forward(self, mask: str) -> None:
        steps["forward"] += 1
        self.assert_same(MASKS[mask])

    @precondition(lambda self: self.settings is not None)
    @rule()
    def long_forward(self) -> None:
        steps["long forward"] += 1
        if self.specimen.family == "splinter" and self.dtype == torch.float64:
            return  # it has NaN where a text is padded, unpatched too
        for value in self.outputs(self.model, LONG).values():
            assert not value.isnan().any()

    @rule()
    def train(self) -> None:
        """Parameters of layers and heads: what global tokens replace has other gradients."""
        steps["train"] += 1
        gradients = []
        for model in (self.twin, self.model):
            trained = self.trained(model)
            outputs = self.differentiable(model, MASKS["whole"])
            finite = (x[x.isfinite()].double() for x in outputs.values())
            loss = sum(x.square().mean() for x in finite)
            assert isinstance(loss, Tensor)
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            gradients.append(dict(zip(trained, found, strict=True)))
        expected, actual = gradients
        assert {n for n, x in expected.items() if x is None} == {
            n for n, x in actual.items() if x is None
        }
        largest = max(float(x.abs().max()) for x in expected.values() if x is not None)
        own = self.trained(self.model)
        with torch.no_grad():
            for name, parameter in self.trained(self.twin).items():
                if expected[name] is None:
                    continue
                atol = 100 * TOLERANCE * max(largest, 1e-3)
                torch.testing.assert_close(
                    actual[name], expected[name], rtol=1e-3, atol=atol, msg=name
                )
                parameter -= 0.01 * expected[name] / max(1.0, largest)
                own[name].copy_(parameter)  # rounding is not to add up

    def trained(self, model: Any) -> dict[str, nn.Parameter]:
        words = {id(p) for p in model.get_input_embeddings().parameters()}
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if id(parameter) not in words and "embed" not in name and ".shared" not in name
            if parameter.requires_grad
        }

    def differentiable(self, model: Any, mask: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            values = output.items() if hasattr(output, "items") else ()
            found.update({n: x for n, x in values if isinstance(x, Tensor) and x.requires_grad})

        handle = model.register_forward_hook(collect)
        no_grad, torch.no_grad = torch.no_grad, torch.enable_grad  # type: ignore[misc,assignment]
        try:
            self.outputs(model, mask)
        finally:
            torch.no_grad = no_grad  # type: ignore[misc]
            handle.remove()
        return found

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def to_dtype(self, dtype: torch.dtype) -> None:
        steps["to dtype"] += 1
        self.dtype = dtype
        for model in (self.twin, self.model):
            model.to(torch.float32).to(dtype)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copied(self, how: str) -> None:
        steps[how] += 1
        self.tokenizer = None  # a copy has its own
        hooks = self.hooks
        self.hooks = []
        for _, handles in hooks:
            for handle in handles:
                handle.remove()
        copies = [copied_by(how, x) for x in self.loras or (self.twin, self.model)]
        self.loras = copies if self.loras else []
        self.twin, self.model = (x.model for x in self.loras) if self.loras else copies

    @rule()
    def saved_and_loaded(self) -> None:
        """The twin of a model that comes back patched is what the others load from that folder."""
        steps["save and load"] += 1
        if self.loras:
            self.lora_off()  # its layers have other names
        cls, name = type(self.model), "dtype" if transformers.__version__ >= "5" else "torch_dtype"
        dtype = {name: self.dtype}
        self.hooks, self.tokenizer = [], None
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            if self.settings is None:
                self.model = cls.from_pretrained(folder, **dtype).eval()
            else:
                self.model = lsg_patch.from_pretrained(folder, cls, **dtype).eval()
            self.twin = cls.from_pretrained(folder, **dtype).eval()
        if hasattr(self.twin.config, KEY):
            delattr(self.twin.config, KEY)

    @rule()
    def state_dict_loaded(self) -> None:
        steps["load_state_dict"] += 1
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1.0)
        self.model.load_state_dict(state)

    @rule(one_in_many=st.integers(0, 29))
    def compiled(self, one_in_many: int) -> None:
        if one_in_many != 17:
            return  # it takes as long as a hundred other steps
        steps["compile"] += 1
        torch.compiler.reset()
        whole = self.model
        try:
            run = torch.compile(whole.forward, backend="eager", dynamic=True)
            whole.forward, mask = run, MASKS["whole"]
            try:
                expected, found = (self.outputs(x, mask) for x in (self.twin, whole))
            finally:
                del whole.forward
        finally:
            torch.compiler.reset()
        for name, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE * scale)

    @rule(more=st.sampled_from([-3, 5]))
    def vocabulary_resized(self, more: int) -> None:
        steps["resize of the vocabulary"] += 1
        size = max(models.VOCABULARY, self.twin.config.vocab_size + more)
        try:  # some heads of transformers cannot
            probe = copy.deepcopy(self.twin)
            probe.resize_token_embeddings(size)
            self.outputs(probe, MASKS["whole"])
        except NO_RESIZE:  # the unpatched twin cannot either
            return  # nothing to compare: the unpatched model fails by itself
        for model in (self.twin, self.model):
            torch.manual_seed(0)
            model.resize_token_embeddings(size)

    @precondition(lambda self: HAS_PEFT and not self.loras)
    @rule()
    def lora_on(self) -> None:
        """Of the projections of queries and values; all else is frozen."""
        steps["LoRA on"] += 1
        peft: Any = importlib.import_module("peft")
        names = FAMILIES[find_base(self.twin)[1].name].names
        self.trainable = {n for n, p in self.twin.named_parameters() if p.requires_grad}
        for model in (self.twin, self.model):
            torch.manual_seed(0)
            config = peft.LoraConfig(
                r=2, target_modules=[names.query, names.value], init_lora_weights=False
            )
            self.loras.append(peft.LoraModel(model, {"default": config}, "default").eval())

    @precondition(lambda self: self.loras)
    @rule()
    def lora_off(self) -> None:
        steps["LoRA off"] += 1
        self.twin, self.model = (lora.unload() for lora in self.loras)
        self.loras = []
        for model in (self.twin, self.model):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self.trainable or "global_embeddings" in name)

    @rule(prepend=st.booleans())
    def hook_added(self, prepend: bool) -> None:
        steps["hook added"] += 1
        hooks, handles = [], []
        for model in (self.twin, self.model):
            hook = CountsCalls()
            hooks.append(hook)
            base = model.base_model
            handles.append(base.register_forward_hook(hook, prepend=prepend))
            handles.append(base.register_forward_pre_hook(hook, prepend=prepend))
        self.hooks.append((hooks, handles))

    @precondition(lambda self: self.hooks)
    @rule()
    def hook_removed(self) -> None:
        steps["hook removed"] += 1
        hooks, handles = self.hooks.pop()
        before = [hook.calls for hook in hooks]
        self.assert_same(MASKS["whole"])
        assert [hook.calls - calls for hook, calls in zip(hooks, before, strict=True)] == [2, 2]
        for handle in handles:
            handle.remove()


def run_sequences(
    examples: int, length: int, of_seed: int | None = None, shrink: bool = False
) -> None:
    """Sequences of ``length`` steps, as many as there are ``examples``."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=length,
        deadline=None,
        database=None,
        derandomize=of_seed is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        print_blob=False,
        report_multiple_bugs=False,
    )
    machine = Sequences if of_seed is None else seed(of_seed)(Sequences)
    run_state_machine_as_test(machine, settings=chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", action="store_true", help="find shorter ways to each fault")
    parser.add_argument("--report", type=Path, default=Path("tests/reports/stateful.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, of_seed, faults = time.time(), args.seed, []
    while sum(n for name, n in steps.items() if not name.startswith("model of")) < args.steps:
        try:
            run_sequences(20, 40, of_seed, args.shrink)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            faults.append(
                {"seed": of_seed, "fault": f"{type(error).__name__}: {error}", "steps": notes}
            )
            print(json.dumps(faults[-1], indent=1), file=sys.stderr, flush=True)
        of_seed += 1
    done = {name: n for name, n in sorted(steps.items()) if not name.startswith("model of")}
    families = {n.removeprefix("model of "): x for n, x in sorted(steps.items()) if n not in done}
    report = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seeds": [args.seed, of_seed - 1],
        "steps": sum(done.values()),
        "seconds": round(time.time() - began),
        "of each kind": done,
        "sequences of each family": families,
        "faults": faults,
    }
    args.report.parent.mkdir(exist_ok=True, parents=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
