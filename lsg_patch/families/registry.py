"""The families that are known, and how a model is recognised as one of them."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from lsg_patch.families.base import AttentionNames, Family, Rotary
from lsg_patch.families.refused import why_refused

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Let models of another family be patched from now on, in this process; returns ``family``.

    A family says where things are in a model: see ``Family``, whose defaults are BERT's. A model
    class of your own that is derived from a supported one needs no family.

    >>> import torch
    >>> import lsg_patch
    >>> class Attention(torch.nn.Module):
    ...     def __init__(self, width, num_heads):
    ...         super().__init__()
    ...         self.wq, self.wk, self.wv, self.wo = (torch.nn.Linear(width, width) for _ in "qkvo")
    ...         self.num_heads, self.dropout = num_heads, 0.0
    ...
    ...     def forward(self, x, mask=None):
    ...         q, k, v = (w(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
    ...                    for w in (self.wq, self.wk, self.wv))
    ...         seen = None if mask is None else mask[:, None, None].bool()
    ...         x = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    ...         return self.wo(x.transpose(1, 2).flatten(2)), None
    >>> class Embeddings(torch.nn.Module):
    ...     def __init__(self, words, positions, width):
    ...         super().__init__()
    ...         self.words = torch.nn.Embedding(words, width)
    ...         self.positions = torch.nn.Embedding(positions, width)
    ...         self.norm = torch.nn.LayerNorm(width)
    ...
    ...     def forward(self, ids):
    ...         return self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]])
    >>> class Stack(torch.nn.Module):
    ...     def __init__(self, width, num_heads, num_layers):
    ...         super().__init__()
    ...         self.blocks = torch.nn.ModuleList(Attention(width, num_heads) for _ in range(num_layers))
    ...
    ...     def forward(self, x, mask=None):
    ...         for block in self.blocks:
    ...             x = x + block(x, mask)[0]
    ...         return x
    >>> class MyEncoder(torch.nn.Module):
    ...     def __init__(self, config):
    ...         super().__init__()
    ...         self.config = config
    ...         self.embeddings = Embeddings(config.vocab_size, config.max_position_embeddings, 16)
    ...         self.stack = Stack(16, 4, 2)
    ...
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return (self.stack(self.embeddings(input_ids), attention_mask),)
    >>> def output(module, hidden, context):  # what Attention.forward does after its attention
    ...     return module.wo(context)
    >>> family = lsg_patch.register_family(lsg_patch.Family(
    ...     "my-encoder", ("MyEncoder",),
    ...     attentions="stack.blocks.*", stack="stack",
    ...     words="words", positions="positions", token_types=None, global_path=("norm",),
    ...     names=lsg_patch.AttentionNames("wq", "wk", "wv", heads="num_heads"), output=output,
    ... ))
    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(vocab_size=50, max_position_embeddings=64, cls_token_id=1)
    >>> model = MyEncoder(config).eval()
    >>> ids = torch.cat([torch.ones(2, 1).long(), torch.randint(2, 50, (2, 59))], dim=1)
    >>> before = model(ids)[0]
    >>> with lsg_patch.patched(model, block_size=32, max_position_embeddings=500):
    ...     torch.allclose(model(ids)[0], before, atol=1e-5)  # up to two blocks
    ...     model(torch.randint(2, 50, (2, 500)))[0].shape
    True
    torch.Size([2, 500, 16])

    Raises:
        TypeError: ``family`` is no ``Family``, or a field of it is of a wrong type.
        ValueError: a field is empty, or the name or a class is that of another family. To register
            an equal one again is no error.
    """
    _check(family)
    if FAMILIES.get(family.name) == family:
        return family
    if family.name in FAMILIES:
        raise ValueError(f"there is another family of the name {family.name!r} already")
    for other in FAMILIES.values():
        both = set(family.base_classes) & set(other.base_classes)
        if both:
            raise ValueError(f"{min(both)} is a class of the family {other.name!r} already")
    FAMILIES[family.name] = family
    return family


def _check(family: Family) -> None:
    if not isinstance(family, Family):
        raise TypeError(f"a lsg_patch.Family is registered, not {type(family).__name__}")
    for field in fields(Family):
        name, kind, value = field.name, str(field.type), getattr(family, field.name)
        if value is None and kind.endswith("None"):
            continue
        if kind.startswith("str"):
            fits, wanted = isinstance(value, str), "a string"
        elif kind.startswith("tuple"):
            fits = isinstance(value, tuple) and all(isinstance(x, str) and x for x in value)
            wanted = "a tuple of strings"
        elif kind.startswith("Callable"):
            fits, wanted = callable(value), "a function"
        else:
            own = {"AttentionNames": AttentionNames, "Rotary": Rotary}.get(kind.split()[0], bool)
            fits, wanted = isinstance(value, own), own.__name__
        if not fits:
            raise TypeError(f"Family.{name} must be {wanted}, not {value!r}")
        if value == "" or (value == () and name == "base_classes"):
            raise ValueError(f"Family.{name} is empty")
    if family.relative_bias is not None and family.embeds_in_stack:
        raise ValueError("Family.relative_bias needs embeddings outside of the stack")


def family_of(module: nn.Module) -> Family | None:
    """The family that ``module`` is a base model of, by the names of its class and their bases.

    The most derived class decides, so that a subclass of a supported model is supported, and a
    family derived from another one is recognised as itself.
    """
    for cls in type(module).__mro__:
        for family in FAMILIES.values():
            if cls.__name__ in family.base_classes:
                return family
    return None


def find_base(model: nn.Module) -> tuple[nn.Module, Family]:
    """The one base model inside ``model`` (or ``model`` itself) and its family.

    Raises:
        TypeError: ``model`` holds no base model of a known family; the message says why where it is
            known to be impossible. Or that model has no config.
        ValueError: it holds several.
    """
    of_each = ((name, module, family_of(module)) for name, module in model.named_modules())
    known = [(name, module, family) for name, module, family in of_each if family is not None]
    if not known:
        raise TypeError(
            why_refused(model)
            or f"{type(model).__name__} holds no model of a family that can be patched; these are "
            f"known: {', '.join(FAMILIES)}. Another family is made known by "
            "lsg_patch.register_family(lsg_patch.Family(name, (class name,), ...)), if its layers "
            "are like BERT's"
        )
    if len(known) > 1:
        names = ", ".join(f"model.{name}" if name else "model" for name, _, _ in known)
        raise ValueError(
            f"{type(model).__name__} holds {len(known)} models that can be patched ({names}): "
            "patch each of them for itself"
        )
    _, base, family = known[0]
    if not hasattr(base, "config"):
        raise TypeError(
            f"{type(base).__name__} has no config: give it one, which states max_position_embeddings where "
            "the model has a table of positions"
        )
    return base, family
