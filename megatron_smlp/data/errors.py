"""The one error class of the data tools."""

from megatron_smlp.errors import UserError


class DataError(UserError):
    """Something about data or its tokenizer that the user can put right."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # what libraries say may have several lines


def require_package(name: str, *, purpose: str, extra: str) -> None:
    """Raise `DataError` with the way to install `name` where it cannot be imported."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise DataError(f"{purpose} needs the Python package {name!r}: pip install {extra}")
