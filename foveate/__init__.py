"""foveate makes vision transformers look only where it matters."""

from foveate.api import apply, describe, load, save, unwrap
from foveate.core import Schedule
from foveate.registry import list_methods

__all__ = ["Schedule", "apply", "describe", "list_methods", "load", "save", "unwrap"]
