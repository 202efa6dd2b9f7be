"""What the optim strings are attached to in transformers: names only, without importing it."""

from __future__ import annotations

__all__ = ["CARD_MODULE", "HANDLERS_MODULE", "MEMBERS_MODULE", "TRAINER_MODULE", "UnsupportedTransformersError"]

MEMBERS_MODULE = "transformers.training_args"
HANDLERS_MODULE = "transformers.trainer_optimizer"
CARD_MODULE = "transformers.modelcard"
TRAINER_MODULE = "transformers.trainer"


class UnsupportedTransformersError(ImportError):
    """The installed transformers does not have what the optim strings are attached to."""
