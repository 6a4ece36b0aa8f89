"""Which engine this is, for caches and manifests."""

from importlib.metadata import version

# Raised whenever the same inputs would give other statistics or weights, so that nothing stale is taken from a cache.
ENGINE = "2"
LIBRARIES = ("catmerge", "torch", "transformers", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of what took part in a merge."""
    return {name: version(name) for name in LIBRARIES}
