"""The plugin's configs by name, as ``detectron2.model_zoo`` has Detectron2's."""

from d2_deform.model_zoo.model_zoo import (
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    list_configs,
)

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "list_configs"]
