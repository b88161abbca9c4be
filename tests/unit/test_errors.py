"""Exit codes, and the layer's name."""

import pytest

from roundel import errors
from roundel.errors import RoundelError, in_layer


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("RoundelError", 1),
        ("InputError", 2),
        ("ModelError", 2),
        ("DataError", 2),
        ("SchemeError", 2),
        ("OutputError", 2),
        ("NumericalError", 3),
        ("StorageError", 4),
        ("ProcessesError", 5),
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    error = getattr(errors, name)
    assert issubclass(error, RoundelError)
    assert error("x").exit_code == code
    assert str(error("x")) == "x"


def test_every_error_is_exported() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, RoundelError)}
    assert defined <= set(errors.__all__)


def test_the_layers_name_is_added_once() -> None:
    with pytest.raises(errors.NumericalError) as caught, in_layer("outer"), in_layer("inner"):
        raise errors.NumericalError("too small")
    assert str(caught.value) == "inner: too small"
    assert caught.value.layer == "inner"


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(KeyError) as caught, in_layer("layer"):
        raise KeyError("x")
    assert not hasattr(caught.value, "layer")
