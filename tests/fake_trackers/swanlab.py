"""A SwanLab for tests, see `fake_faults`: it does not say which steps it has, and leaves a folder for each session.
Without a key, as where SWANLAB_API_KEY is not set, only offline runs begin."""

import os
from pathlib import Path

from fake_faults import disturb, record


class Settings:
    def __init__(self, **values) -> None:
        self.values = values


class Run:
    def __init__(self, id: str, mode: str) -> None:
        self.id, self.mode = id, mode

    @property
    def url(self) -> str:
        if self.mode != "online":
            raise ValueError("Run url is unavailable")
        return f"https://example.org/runs/{self.id}"

    def log(self, data: dict, step: int) -> None:
        disturb("log")
        record(id=self.id, step=step, row=data)

    def finish(self, state: str) -> None:
        disturb("finish")
        record(id=self.id, finish=state)


def init(id: str, log_dir: str, settings: Settings, mode: str = "online", **arguments) -> Run:
    disturb("init")
    if mode == "online" and "SWANLAB_API_KEY" not in os.environ:
        raise RuntimeError("no API key was provided")
    Path(log_dir, f"run-{os.getpid()}-{id}").mkdir(parents=True)
    record(id=id, init=arguments, mode=mode, settings=settings.values)
    return Run(id, mode)
