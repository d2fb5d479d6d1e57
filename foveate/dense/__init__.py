"""Dense tasks: backbones that make maps from any ViT, reduced or not, and heads on them."""

from foveate.core.calibration import calibrate
from foveate.dense.backbone import DenseBackbone, DenseModel, Features, Hosting, windowed
from foveate.dense.build import make_dense
from foveate.dense.canvas import Canvas
from foveate.dense.class_token import with_class_token
from foveate.dense.deformable import DeformableAttention, Levels, sample_points
from foveate.dense.detectors import ViTFasterRCNN, ViTMaskRCNN, faster_rcnn, mask_rcnn
from foveate.dense.fpn import FpnBackbone
from foveate.dense.segmenters import Segmenter, segmenter
from foveate.dense.simple_pyramid import SimplePyramid, pyramid
from foveate.dense.vit_adapter import ViTAdapter, adapter

__all__ = [
    "Canvas",
    "DeformableAttention",
    "DenseBackbone",
    "DenseModel",
    "Features",
    "FpnBackbone",
    "Hosting",
    "Levels",
    "Segmenter",
    "SimplePyramid",
    "ViTAdapter",
    "ViTFasterRCNN",
    "ViTMaskRCNN",
    "adapter",
    "calibrate",
    "faster_rcnn",
    "make_dense",
    "mask_rcnn",
    "pyramid",
    "sample_points",
    "segmenter",
    "windowed",
    "with_class_token",
]
