"""ArrowQuant Service: quantizes model weights over HTTP and reports what it cost."""

from importlib.metadata import version

__version__ = version("arrowquant-service")
