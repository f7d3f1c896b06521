"""LSG attention for models of the BERT family: long inputs by one line, in place, and back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lsg_patch import requirements

requirements.check()  # before an import fails that says less

if TYPE_CHECKING:
    from lsg_patch.attention import RelativeBias as RelativeBias, lsg_attention as lsg_attention
    from lsg_patch.checkpoints import (
        auto_patching as auto_patching,
        disable_auto_patching as disable_auto_patching,
        enable_auto_patching as enable_auto_patching,
        from_pretrained as from_pretrained,
    )
    from lsg_patch.chunking import Chunks as Chunks, chunk_embeddings as chunk_embeddings
    from lsg_patch.config import LSGConfig as LSGConfig
    from lsg_patch.conversion import convert as convert
    from lsg_patch.costs import overview as overview
    from lsg_patch.exporting import export_onnx as export_onnx
    from lsg_patch.families import (
        AttentionNames as AttentionNames,
        Family as Family,
        Rotary as Rotary,
        register_family as register_family,
    )
    from lsg_patch.patching import (
        freeze_except as freeze_except,
        freeze_except_global as freeze_except_global,
        get_config as get_config,
        global_embeddings as global_embeddings,
        is_patched as is_patched,
        patch_model as patch_model,
        patched as patched,
        unpatch_model as unpatch_model,
    )
    from lsg_patch.plots import plot_cost as plot_cost, plot_pattern as plot_pattern

# rooms open at the first use of a name: `import lsg_patch` loads neither torch nor a model's code
_ROOMS = {
    "attention": "RelativeBias lsg_attention",
    "checkpoints": "auto_patching disable_auto_patching enable_auto_patching from_pretrained",
    "chunking": "Chunks chunk_embeddings",
    "config": "LSGConfig",
    "conversion": "convert",
    "costs": "overview",
    "exporting": "export_onnx",
    "families": "AttentionNames Family Rotary register_family",
    "patching": "freeze_except freeze_except_global get_config global_embeddings is_patched "
    "patch_model patched unpatch_model",
    "plots": "plot_cost plot_pattern",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = sorted(_ROOM_OF)


if not TYPE_CHECKING:  # to a type checker every name would be there then

    def __getattr__(name: str) -> Any:
        """A public name, or one of the rooms (PEP 562)."""
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
