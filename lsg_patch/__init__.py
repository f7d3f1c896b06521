"""LSG attention for models of the BERT family: long inputs by one line, in place, and back."""

from lsg_patch import requirements

requirements.check()  # before an import fails that says less

from lsg_patch.attention import RelativeBias, lsg_attention
from lsg_patch.config import LSGConfig
from lsg_patch.families import AttentionNames, Family, Rotary, register_family
from lsg_patch.patching import (
    freeze_except_global,
    get_config,
    global_embeddings,
    is_patched,
    patch_model,
    patched,
    unpatch_model,
)

__all__ = [
    "AttentionNames",
    "Family",
    "LSGConfig",
    "RelativeBias",
    "Rotary",
    "freeze_except_global",
    "get_config",
    "global_embeddings",
    "is_patched",
    "lsg_attention",
    "patch_model",
    "patched",
    "register_family",
    "unpatch_model",
]
