"""The user's network as stage two uses it: frozen, sharing the user's tensors, watched, and made fast where that is exact."""

from stfbnn.trunk.copying import shared_copy
from stfbnn.trunk.fingerprint import fingerprint, structure_fingerprint
from stfbnn.trunk.folding import FirstLayerAffine, FoldingReport, apply_first_layer_affine, fold
from stfbnn.trunk.frozen_ops import FoldedNorm, FrozenAffine, FrozenConv1d, FrozenConv2d, FrozenConv3d
from stfbnn.trunk.guard import ChangeGuard
from stfbnn.trunk.independence import inputs_left_alone, require_apart

__all__ = [
    "ChangeGuard",
    "FirstLayerAffine",
    "FoldedNorm",
    "FoldingReport",
    "FrozenAffine",
    "FrozenConv1d",
    "FrozenConv2d",
    "FrozenConv3d",
    "apply_first_layer_affine",
    "fingerprint",
    "fold",
    "inputs_left_alone",
    "require_apart",
    "shared_copy",
    "structure_fingerprint",
]
