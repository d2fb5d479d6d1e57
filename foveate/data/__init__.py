"""Data: the small set that ships, images from any source, preparation for models."""

from foveate.data.augment import Augment, Transform, eval_transform, train_transform
from foveate.data.dense_augment import (
    DenseAugment,
    dense_eval_transform,
    dense_train_transform,
)
from foveate.data.fashion import (
    CLASSES,
    LabelledImages,
    fashion_mnist,
    fashion_mnist_mini,
    find_fashion_mnist,
    normalise,
)
from foveate.data.images import SUFFIXES, ImageFiles, Unreadable, find_images, read_image, to_rgb
from foveate.data.inputs import Inputs
from foveate.data.loader import Loader, device_batches, listed, stacked, usual_workers
from foveate.data.preprocess import FITS, Prepared, Preprocessing
from foveate.data.seeds import seeded
from foveate.data.sources import (
    IGNORE,
    ArraySource,
    DatasetSource,
    NoSplit,
    Source,
    open_first,
    open_source,
)
from foveate.data.splits import Splits, final_images, limited, open_images, open_splits

__all__ = [
    "CLASSES",
    "FITS",
    "IGNORE",
    "SUFFIXES",
    "ArraySource",
    "Augment",
    "DatasetSource",
    "DenseAugment",
    "ImageFiles",
    "Inputs",
    "LabelledImages",
    "Loader",
    "NoSplit",
    "Prepared",
    "Preprocessing",
    "Source",
    "Splits",
    "Transform",
    "Unreadable",
    "dense_eval_transform",
    "dense_train_transform",
    "device_batches",
    "eval_transform",
    "fashion_mnist",
    "fashion_mnist_mini",
    "final_images",
    "find_fashion_mnist",
    "find_images",
    "limited",
    "listed",
    "normalise",
    "open_first",
    "open_images",
    "open_source",
    "open_splits",
    "read_image",
    "seeded",
    "stacked",
    "to_rgb",
    "train_transform",
    "usual_workers",
]
