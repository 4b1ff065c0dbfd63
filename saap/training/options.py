"""What a user can ask of a training."""

from dataclasses import asdict, dataclass, replace

from saap.budget import Budget, is_integer
from saap.defaults import N_SEGMENTS, default_nlist
from saap.index.file_fields import MOST_LISTS
from saap.index.routers import TRAINABLE
from saap.index_file import MOST_SEGMENTS


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `saap.train`, which documents them; ValueError for bad ones."""

    nlist: int | None = None
    router: str = "mlp"
    seed: int = 0
    n_sink: int = Budget.n_sink
    window: int = Budget.window
    n_segments: int = N_SEGMENTS
    hidden: int = 64
    steps: int = 400
    baselines: bool = False

    def __post_init__(self):
        if self.router not in TRAINABLE:
            raise ValueError(f"router must be one of {', '.join(TRAINABLE)}; got {self.router!r}")
        for name in ("nlist", "n_segments", "hidden", "steps"):
            self._check_at_least(name, 1)
        for name in ("n_sink", "window", "seed"):
            self._check_at_least(name, 0)
        for name, most in (("nlist", MOST_LISTS), ("n_segments", MOST_SEGMENTS)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most}; got {value}")

    def _check_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name == "nlist":
            return
        if not is_integer(value, least):
            raise ValueError(f"{name} must be at least {least}; got {value!r}")

    def for_context(self, context: int) -> "TrainingOptions":
        """With what was left open chosen for sequences of `context` tokens."""
        return replace(self, nlist=default_nlist(context) if self.nlist is None else self.nlist)

    @property
    def fitted_routers(self) -> tuple[str, ...]:
        """Names of the routers to fit, in a fixed order; the centroid router is not fitted."""
        wanted = {self.router, *(("linear", "mlp") if self.baselines else ())} - {"centroid"}
        return tuple(sorted(wanted))

    def as_dict(self) -> dict:
        return asdict(self)
