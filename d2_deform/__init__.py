"""Deformable Convolutional Networks as a plugin for Detectron2.

``import d2_deform`` registers networks and data sets in Detectron2. The operators
(``d2_deform.ops``) and layers (``d2_deform.layers``) need torch alone.
"""

__all__ = ["add_deform_config"]

_HINT = (
    "d2_deform: Detectron2 is not installed, so only d2_deform.ops and d2_deform.layers work; get "
    "it by: pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2'"
)

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise

    import logging

    logging.getLogger(__name__).warning(_HINT)

    _NEEDS_DETECTRON2 = {
        "add_deform_config",
        "analysis",
        "config",
        "data",
        "engine",
        "evaluation",
        "export",
        "model_zoo",
        "modeling",
        "solver",
        "visualization",
    }

    def __getattr__(name: str) -> object:
        if name in _NEEDS_DETECTRON2:
            raise ImportError(_HINT, name="detectron2") from None
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from d2_deform import data, modeling  # noqa: F401  (they register themselves)
    from d2_deform.config import add_deform_config
