"""The tasks that can be trained and scored, by name. A new task is one file and one row of this table."""

from crab.tasks.ave import Ave
from crab.tasks.avqa import Avqa
from crab.tasks.avvp import Avvp
from crab.tasks.base import Metrics, Task

TASKS: dict[str, Task] = {task.name: task for task in (Ave(), Avvp(), Avqa())}

__all__ = ["TASKS", "Metrics", "Task"]
