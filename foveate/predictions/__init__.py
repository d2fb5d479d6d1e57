"""Predict classes of images, objects in them, or a class for each of their pixels."""

from foveate.predictions.classify import Prediction, Predictions, picture, predict
from foveate.predictions.dense import DensePrediction, DensePredictions, predict_dense

__all__ = [
    "DensePrediction",
    "DensePredictions",
    "Prediction",
    "Predictions",
    "picture",
    "predict",
    "predict_dense",
]
