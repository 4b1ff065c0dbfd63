"""What tests of the choice by codes share."""


def rows(ranges, i, h):
    """The rows of query i and head h, in the order of its ranges."""
    pairs = zip(ranges[0][i, h].tolist(), ranges[1][i, h].tolist(), strict=True)
    return [row for start, length in pairs for row in range(start, start + length)]
