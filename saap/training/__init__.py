"""Training: partitions and routers for every layer and head of a model.

`train` returns an index. `prepare` checks the input and says how much memory is needed;
`train_file` then writes a file, and goes on where a killed training stopped. Modules: `options`
and `plan` say what is trained on what; `layer` trains one layer; `hidden` and `work` keep what is
needed between layers and between runs; `processes` lets several processes share the layers.
"""

from .options import N_SEGMENTS, TRAINABLE, TrainingOptions, default_nlist
from .processes import Processes, ProcessLost
from .whole_model import Training, prepare, run, train, train_file, work_folder_of

__all__ = [
    "N_SEGMENTS",
    "TRAINABLE",
    "ProcessLost",
    "Processes",
    "Training",
    "TrainingOptions",
    "default_nlist",
    "prepare",
    "run",
    "train",
    "train_file",
    "work_folder_of",
]
