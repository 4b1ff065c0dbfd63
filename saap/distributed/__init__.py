"""A context split over the processes of a `torch.distributed` group: context parallel decoding.

Every rank runs the whole model; each holds a contiguous part of the context's rows of every layer
and attends over its own. What a step exchanges does not depend on the context's length
(docs/scale.md).

    with saap.distributed.joined() as group:
        with saap.attached(model, budget=budget, group=group) as saap_model:
            model.generate(**inputs, cache=saap_model.cache())
"""

from .group import Group, GroupError, joined
from .store import SplitStore

__all__ = ["Group", "GroupError", "SplitStore", "joined"]
