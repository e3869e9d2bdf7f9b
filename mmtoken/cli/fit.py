"""`mmtoken fit` and `mmtoken validate`: train a zoo model from a recipe, or check a checkpoint of it.

A recipe is one YAML file with the sections `trainer`, `model` and `data` (see `models/*/recipe.yaml`); every value can
be overridden on the command line. `--ckpt_path last` goes on from where an interrupted run stopped; the data of a step
depend on nothing but the seed and the step, so the result is that of the uninterrupted run.

A YAML names classes to import: treat a recipe like code, and run only those you trust.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from argparse import ArgumentError
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
        config: Any = self.config
        check_checkpoint(config[config.subcommand].ckpt_path)

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; values that they refuse are mistakes in the recipe."""
        try:
            super().instantiate_classes()
        except MMTokenError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            raise MMTokenError(
                f"recipe: a value is refused ({condense(error)}); compare models/tiny_llava/recipe.yaml"
            ) from error


_LIGHTNINGS_OWN = ("last", "best", "hpc")
_NO_REASON = re.compile(r"Does not validate|Subtypes: |Errors:$|- Expected a <class 'NoneType'>|Given value")
"""Beginnings of lines of jsonargparse that repeat the whole recipe or name alternatives that nobody tried."""


def check_checkpoint(path: str | None) -> None:
    """Refuse a checkpoint that is damaged, or holds more than tensors and numbers, before Lightning unpickles it.

    Args:
        path: --ckpt_path; None and names that Lightning resolves in its own folders pass.

    Raises:
        CheckpointError: it is.
    """
    if path is None or path in _LIGHTNINGS_OWN:
        return
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"state_dict", "global_step", "epoch"} - set(saved)
        reason = f"it lacks {min(missing)}" if missing else ""
    except pickle.UnpicklingError:  # its text explains how to load the file all the same
        reason = "it is damaged, or holds more than tensors and numbers"
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    if reason:
        raise CheckpointError(
            f"ckpt_path={path!r} is no checkpoint of an `mmtoken fit` run ({reason}); give its last.ckpt."
        )


def condense(error: BaseException) -> str:
    """What jsonargparse says in many lines, in one."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not _NO_REASON.match(line)]
    # What is left of a line that names the key before it says "Does not validate".
    text = re.sub(r"Does not validate against any of the Union subtypes", "", " ".join(kept or lines))
    return re.sub(r"\s+", " ", text).strip()


def main(argv: list[str], subcommand: str = "fit") -> int:
    """Run `mmtoken fit ...` or `mmtoken validate ...` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: the recipe, an option or the checkpoint cannot be used.
        KeyboardInterrupt: Ctrl-C; the last checkpoint is whole.
    """
    if not argv:
        raise MMTokenError(f"config is missing; give a recipe: mmtoken {subcommand} --config recipe.yaml")
    # Which seed is set stands in the recipe; an error shall be the only line.
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
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
    except (ArgumentError, UnicodeDecodeError) as error:
        raise MMTokenError(f"{subcommand}: {condense(error)}; compare models/tiny_llava/recipe.yaml") from error
    except MisconfigurationException as error:
        raise MMTokenError(f"{subcommand}: {condense(error)}") from error
    except SystemExit as leaving:
        # Lightning turns Ctrl-C into exit code 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from leaving
        raise
    except (RuntimeError, KeyError) as error:
        if not re.search("loading state_dict|restore optimizer state", str(error)):
            raise
        raise CheckpointError(
            f"ckpt_path does not fit the recipe ({condense(error)[:300]}); give a checkpoint of it."
        ) from error
    return 0
