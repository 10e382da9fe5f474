"""How a class of the user's own, named by --dataset_class, becomes the training set."""

from __future__ import annotations

import importlib
import os
import sys

from library.data.dataset import TrainingSet
from library.flags.dataset import DatasetFlags


def custom_training_set(flags: DatasetFlags) -> TrainingSet:
    """What the class `package.module.Class` of --dataset_class gives when it is called with `flags`.

    It must be a `TrainingSet`, filled from wherever the class likes. The module is looked for in the folder where the
    script is run, too. ValueError says what is wrong with the name or the answer.
    """
    name = flags.dataset_class
    assert name is not None
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"--dataset_class {name}: expected package.module.Class")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--dataset_class {name}: {error}; is the module in this folder, or installed?") from error
    made = getattr(module, class_name, None)
    if not callable(made):
        raise ValueError(f"--dataset_class {name}: {module_name} has no class {class_name}")
    training_set = made(flags)
    if not isinstance(training_set, TrainingSet):
        raise ValueError(
            f"--dataset_class {name}: it gives a {type(training_set).__name__}; "
            "expected a library.data.dataset.TrainingSet"
        )
    return training_set
