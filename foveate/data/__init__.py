"""Data: the small set that ships with the package, images from anywhere, what models take."""

from foveate.data.fashion import (
    CLASSES,
    LabelledImages,
    fashion_mnist,
    fashion_mnist_mini,
    find_fashion_mnist,
    normalise,
)
from foveate.data.images import SUFFIXES, ImageFiles, find_images, read_image, to_rgb
from foveate.data.preprocess import FITS, Prepared, Preprocessing

__all__ = [
    "CLASSES",
    "FITS",
    "SUFFIXES",
    "ImageFiles",
    "LabelledImages",
    "Prepared",
    "Preprocessing",
    "fashion_mnist",
    "fashion_mnist_mini",
    "find_fashion_mnist",
    "find_images",
    "normalise",
    "read_image",
    "to_rgb",
]
