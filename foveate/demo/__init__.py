"""The demo: every method on the small trained model that ships with the package."""

from foveate.demo.run import run_demo

__all__ = ["run_demo"]
