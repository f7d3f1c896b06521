"""LSG attention on tensors alone: no model, no transformers."""

from lsg_patch.attention.bias import RelativeBias
from lsg_patch.attention.functional import check_backend, lsg_attention, make_geometry
from lsg_patch.attention.geometry import Geometry
from lsg_patch.attention.sparsity import SPARSITY_TYPES, draw_projections, projection_shapes

__all__ = [
    "SPARSITY_TYPES",
    "Geometry",
    "RelativeBias",
    "check_backend",
    "draw_projections",
    "lsg_attention",
    "make_geometry",
    "projection_shapes",
]
