"""The tasks that can be trained and scored, by name. A new task is one file and one row of this table."""

from crab.tasks.arig import Arig
from crab.tasks.avcap import Avcap
from crab.tasks.ave import Ave
from crab.tasks.avqa import Avqa
from crab.tasks.avss import Avss
from crab.tasks.avvp import Avvp
from crab.tasks.base import Answer, Masks, Metrics, Task
from crab.tasks.ms3 import Ms3
from crab.tasks.ref_avs import RefAvs
from crab.tasks.s4 import S4

_ALL: tuple[Task, ...] = (
    Ave(),
    Avvp(),
    Arig(),
    S4(),
    Ms3(),
    Avss(),
    RefAvs(),
    Avqa(),
    Avcap(),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}

__all__ = ["TASKS", "Answer", "Masks", "Metrics", "Task"]
