"""Every task by name, and names for groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nearfar.errors import UnknownNameError
from nearfar.evaluation.tasks import (
    needle_grid,
    niah,
    recall,
    ruler_qa,
    text,
    tracking,
    word_counts,
)
from nearfar.evaluation.tasks.base import Metric, Task
from nearfar.evaluation.tasks.questions import CONTAINED, F1, RECALLED, QuestionFile

RULER = (*niah.TASKS, *tracking.TASKS, *word_counts.TASKS, *ruler_qa.TASKS)
BUILT_IN: dict[str, Task] = {
    task.name: task for task in (*RULER, *needle_grid.TASKS, *recall.TASKS, *text.TASKS)
}
QA = "qa"  # all files of --data
RULER_NAMES = tuple(task.name for task in RULER)
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*(task.metric for task in BUILT_IN.values()), CONTAINED, F1, RECALLED)
}
GROUPS = {"ruler": RULER_NAMES, "niah": tuple(task.name for task in niah.TASKS)}


def create_tasks(names: Iterable[str], data: Sequence[Path]) -> list[Task]:
    """Tasks by name, groups spelled out, in order and without repetition.

    `ruler` leaves out its two tasks of questions if no file fits them.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        if name == QA:
            tasks |= {task.name: task for task in map(QuestionFile, data)}
        elif name in GROUPS:
            unable = {task.name for task in ruler_qa.TASKS if task.sources(data) is None}
            tasks |= {each: BUILT_IN[each] for each in GROUPS[name] if each not in unable}
        elif name in BUILT_IN:
            tasks[name] = BUILT_IN[name]
        else:
            raise UnknownNameError("task", name, [*BUILT_IN, *GROUPS, QA])
    return list(tasks.values())
