"""The families that can be patched, and how a model is recognised as one of them."""

from lsg_patch.families import bart, bert, documents, projecting, rotary
from lsg_patch.families.base import AttentionNames, Family, Rotary, find_modules
from lsg_patch.families.refused import REFUSED
from lsg_patch.families.registry import FAMILIES, family_of, find_base, register_family

__all__ = [
    "FAMILIES",
    "REFUSED",
    "AttentionNames",
    "Family",
    "Rotary",
    "family_of",
    "find_base",
    "find_modules",
    "register_family",
]

for _module in (bert, projecting, documents, rotary, bart):
    for _family in _module.FAMILIES:
        register_family(_family)
