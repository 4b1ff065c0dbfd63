"""What a call leaves for the next one with the same tensors."""


class Preparation:
    """Holds addresses of tensors, which a copy of them does not have: a copy of this is None."""

    __slots__ = ()

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()
