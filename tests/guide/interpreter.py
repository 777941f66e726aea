"""One interpreter that runs many scripts, each as `python SCRIPT ARGUMENTS` would: torch is imported once.

    python interpreter.py FOLDER

FOLDER is the current folder and holds the scripts. Each line of standard input is a JSON object with `arguments`
(`["train.py", "--config", …]` or `["-m", "model.convert", …]`) and `input`, the script's own standard input; the line
that answers it has `code`, `stdout` and `stderr`.
"""

import contextlib
import functools
import gc
import io
import json
import os
import runpy
import signal
import sys
import traceback


def run(arguments: list[str], text: str) -> dict:
    """Run one script with everything that it prints caught."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code: object = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            if arguments[0] == "-m":
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
        except BaseException:
            code = 1
            traceback.print_exc()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.collect()  # what ends with a process, such as a compiler in the background, ends here with its last reference
    stdout, stderr = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams)
    return {"code": int(code or 0), "stdout": stdout, "stderr": stderr}


def do_without_what_is_slow() -> None:
    """As in conftest.py: no curves, and the machine is measured once. And where it is busy, a tracker has its time."""
    import model.runs.metrics
    import model.runs.tracker_process
    import utils

    model.runs.metrics.draw_curves = lambda events, path: None
    model.runs.tracker_process.CLOSE_SECONDS = model.runs.tracker_process.GRACE_SECONDS
    measured = functools.cache(utils.measure_matmul_flops)
    utils.measure_matmul_flops = lambda device, dtype, weights=(): measured(device, dtype)


def main() -> None:
    """Answer requests until standard input ends."""
    os.chdir(sys.argv[1])
    sys.path.insert(0, sys.argv[1])
    do_without_what_is_slow()
    gc.freeze()  # what was imported is looked at by no later collection
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a child process prints must not get between the answers
    for line in requests:
        request = json.loads(line)
        answers.write(json.dumps(run(request["arguments"], request["input"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
