"""Export models as files for a runtime: ONNX, OpenVINO, torch.export, in float32 or 8 bits."""

from foveate.exports.check import Check, Speed
from foveate.exports.make import FORMATS, Exported, export

__all__ = ["FORMATS", "Check", "Exported", "Speed", "export"]
