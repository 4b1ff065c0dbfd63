"""Training: partitions and routers for every layer and head of a model.

`train` returns an index; `prepare` and `train_file` check first, tell the memory needed, and write
a file that a killed training goes on to. `options` and `plan` say what is trained on what, `layer`
is one layer, `hidden` and `work` are what is kept between layers and between runs, `processes` is
several of them.
"""

from .options import N_SEGMENTS, TRAINABLE, TrainingOptions, default_nlist, default_window
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
    "default_window",
    "prepare",
    "run",
    "train",
    "train_file",
    "work_folder_of",
]
