"""Where the data lie: configurations, the demo data's generator, the preparation script.

``get_config(name, data_root=None)`` and ``list_datasets()`` are light (standard library only).
``prepare_demo`` and those of the other demo data (images, streets, harbours) are loaded when first
asked for: they need OpenCV.
"""

from typing import Any

from .config import DatasetConfig, get_config, list_datasets, read_mapping_table

__all__ = [
    "DatasetConfig",
    "get_config",
    "list_datasets",
    "prepare_demo",
    "prepare_demo_harbours",
    "prepare_demo_images",
    "prepare_demo_streets",
    "read_mapping_table",
]


def __getattr__(name: str) -> Any:
    if name == "prepare_demo":
        from .demo import prepare_demo

        return prepare_demo
    if name == "prepare_demo_images":
        from .demo_images import prepare_demo_images

        return prepare_demo_images
    if name == "prepare_demo_streets":
        from .demo_streets import prepare_demo_streets

        return prepare_demo_streets
    if name == "prepare_demo_harbours":
        from .demo_harbours import prepare_demo_harbours

        return prepare_demo_harbours
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
