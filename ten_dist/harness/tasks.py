"""Tasks of lm-evaluation-harness: found before anything is computed, and run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ten_dist.config.options import alike
from ten_dist.console import warn
from ten_dist.errors import ConfigurationError
from ten_dist.extras import require_packages

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

# What lm_eval's own command takes.
_FEWSHOT_SEED = 1234
_BOOTSTRAP_ITERATIONS = 100_000


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, their data as well."""

    loaded: dict[str, Any]
    """As lm_eval's TaskManager loads them."""

    @classmethod
    def load(
        cls, names: Sequence[str], include_path: str | None, options: tuple[str, str]
    ) -> Tasks:
        """Load tasks, groups of them, or all that a pattern such as `arc_*` matches.

        Args:
            names: of lm_eval's tasks and of those in `include_path`.
            include_path: folder with task files of one's own.
            options: that gave the names, and the folder, for messages.

        Raises:
            ConfigurationError: lm_eval is not installed, the folder or a task is not
                there, or a task or its data cannot be read.
        """
        require_packages(options[0], ["lm_eval"], "evaluation")
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigurationError(f"{options[1]} {include_path} is no folder")
        # It warns of every default that a task file relies on.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = _task_manager(names, include_path)
        found: dict[str, None] = {}
        for name in names:
            matches = manager.match_tasks([name])
            if not matches:
                raise ConfigurationError(
                    f"{options[0]} {name}: {_not_found(name, manager, include_path)}"
                )
            found |= dict.fromkeys(matches)
        try:
            return cls(manager.load(list(found)))
        # A task file may run any code.
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            raise ConfigurationError(
                f"{options[0]} {','.join(found)} cannot be loaded: {text.splitlines()[0]}"
            ) from error

    def generating(self) -> list[str]:
        """Names of the tasks that have the model write."""
        return [
            name
            for name, task in self.loaded["tasks"].items()
            if task.OUTPUT_TYPE == "generate_until"
        ]

    def run(
        self,
        model: LM,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        bootstrap_iterations: int = _BOOTSTRAP_ITERATIONS,
        quiet: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Ask a model all questions; every rank that it is shared by must call this.

        Args:
            num_fewshot: solved examples before each question; by default the task's.
            limit: use only the first N documents of each task.
            bootstrap_iterations: resamplings for a standard error that no formula gives;
                0 leaves all standard errors out.
            quiet: shows no progress bars, of which lm_eval has one a task.

        Returns:
            Figures of each task and group by name, those of a filter as NAME,FILTER.
        """
        from lm_eval.evaluator import evaluate

        for name, task in self.loaded["tasks"].items():
            if num_fewshot is not None:
                _set_fewshot(name, task, num_fewshot)
            # Anew each time, so that the same examples are drawn.
            task.set_fewshot_seed(_FEWSHOT_SEED)
        bars = io.StringIO() if quiet else sys.stderr
        with contextlib.redirect_stderr(bars):
            results = evaluate(
                model,
                self.loaded,
                limit=limit,
                bootstrap_iters=bootstrap_iterations,
                log_samples=False,
            )
        return {name: _figures(found) for name, found in results["results"].items()}


def _task_manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """What knows the tasks of a folder, and lm_eval's own unless those are enough: to
    read their thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        # Groups and patterns may mean tasks of lm_eval as well.
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path)


def _set_fewshot(name: str, task: Any, number: int) -> None:
    if task.get_config("num_fewshot") == 0 and number:
        warn(f"task {name} takes no examples: --num_fewshot has no effect on it")
        return
    task.set_config(key="num_fewshot", value=number)


def _not_found(name: str, manager: TaskManager, include_path: str | None) -> str:
    """Why there is no such task: a file that cannot be read, or none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    damaged = []
    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # noqa: BLE001 - whatever it is, the file is at fault
            damaged.append(f"{path} cannot be read, {str(error).splitlines()[0]}")
    if damaged:
        return f"there is no such task, and {damaged[0]}"
    hint = alike(name, manager.all_tasks)
    return f"there is no such task{f', {hint}' if hint else ''}"


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Numbers of a result, without the name of the filter that takes all."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if "," in name and isinstance(value, (int, float))
    }
