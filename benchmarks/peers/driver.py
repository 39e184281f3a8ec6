"""Processes that multiply when asked to (`turns.h`): llama.cpp's and ik_llama.cpp's, and the machine's peaks."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TYPES = {"ggml": ["q4_0", "q4_K"], "ik": ["q4_0_r8", "q4_K"]}
"""What has 4 bits, by library: each one's fastest types, and the type most of its users have."""


class Answer(NamedTuple):
    seconds: float
    error: float
    bytes: int
    layout: str


class Driver:
    """Stopped between two requests, so that threads of its that wait for work take no time from others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.say("about")

    @property
    def types(self) -> list[str]:
        return TYPES[self.path.name.partition("-")[0]]

    def say(self, line: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        self.process.send_signal(signal.SIGSTOP)
        if not answer:
            raise RuntimeError(f"{self.path} ended, asked {line!r}")
        return answer

    def ask(self, kind: str, n: int, k: int, m: int, threads: int, seconds: float) -> Answer:
        """Of one product with W[n, k] and m rows; `seconds` is about how long to measure, 0 to check the result."""
        answer = self.say(f"{kind} {n} {k} {m} {threads} {seconds}").split()
        return Answer(float(answer[0]), float(answer[1]), int(answer[2]), answer[3])

    def turn(self, kind: str, n: int, k: int, m: int, threads: int) -> Callable[[float], float]:
        return lambda seconds: self.ask(kind, n, k, m, threads, seconds).seconds


def machine(folder: str) -> Driver:
    """The driver that measures the machine's peaks, compiled into `folder`."""
    source, program = Path(__file__).with_name("machine.cpp"), Path(folder, "machine")
    flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", program], check=True)
    return Driver(program)
