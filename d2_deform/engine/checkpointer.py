"""Checkpoints that are there whole or not at all."""

import os
import pickle
from glob import escape, glob
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from d2_deform.engine.defaults import ConfigError
from d2_deform.engine.whole_file import open_whole, write_whole

__all__ = ["WholeCheckpointer"]


class WholeCheckpointer(DetectionCheckpointer):
    """Detectron2's, whose files are never half written, whatever ends the process.

    A checkpoint gets its name, and last_checkpoint its content, once all of it is on the disk. A
    folder that is none of the local file system ("s3://...") is written as Detectron2 does.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: it cannot be written (a full disk); what was there before is whole.
        """
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            return
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        for key, part in self.checkpointables.items():
            content[key] = part.state_dict()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with open_whole(path) as file:
            torch.save({**content, **kwargs}, file)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
        else:
            write_whole(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """As Detectron2's.

        Raises:
            ConfigError: last_checkpoint names a file that is not there.
        """
        path = super().get_checkpoint_file()
        if path and "://" not in path and not os.path.isfile(path):
            others = glob(os.path.join(escape(self.save_dir), "model_*.pth"))
            names = ", ".join(sorted(map(os.path.basename, others))) or "none"
            raise ConfigError(
                f"--resume: {os.path.join(self.save_dir, 'last_checkpoint')} names "
                f"'{os.path.basename(path)}', which is not there; write the name of another "
                f"checkpoint into it ({names}), or remove it to start anew."
            )
        return path

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            line = str(error).partition(". ")[0].splitlines()[:1]
            raise ConfigError(
                f"{filename} cannot be read as a checkpoint "
                f"({type(error).__name__}{': ' if line else ''}{''.join(line)}); name another one "
                "(MODEL.WEIGHTS, or with --resume the file last_checkpoint beside it)."
            ) from error
