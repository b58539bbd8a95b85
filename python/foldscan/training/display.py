"""A run on the terminal: a live bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foldscan.training.checkpoint import Progress as RunProgress
from foldscan.training.config import TrainConfig


class Display:
    """A `foldscan.training.loop.Listener` that shows loss, speed, bits per byte and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._bits = ""

    def start(self, config: TrainConfig, num_parameters: int, progress: RunProgress) -> None:
        length = f"{config.max_seconds:.0f} s of steps" if config.max_seconds else f"{config.steps} steps"
        where = f"from step {progress.step} " if progress.step else ""
        self.console.print(
            f"[bold]{config.model.pattern}[/bold]  d={config.model.hidden_size}  "
            f"{num_parameters / 1e6:.2f} M parameters, "
            f"{length} {where}of {config.step_tokens} tokens, {config.precision}",
            highlight=False,
        )
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[bits]}", style="green"),
                TextColumn("{task.fields[speed]}", style="cyan"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=1.0, step=progress.step, loss="...", bits="", speed="")

    def step(self, step: int, record: dict[str, Any]) -> None:
        loss, speed = f"{record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tok/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record["done"], step=step, loss=loss, bits=self._bits, speed=speed)
        else:
            self.console.print(
                f"step {step:>6}  loss {loss}  {speed}  lr {record['lr']:.2e}  |g| {record['grad_norm']:.2f}",
                highlight=False,
            )

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        self._bits = f"{record['bits_per_byte']:.3f} bits/byte"
        if self._bar is None:
            self.console.print(f"step {step:>6}  held out: {self._bits}", highlight=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
