"""The namespace of flags, which refuses assignment while it is checked."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any


class Arguments(argparse.Namespace):
    """Megatron's namespace; a check of flags/ that assigns to it is refused."""

    __slots__ = ("_is_frozen",)  # beside the namespace's values, which checkpoints record

    @classmethod
    def of(cls, args: argparse.Namespace) -> Arguments:
        return cls(**vars(args))

    def freeze(self) -> None:
        """Refuse every assignment from here on.

        Raises (whoever assigns):
            AttributeError: with the name.
        """
        object.__setattr__(self, "_is_frozen", True)

    @contextlib.contextmanager
    def thawed(self) -> Iterator[None]:
        """Let Megatron's validation and the training write, which keep their numbers in here."""
        object.__setattr__(self, "_is_frozen", False)
        try:
            yield
        finally:
            self.freeze()

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_is_frozen", False):
            raise AttributeError(
                f"args.{name} = {value!r}: flags are settled in flags/defaults.py, and not "
                "assigned to while they are checked."
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        """Be pickled and copied as a plain namespace: a checkpoint must not need this class."""
        return argparse.Namespace, (), dict(vars(self))
