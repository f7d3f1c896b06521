"""Patched models that come back from where they were saved."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, overload

import torch
import transformers
import wrapt
from torch import Tensor, nn

from lsg_patch import compat
from lsg_patch.config import KEY, LSGConfig, SavedPatch
from lsg_patch.families import Family, family_of
from lsg_patch.inspection import check_config, check_loaded, check_weights
from lsg_patch.patching import GLOBAL_EMBEDDINGS, is_patched, patch_with
from lsg_patch.published import as_ours, is_published
from lsg_patch.weights import OF_SOURCE, Source

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded", bound=nn.Module)
_INFO = "output_loading_info"
# keywords of a load that configs have attributes of too
_OF_THE_LOAD = ("torch_dtype", "dtype", "attn_implementation", "quantization_config")
PATTERN = rf"(^|\.){GLOBAL_EMBEDDINGS}\.weight$"


@dataclass(frozen=True)
class Request:
    """What is wanted of a checkpoint: other settings than the saved ones, and as in ``patch_model``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None


# transformers 5 replaces functions of its own while it loads: two at once leave them replaced
_one_at_a_time = threading.RLock()
# of a from_pretrained of ours that is under way
_request: ContextVar[Request | None] = ContextVar("lsg_patch request", default=None)


@overload
def from_pretrained(
    path: str | os.PathLike[str],
    cls: Any = None,
    *,
    output_loading_info: Literal[True],
    tokenizer: Any = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]: ...


@overload
def from_pretrained(
    path: str | os.PathLike[str], cls: type[Loaded], *, tokenizer: Any = None, **kwargs: Any
) -> Loaded: ...


@overload
def from_pretrained(
    path: str | os.PathLike[str], cls: Any = None, *, tokenizer: Any = None, **kwargs: Any
) -> Any: ...


def from_pretrained(
    path: str | os.PathLike[str], cls: Any = None, *, tokenizer: Any = None, **kwargs: Any
) -> Any:
    """Load a model that was saved patched, patched as it was saved, or an LSG checkpoint of the reference.

    It gives what the saved one gave, bit for bit. Nothing of the checkpoint is run: weights are
    read from safetensors, or from pickles by ``weights_only=True``. Where a config of the reference
    does not say a setting, it is the reference's default, not that of ``LSGConfig``.

    Args:
        path: a folder that ``save_pretrained`` of a patched model wrote, or a repository of the hub.
        cls: a class of transformers or one derived from it, or an Auto class. None: the one that was
            saved (``config.architectures``).
        tokenizer: as in ``patch_model``.
        kwargs: settings of ``LSGConfig`` win over those that were saved: more global tokens are new
            ones, fewer are the first ones, and another ``max_position_embeddings`` resizes as
            ``patch_model`` does. All others go to ``cls.from_pretrained``.

    Returns:
        The model, or what else ``cls.from_pretrained`` gives (``output_loading_info``).

    Raises:
        ValueError: it was not saved patched, by a newer release, or without its global tokens; a
            setting or a file is wrong, or config and weights do not fit; code of the checkpoint is
            asked for (``trust_remote_code``).
        OSError: there is no such checkpoint.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code=True: no code of a checkpoint is run; leave it out")
    settings = {x.name: kwargs.pop(x.name) for x in fields(LSGConfig) if x.name in kwargs}
    if "position_period" in settings:
        raise ValueError(
            f"position_period={settings['position_period']!r}, but the positions of a patched checkpoint "
            "are tiled already: leave it out, or unpatch_model(model) and patch_model(model, "
            "position_period=...) anew"
        )
    source = Source.of(path, kwargs)
    given: Any = kwargs.get("config")
    stated = given.to_dict() if hasattr(given, "to_dict") else source.config()
    published = is_published(stated)
    if published:
        stated, settings = as_ours(stated, **settings), {}
    patches = list(_saved_patches(stated))
    if not patches and not published:
        raise ValueError(
            f"{source.path!r} was not saved patched (its config has no {KEY!r}): load it with its own "
            "from_pretrained, then lsg_patch.patch_model(model, ...)"
        )
    for values in patches:
        SavedPatch.from_dict(values, **settings)
    told = kwargs.pop(_INFO, False)
    model, info = load(source, stated, cls, kwargs, Request(settings, tokenizer), published)
    if not patches:
        logger.warning("%s is a decoder alone: there is nothing to patch", type(model).__name__)
    elif not is_patched(model):
        raise ValueError(
            f"{type(model).__name__} has no place for the patch that was saved: pass another cls"
        )
    return (model, info) if told else model


def load_any(path: str, cls: Any = None, **settings: Any) -> Any:
    """``from_pretrained`` of what was saved patched, with ``settings``; anything else as it is."""
    source = Source.of(path, {})
    stated = source.config()
    if is_published(stated) or KEY in stated:
        return from_pretrained(path, cls, **settings)
    return load(source, stated, cls, {})[0]


def load(
    source: Source,
    stated: dict[str, Any],
    cls: Any,
    given: dict[str, Any],
    request: Request | None = None,
    as_stated: bool = False,
) -> tuple[Any, Any]:
    """``cls.from_pretrained`` of a checkpoint whose config and weights fit, and what it says of the load.

    Args:
        stated: what its config says; ``as_stated``: in place of what is in its folder.
        cls: None: the class that ``stated`` names.
        given: keywords of ``from_pretrained``.
        request: what is wanted of a patched one. None: it is not patched, and weights of heads may be
            left over, as many checkpoints have them.

    Raises:
        ValueError: something does not fit.
    """
    weights = source.tensors()
    check_weights(source.path, weights, quantized="quantization_config" in stated)
    named = cls is None
    cls = named_class(stated.get("architectures")) if named else cls
    config_class = _config_class(stated, cls)
    defaults: dict[str, Any] = {}
    with suppress(Exception):  # what is composed of others has no default
        defaults = vars(config_class())
    check_config(stated, defaults, weights)
    stored = list(weights)
    del weights  # what is not mapped is not to be in memory twice
    if as_stated:
        of_load = {name: given[name] for name in _OF_THE_LOAD if name in given}
        of_config = {name: x for name, x in given.items() if name not in (*_OF_THE_LOAD, "config")}
        config, rest = config_class.from_dict(dict(stated), return_unused_kwargs=True, **of_config)
        given = {**rest, **of_load, "config": config}
    resized = given.pop("ignore_mismatched_sizes", False)
    asked = _request.set(request)
    _switch.set(loads=1)
    try:
        with source.for_this_release() as place:
            if place != source.path:
                given = {name: x for name, x in given.items() if name not in OF_SOURCE}
            # what is of another shape is refused below, with its name
            ignored = resized or len(source.weights()) == 1 or compat.reads_safetensors()
            more = {_INFO: True, "ignore_mismatched_sizes": ignored}
            model, info = cls.from_pretrained(place, **given, **more)
    except (OSError, ImportError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{source.path!r} does not load as {cls.__name__}: {type(error).__name__}: {error}. Correct "
            "the keywords or config.json, or save or fetch the checkpoint again"
        ) from error
    finally:
        _switch.set(loads=-1)
        _request.reset(asked)
    if place != source.path:
        model.config.name_or_path = model.name_or_path = source.path
    whole = named or [type(model).__name__] == stated.get("architectures")
    check_loaded(source.path, model, info, stored, whole and request is not None, resized)
    return model, info


def _config_class(stated: Mapping[str, Any], cls: Any) -> Any:
    """The class of the config that ``cls`` takes, an Auto class by what the config says."""
    kind, known = stated.get("model_type"), transformers.CONFIG_MAPPING
    found = getattr(cls, "config_class", None)
    if found is None and isinstance(kind, str) and kind in known:
        found = known[kind]
    if found is None or found.model_type != kind:
        raise ValueError(
            f"config.json has model_type={kind!r}, which is not one that {cls.__name__} of this "
            "transformers loads, and code of a checkpoint is not run: pass another cls"
        )
    return found


def _saved_patches(config: Any) -> Iterator[Any]:
    """What a config as JSON says under ``KEY``, itself and what it is composed of."""
    for name, value in config.items():
        if name == KEY:
            yield value
        elif isinstance(value, dict):
            yield from _saved_patches(value)


def named_class(names: Any) -> Any:
    """The class that ``config.architectures`` names.

    Raises:
        ValueError: it names none.
    """
    name = names[0] if isinstance(names, list) and names else None
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or cls.config_class is None:
        raise ValueError(
            f"config.architectures={names!r} names no model of this transformers: pass cls, the class "
            "of the model"
        )
    return cls


def _load(wrapped: Any, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``from_pretrained`` of transformers, and after it the patch that the model's config states."""
    request = _request.get() or (Request() if _switch.is_on() else None)
    if request is None:
        return wrapped(*args, **kwargs)
    with _one_at_a_time, compat.expecting(cls, PATTERN):
        loaded = wrapped(*args, **kwargs)
    # with output_loading_info a model comes with what is to be said of it
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    rows: dict[str, Tensor] | None = None
    for name, base in list(model.named_modules()):
        stated = getattr(vars(base).get("config"), "__dict__", {})
        if KEY not in stated and not is_published(stated):
            continue
        family = family_of(base)
        if family is None or is_patched(base):
            continue
        values = stated[KEY] if KEY in stated else as_ours(base.config.to_dict()).get(KEY)
        if values is None:
            continue  # a decoder alone of the reference
        rows = _read(model, path, kwargs) if rows is None else rows
        own = _rows_of(rows, name, family, SavedPatch.from_dict(values).config)
        saved = replace(SavedPatch.from_dict(values, **request.settings), rows=own)
        patched = model if model.config is base.config else base
        patch_with(patched, saved.config, request.tokenizer, saved)
    return loaded


def _read(model: Any, path: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Global tokens of the checkpoint that ``model`` was loaded from, by their names."""
    sources: Iterable[dict[str, Tensor]] = [given.get("state_dict") or {}]
    if given.get("state_dict") is None:
        # an adapter's folder has none, its base has
        sources = (Source.of(x, given).tensors() for x in (path, model.name_or_path) if x)
    found = ({x: rows[x] for x in rows if re.search(PATTERN, x)} for rows in sources)
    return next(filter(None, found), {})


def _rows_of(rows: dict[str, Tensor], base: str, family: Family, saved: LSGConfig) -> Tensor | None:
    """Of the global tokens in a checkpoint those of the model ``base``, which may be in another head."""
    if saved.num_global_tokens == 0:
        return None
    place = f"{family.embeddings}.{GLOBAL_EMBEDDINGS}.weight"
    exact = f"{base}.{place}" if base else place
    fitting = [exact] if exact in rows else [x for x in rows if f".{x}".endswith(f".{place}")]
    if len(fitting) != 1:
        raise ValueError(
            f"the checkpoint has {len(fitting)} weights *.{place}, one is needed: a model that was saved "
            "patched and loaded without lsg_patch was saved without its global tokens. Load it with "
            "its own from_pretrained, auto patching off, then lsg_patch.patch_model(model, ...)"
        )
    found = rows[fitting[0]]
    if found.dim() != 2 or len(found) < saved.num_global_tokens:
        raise ValueError(
            f"{fitting[0]} of the checkpoint is of shape {tuple(found.shape)}, its config says "
            f"num_global_tokens={saved.num_global_tokens}: save it again"
        )
    return found


class _Switch:
    """Whether models come back patched from every ``from_pretrained`` of this process.

    The wrapper is in place while there is need of it: for the process, for blocks of
    ``auto_patching``, or for our own loads, of which others' loads at the time know nothing.
    """

    for_process = False
    blocks = loads = 0
    installed: Any = None
    lock = threading.Lock()

    def is_on(self) -> bool:
        return self.for_process or self.blocks > 0

    def set(self, for_process: bool | None = None, blocks: int = 0, loads: int = 0) -> None:
        owner: Any = transformers.PreTrainedModel
        with self.lock:
            self.for_process = self.for_process if for_process is None else for_process
            self.blocks += blocks
            self.loads += loads
            needed, own = self.is_on() or self.loads > 0, vars(owner)["from_pretrained"]
            if needed and self.installed is None:
                self.installed = wrapt.FunctionWrapper(own, _load)
                owner.from_pretrained = self.installed
            # below another wrapper it stays, and does nothing
            elif not needed and own is self.installed:
                owner.from_pretrained = own.__wrapped__
                self.installed = None


_switch = _Switch()


def enable_auto_patching() -> None:
    """From now on every ``from_pretrained`` of transformers gives what was saved patched patched.

    Also where it is called by a pipeline, SentenceTransformer or PEFT, and in all threads. Other
    checkpoints load as ever. Enabled twice is enabled once.
    """
    _switch.set(for_process=True)


def disable_auto_patching() -> None:
    """Take ``enable_auto_patching`` back; ``from_pretrained`` is what it was."""
    _switch.set(for_process=False)


@contextmanager
def auto_patching() -> Iterator[None]:
    """``enable_auto_patching`` for the time of a ``with`` block, which may be inside of another."""
    _switch.set(blocks=1)
    try:
        yield
    finally:
        _switch.set(blocks=-1)
