"""The families that can be patched, and how a model is recognised as one of them."""

from __future__ import annotations

from torch import nn

from lsg_patch.families import bart, bert
from lsg_patch.families.base import AttentionNames, Family, find_modules

__all__ = ["FAMILIES", "AttentionNames", "Family", "family_of", "find_base", "find_modules"]

FAMILIES: dict[str, Family] = {family.name: family for family in (*bert.FAMILIES, *bart.FAMILIES)}


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
        TypeError: ``model`` is no module, or holds no base model of a known family.
        ValueError: it holds several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    found = [(name, module, family_of(module)) for name, module in model.named_modules()]
    known = [(name, module, family) for name, module, family in found if family is not None]
    if not known:
        raise TypeError(
            f"{type(model).__name__} holds no model of a family that can be patched; these are "
            f"known: {', '.join(FAMILIES)}"
        )
    if len(known) > 1:
        names = ", ".join(f"model.{name}" if name else "model" for name, _, _ in known)
        raise ValueError(
            f"{type(model).__name__} holds {len(known)} models that can be patched ({names}): "
            "patch each of them for itself"
        )
    _, base, family = known[0]
    return base, family
