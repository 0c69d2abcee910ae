"""ArrowQuant Service: quantizes model weights over HTTP and reports what it cost."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("arrowquant-service")
except PackageNotFoundError:
    __version__ = "0+checkout"  # not installed, as on a machine that only tries its GPU
