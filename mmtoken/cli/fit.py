"""`mmtoken fit` and `mmtoken validate`: train a zoo model from a recipe, or check a checkpoint of it.

A recipe is one YAML file with the sections `trainer`, `model` and `data` (see `models/*/recipe.yaml`); every value can
be overridden on the command line. `--ckpt_path last` goes on from where an interrupted run stopped; the data of a step
depend on nothing but the seed and the step, so the result is that of the uninterrupted run.

A YAML names classes to import: treat a recipe like code, and run only those you trust.
"""

from __future__ import annotations

import pickle
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mmtoken.errors import CheckpointError, MMTokenError


class RecipeCLI(LightningCLI):
    """LightningCLI with fit and validate only."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Arguments of each sub-command that the recipe fills in itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`; that they were passed on by `mmtoken` and not read from the command line is no mistake."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().parse_arguments(parser, args)


def check_checkpoint(argv: list[str]) -> None:
    """Refuse a --ckpt_path that is damaged, or holds more than tensors and numbers, before Lightning unpickles it.

    Raises:
        CheckpointError: it is.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = word.partition("=")
        path = value or following
        if name != "--ckpt_path" or not Path(path).suffix:  # "last" and "best" are Lightning's own
            continue
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(
                f"ckpt_path={path!r} is no checkpoint of an `mmtoken fit` run ({reason}); give its last.ckpt."
            ) from error


def main(argv: list[str], subcommand: str = "fit") -> int:
    """Run `mmtoken fit ...` or `mmtoken validate ...` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: the recipe or an option cannot be used.
    """
    check_checkpoint(argv)
    try:
        RecipeCLI(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "mmtoken", "exit_on_error": False},
            args=[subcommand, *argv],
        )
    except (ArgumentError, MisconfigurationException) as error:
        raise MMTokenError(f"{' '.join([subcommand, *argv])}: {error}") from error
    return 0
