"""LSG attention for models of the BERT family: long inputs by one line, in place, and back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lsg_patch import requirements

requirements.check()  # before an import fails that says less

if TYPE_CHECKING:
    from lsg_patch.attention import RelativeBias, lsg_attention
    from lsg_patch.checkpoints import (
        auto_patching,
        disable_auto_patching,
        enable_auto_patching,
        from_pretrained,
    )
    from lsg_patch.chunking import Chunks, chunk_embeddings
    from lsg_patch.config import LSGConfig
    from lsg_patch.conversion import convert
    from lsg_patch.costs import overview
    from lsg_patch.exporting import export_onnx
    from lsg_patch.families import AttentionNames, Family, Rotary, register_family
    from lsg_patch.patching import (
        freeze_except,
        freeze_except_global,
        get_config,
        global_embeddings,
        is_patched,
        patch_model,
        patched,
        unpatch_model,
    )
    from lsg_patch.plots import plot_cost, plot_pattern

__all__ = [
    "AttentionNames",
    "Chunks",
    "Family",
    "LSGConfig",
    "RelativeBias",
    "Rotary",
    "auto_patching",
    "chunk_embeddings",
    "convert",
    "disable_auto_patching",
    "enable_auto_patching",
    "export_onnx",
    "freeze_except",
    "freeze_except_global",
    "from_pretrained",
    "get_config",
    "global_embeddings",
    "is_patched",
    "lsg_attention",
    "overview",
    "patch_model",
    "patched",
    "plot_cost",
    "plot_pattern",
    "register_family",
    "unpatch_model",
]

# rooms open at the first use of a name: `import lsg_patch` loads neither torch nor a model's code
_ROOMS = {
    "attention": ("RelativeBias", "lsg_attention"),
    "checkpoints": (
        "auto_patching",
        "disable_auto_patching",
        "enable_auto_patching",
        "from_pretrained",
    ),
    "chunking": ("Chunks", "chunk_embeddings"),
    "config": ("LSGConfig",),
    "conversion": ("convert",),
    "exporting": ("export_onnx",),
    "families": ("AttentionNames", "Family", "Rotary", "register_family"),
    "costs": ("overview",),
    "plots": ("plot_cost", "plot_pattern"),
    "patching": (
        "freeze_except",
        "freeze_except_global",
        "get_config",
        "global_embeddings",
        "is_patched",
        "patch_model",
        "patched",
        "unpatch_model",
    ),
}


def __getattr__(name: str) -> Any:
    """A public name, or one of the rooms (PEP 562)."""
    for room, names in _ROOMS.items():
        if name == room:
            return import_module(f"{__name__}.{room}")
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{room}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
