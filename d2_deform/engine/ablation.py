"""Trains and evaluates the rows of a study one after the other, each in a process of its own.

A study's folder::

    settings.json                 what all runs have in common, and every row's config keys
    runs/<row>_seed<n>/           one run, see ablation_runs.py
    table<k>.{md,csv,png}         the table
    runs.csv                      every figure of every run
"""

import fcntl
import glob
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from typing import IO, Any

import torch
from detectron2.config import CfgNode

from d2_deform import model_zoo
from d2_deform.analysis.ablation import TABLES, Row, Study
from d2_deform.analysis.ablation_report import (
    compare_rows,
    draw_comparison,
    format_csv,
    format_markdown,
    format_runs_csv,
)
from d2_deform.data.proposals import check_proposal_files
from d2_deform.engine.ablation_runs import (
    Run,
    estimate_seconds_left,
    figures_by_row,
    read_json,
    read_runs,
    write_json,
)
from d2_deform.engine.defaults import ConfigError, flatten, load_config
from d2_deform.engine.scaling import scale_to_world_size
from d2_deform.engine.study_folder import differing_settings
from d2_deform.engine.whole_file import write_whole

__all__ = ["AblationRunner", "common_options", "shorten_schedule"]

OF_EVERY_RUN = ("OUTPUT_DIR", "SEED")  # set by the runner
_CHECKPOINTS = 10  # at least so many in a run: what a kill may cost
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 15.0  # a stopped process may take to end


def shorten_schedule(cfg: CfgNode, iterations: int) -> list[str]:
    """Options that bring a schedule to another length, its steps and warm-up in proportion."""
    share = iterations / cfg.SOLVER.MAX_ITER
    steps = tuple(max(1, round(step * share)) for step in cfg.SOLVER.STEPS)
    return [
        *("SOLVER.MAX_ITER", str(iterations)),
        *("SOLVER.STEPS", str(steps)),
        *("SOLVER.WARMUP_ITERS", str(round(cfg.SOLVER.WARMUP_ITERS * share))),
    ]


def common_options(
    study: Study, iterations: int | None, opts: Sequence[str], use_gpu: bool = True
) -> list[str]:
    """The options of every run of a study, but for those of its row.

    Args:
        study: the study.
        iterations: instead of the config's SOLVER.MAX_ITER; see `shorten_schedule`.
        opts: the user's, KEY VALUE ...

    Raises:
        ConfigError: an option is one that the rows or runs differ in, or cannot be used.
    """
    for key in opts[::2]:
        if key in study.reserved_keys():
            raise ConfigError(f"options: {key} is what the rows differ in; use --arm for a row.")
        if key in OF_EVERY_RUN:
            raise ConfigError(f"options: {key} is set for every run; see --seeds and --output.")
    if iterations is not None and "SOLVER.MAX_ITER" in opts[::2]:
        raise ConfigError("options: SOLVER.MAX_ITER is given twice, by --iterations, too.")
    config_file = model_zoo.get_config_file(study.config)
    with _quietly():
        cfg = load_config(config_file, [*study.options, *opts], use_gpu, with_data=False)
    options = [*study.options]
    if iterations is not None:
        options += shorten_schedule(cfg, iterations)
    if "SOLVER.CHECKPOINT_PERIOD" not in opts[::2]:
        most = math.ceil((iterations or cfg.SOLVER.MAX_ITER) / _CHECKPOINTS)
        period = min(cfg.SOLVER.CHECKPOINT_PERIOD, most)
        options += ["SOLVER.CHECKPOINT_PERIOD", str(period)]
    return [*options, *opts]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the notes on a config, which every run writes into its own log."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class AblationRunner:
    """Runs what is missing of a study and keeps its tables up to date.

        >>> runner = AblationRunner(find_study("rfcn", "digits"), "output/study", train_tool=...)
        >>> failed = runner.run(table=1, seeds=(1, 2, 3))

    Killed at any time, the same call goes on: a run with a result.json is done, another one goes
    on at its last checkpoint.
    """

    def __init__(
        self,
        study: Study,
        folder: str,
        train_tool: str,
        *,
        iterations: int | None = None,
        num_gpus: int = 1,
        opts: Sequence[str] = (),
        arms: Sequence[Row] = (),
        report_seconds: float = 30.0,
    ) -> None:
        """
        Args:
            study: the method and the data.
            folder: where all of it is kept; made when the first run starts.
            train_tool: path of tools/train_net.py.
            iterations, opts: see `common_options`.
            num_gpus: as tools/train_net.py takes it.
            arms: rows beside the table's, see `Study.arm`.
            report_seconds: between two lines of progress.

        Raises:
            ConfigError: see `common_options`; an arm is named as a row; SciPy is missing.
        """
        if find_spec("scipy") is None:  # asked now, not when the third seed is done
            raise ConfigError("confidence intervals need SciPy; install it: pip install scipy")
        self.study = study
        self.folder = os.path.abspath(folder)
        self.train_tool = train_tool
        self.num_gpus = num_gpus
        self.arms = list(arms)
        self.report_seconds = report_seconds
        self.config_file = model_zoo.get_config_file(study.config)
        self.options = common_options(study, iterations, opts, num_gpus > 0)
        known = {row.name for table in TABLES for row in study.rows(table)}
        for arm in self.arms:
            if arm.name in known:
                raise ConfigError(f"--arm {arm.name}: there is a row of this name already.")
            for key in set(OF_EVERY_RUN) & set(arm.keys):
                raise ConfigError(f"--arm {arm.name}: {key} is set for every run.")

    def run(self, table: int, seeds: Sequence[int], row_names: Sequence[str] = ()) -> list[Run]:
        """Runs a table: every row with the first seed, then with the second, and so on.

        Args:
            table: 1 or 3.
            seeds: of Detectron2's SEED: weights, order of pictures, samples.
            row_names: only these rows; empty: all.

        Returns:
            The runs that failed. Their logs say why; the others were run all the same.

        Raises:
            ConfigError: the folder is of another study or settings, or at work; a config, data set
                or file of proposals cannot be used; there is no such row.
            KeyboardInterrupt: stopped by the user; the run at work was ended.
        """
        rows = [*self.study.rows(table), *self.arms]
        chosen = [row for row in rows if not row_names or row.name in row_names]
        unknown = set(row_names) - {row.name for row in chosen}
        if unknown:
            raise ConfigError(
                f"--rows {' '.join(sorted(unknown))}: table {table} of {self.study.method} on "
                f"{self.study.data} has {', '.join(row.name for row in rows)}."
            )
        runs = self._plan(chosen, seeds)
        with self._work_in_folder(chosen) as lock:
            done = sum(run.is_done for run in runs)
            _say(f"{len(runs)} runs in {self.folder}, {done} of them done already")
            self._write_tables(table, rows)
            failed = []
            for number, run in enumerate(runs):
                if run.is_done:
                    continue
                left = [later for later in runs[number:] if not later.is_done]
                if self._complete(run, left, f"[{number + 1}/{len(runs)}] {run.name}", lock):
                    self._write_tables(table, rows)
                else:
                    failed.append(run)
        return failed

    def _plan(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
        """All runs; each row's config is read once, so that mistakes are told before any starts."""
        iterations = {}
        for row in rows:
            with _quietly():
                cfg = load_config(self.config_file, self._row_options(row), self.num_gpus > 0)
                scaled = scale_to_world_size(cfg, max(self.num_gpus, 1))
            try:
                check_proposal_files(cfg)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            if not cfg.DATASETS.TEST:
                raise ConfigError("DATASETS.TEST is empty, so there is nothing to evaluate on.")
            iterations[row.name] = scaled.SOLVER.MAX_ITER
        return [
            Run(row, seed, self._run_folder(row, seed), iterations[row.name])
            for seed in dict.fromkeys(seeds)
            for row in rows
        ]

    def _run_folder(self, row: Row, seed: int) -> str:
        return os.path.join(self.folder, "runs", f"{row.name}_seed{seed}")

    def _row_options(self, row: Row) -> list[str]:
        options = list(self.options)
        for key, value in row.keys.items():
            options += [key, str(value)]
        return options

    @contextmanager
    def _work_in_folder(self, rows: Sequence[Row]) -> Iterator[IO[str]]:
        """Makes the folder or checks that it is of this study, and keeps others out of it."""
        path = os.path.join(self.folder, "settings.json")
        if os.path.exists(self.folder) and not os.path.exists(path):
            is_folder = os.path.isdir(self.folder)
            ours = {"lock", "settings.json.tmp"}  # all there is where a start was cut off
            if not is_folder or set(os.listdir(self.folder)) - ours:
                raise ConfigError(
                    f"--output {self.folder}: it exists and holds no study; choose another one."
                )
        settings = self._settings(rows)
        if os.path.exists(path):
            self._check_settings(read_json(path), settings)  # before anything is written
        os.makedirs(self.folder, exist_ok=True)
        # A run's process inherits the lock, so that it is kept even where this one is killed.
        with open(os.path.join(self.folder, "lock"), "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                raise ConfigError(
                    f"--output {self.folder}: process {lock.read().strip() or '?'} is at work in "
                    "it; wait for it or end it."
                ) from error
            _note_owner(lock, os.getpid())
            before = read_json(path) if os.path.exists(path) else {"rows": {}}
            self._check_settings(before, settings)
            write_json(path, {**settings, "rows": {**before["rows"], **settings["rows"]}})
            yield lock

    def _settings(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What every run of the folder must share, and what each row is, as JSON has it."""
        with _quietly():
            cfg = load_config(self.config_file, self.options, self.num_gpus > 0, with_data=False)
        of_rows = self.study.reserved_keys() | set(OF_EVERY_RUN)
        config = {key: value for key, value in flatten(cfg).items() if key not in of_rows}
        settings = {
            "method": self.study.method,
            "data": self.study.data,
            "processes": max(self.num_gpus, 1),
            "config": config,
            "rows": {row.name: dict(row.keys) for row in rows},
        }
        return json.loads(json.dumps(settings))

    def _check_settings(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raises a ConfigError where the folder's runs were made with other settings."""
        differences = [
            f"{key} {old} (now {new})" for key, old, new in differing_settings(before, now)
        ]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ConfigError(
                f"--output {self.folder}: its runs have other settings: "
                f"{', '.join(differences[:3])}{more}; choose another folder, or the same settings."
            )

    def _complete(self, run: Run, left: Sequence[Run], title: str, lock: IO[str]) -> bool:
        """Trains and evaluates one run, from its last checkpoint on; whether it is done now."""
        os.makedirs(run.folder, exist_ok=True)
        progress_file = os.path.join(run.folder, "progress.json")
        progress = {"starts": 0, "seconds": 0.0}
        if os.path.exists(progress_file):
            progress = read_json(progress_file)
        spent_before = progress["seconds"]
        progress["starts"] += 1
        write_json(progress_file, progress)
        again = f", from iteration {run.count_iterations()} or before" if spent_before else ""
        _say(f"{title}: {run.row.title}, {run.iterations} iterations{again}")

        start = reported = time.monotonic()
        try:
            with self._start(run, lock) as process:
                while process.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_SECONDS)
                    now = time.monotonic()
                    if now - reported >= self.report_seconds:
                        reported = now
                        progress["seconds"] = spent_before + now - start
                        write_json(progress_file, progress)
                        self._report(run, left, title, progress["seconds"])
        finally:
            progress["seconds"] = spent_before + time.monotonic() - start
            write_json(progress_file, progress)
        _note_owner(lock, os.getpid())

        figures = run.read_figures(self.study.metrics[0].key) if process.returncode == 0 else None
        if figures is None:
            log = os.path.join(run.folder, "output.log")
            _say(f"{title}: FAILED (exit {process.returncode}): {_last_line(log)} [{log}]")
            return False
        write_json(
            os.path.join(run.folder, "result.json"),
            {
                "row": run.row.name,
                "seed": run.seed,
                "figures": figures,
                "iterations": run.iterations,
                "seconds_per_iteration": run.seconds_per_iteration(),
                **progress,
                "torch": torch.__version__,
            },
        )
        for path in glob.glob(os.path.join(glob.escape(run.folder), "model_[0-9]*.pth")):
            os.remove(path)  # model_final.pth stays
        shown = ", ".join(
            f"{metric.name} {figures[metric.key]:.2f}"
            for metric in self.study.metrics
            if metric.key in figures
        )
        _say(f"{title}: {shown} after {_duration(progress['seconds'])}")
        return True

    @contextmanager
    def _start(self, run: Run, lock: IO[str]) -> Iterator["subprocess.Popen[bytes]"]:
        """The process of a run; it is ended where the block raises."""
        options = [*self._row_options(run.row), "SEED", str(run.seed), "OUTPUT_DIR", run.folder]
        command = [
            *(sys.executable, self.train_tool, "--config-file", self.config_file),
            *("--num-gpus", str(self.num_gpus), "--dist-url", "auto", "--resume", *options),
        ]
        with open(os.path.join(run.folder, "output.log"), "ab") as log:
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which ends that
            # one and all of its children.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
        try:
            _note_owner(lock, process.pid)
            yield process
        except BaseException:
            _end(process)
            raise

    def _report(self, run: Run, left: Sequence[Run], title: str, spent: float) -> None:
        done: dict[str, list[float]] = {}
        for result in read_runs(self.folder):
            done.setdefault(result["row"], []).append(result["seconds"])
        iteration = run.count_iterations()
        seconds = estimate_seconds_left(
            done, [later.row.name for later in left], spent, iteration / run.iterations
        )
        eta = "not known yet" if seconds is None else f"about {_duration(seconds)}"
        _say(
            f"{title}: iteration {iteration}/{run.iterations}; time left for {len(left)} run(s): "
            f"{eta}"
        )

    def _write_tables(self, table: int, rows: Sequence[Row]) -> None:
        runs = read_runs(self.folder)
        comparisons = compare_rows(rows, self.study.metrics, figures_by_row(runs))
        stem = os.path.join(self.folder, f"table{table}")
        write_whole(f"{stem}.md", format_markdown(self.study, table, comparisons))
        write_whole(f"{stem}.csv", format_csv(comparisons))
        write_whole(os.path.join(self.folder, "runs.csv"), format_runs_csv(runs))
        title = f"Table {table}: {self.study.method} on {self.study.data}"
        write_whole(f"{stem}.png", draw_comparison(title, comparisons, self.study.paper_data))


def _say(line: str) -> None:
    print(line, flush=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _last_line(path: str) -> str:
    with open(path, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _note_owner(lock: IO[str], process_id: int) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(f"{process_id}\n")
    lock.flush()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and its children, asked first and then forced."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_SECONDS)
            return
