"""A client's process, which runs the code that a test sends: the real libraries, imported once, with an environment of
their own.

`work` is what the process does: it answers one JSON request a line. `Client` is the other end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]


class ClientError(RuntimeError):
    """The code raised. `type` is the name of the exception's class; the message is the client's traceback."""

    def __init__(self, type_name: str, trace: str) -> None:
        super().__init__(trace)
        self.type = type_name


class Client:
    """A context manager: a process with this environment (see `HubServer.environment`)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)

    def __enter__(self) -> Client:
        command = [sys.executable, "-c", "from local_hub.client import work; work()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT, env=self._environment
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def run(self, code: str, **variables: Any) -> Any:
        """Run code in the process's one namespace, after setting variables there (JSON values, or paths as strings).

        Returns:
            What the code left as `result`.

        Raises:
            ClientError: if the code raises.
        """
        self.send(code, **variables)
        return self.receive()

    def send(self, code: str, **variables: Any) -> None:
        """Start code and do not wait; `receive` gives what `run` would have."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"code": textwrap.dedent(code), "variables": variables}, default=str) + "\n"
        )
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the client ended with code {self._process.wait(timeout=30)}"
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["type"], answer["error"])
        return answer["value"]

    def kill(self) -> None:
        """SIGKILL: the process can tidy nothing up."""
        self._process.kill()
        self._process.wait(timeout=30)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what it never read
                continue


def work() -> None:
    # answers go out by the real stdout; what the libraries print goes to stderr
    answers, sys.stdout = sys.stdout, sys.stderr
    namespace: dict[str, Any] = {"__name__": "client"}
    for line in sys.stdin:
        request = json.loads(line)
        namespace.pop("result", None)
        try:
            namespace.update(request["variables"])
            exec(request["code"], namespace)
            answer = json.dumps({"value": namespace.get("result")}, default=str)
        except Exception as error:
            answer = json.dumps({"error": traceback.format_exc(), "type": type(error).__name__})
        print(answer, file=answers, flush=True)
