"""Every model that is built while a context is open is patched, however it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import wrapt
from transformers import PreTrainedModel

import lsg_patch


class Builders:
    """Runs what builds models, and patches what the outermost of them gives.

    A head builds its base model, and ``from_pretrained`` a model that it then loads: only the whole
    is patched.

    Attributes:
        count: the models patched so far.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.count = 0
        self._settings = settings
        self._depth = 0

    def construct(
        self, init: Callable[..., None], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._inside(init, args, kwargs)
        self._patch(model)

    def load(
        self, load: Callable[..., Any], cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        loaded = self._inside(load, args, kwargs)
        self._patch(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _inside(
        self, build: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._depth += 1
        try:
            return build(*args, **kwargs)
        finally:
            self._depth -= 1

    def _patch(self, model: Any) -> None:
        if not self._depth:
            lsg_patch.patch_model(model, **self._settings)
            self.count += 1


@contextmanager
def every_model_patched(classes: Iterable[type[Any]], **settings: Any) -> Iterator[Builders]:
    """Patch with ``settings`` each model of one of ``classes`` that is built inside the context."""
    builders = Builders(settings)
    from_pretrained = vars(PreTrainedModel)["from_pretrained"]
    with ExitStack() as stack:
        for cls in classes:
            wrapped = wrapt.FunctionWrapper(cls.__init__, builders.construct)
            stack.enter_context(mock.patch.object(cls, "__init__", wrapped))
        wrapped = wrapt.FunctionWrapper(from_pretrained, builders.load)
        stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", wrapped))
        yield builders
