"""Progress bars on a terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gfprune_cli.progress import Event


class Bars:
    """One bar per phase; the repeated inner phases (scoring) share a line that comes and goes."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {}
        self.progress.start()

    def update(self, event: Event) -> None:
        if not event.total:
            if event.text:
                self.progress.console.print(event.text, highlight=False, markup=False)
            return
        if event.phase not in self.tasks:
            self.tasks[event.phase] = self.progress.add_task(event.phase, detail="")
        detail = "  ".join(f"{name} {value:.4g}" for name, value in event.values.items())
        task = self.tasks[event.phase]
        self.progress.update(task, completed=event.step, total=event.total, detail=detail)
        self.progress.update(task, visible=event.phase != "score" or event.step < event.total)

    def stop(self) -> None:
        self.progress.stop()
