"""What `python WORDS` does, in a process of its own that is forked from one which has imported what every command imports.

    python tests/commands.py     # the server: a request as JSON on a line of stdin, an answer on a line of stdout

A new interpreter takes half a second until a command begins, nearly all of it imports. A forked process has an environment, a
folder and an exit code of its own, and imports by itself what reads the environment as it is imported, huggingface_hub above all.
"""

import atexit
import functools
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("data_prep", "sft_train", "grpo_train", "evaluate")
ROOMS = ("posttrain.hub.push", "posttrain.report.page", "posttrain.export.command")
PACKAGES = ("numpy", "jinja2", "ruamel.yaml", "httpx2", "safetensors")
READ_FROM_THE_ENVIRONMENT = ("huggingface_hub", "transformers", "torch", "datasets", "peft", "wandb")


def run_command(words, cwd, environment):
    """`subprocess.run([python, *words], ...)` with what it says captured as text."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {"words": words, "cwd": cwd, "environment": dict(environment), "said": said}
        print(json.dumps(request, default=str), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the server of commands has ended"
        return subprocess.CompletedProcess([sys.executable, *words], int(answer), *(file.read_text("utf-8") for file in said))


@functools.cache
def _server():
    server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # at the end of its input it ends
    return server


def serve():
    sys.path[0] = str(ROOT)
    for name in (*PACKAGES, *SCRIPTS, *ROOMS):
        importlib.import_module(name)
    found = {name.partition(".")[0] for name in sys.modules} & {*READ_FROM_THE_ENVIRONMENT}
    assert not found, f"{found} would be what the server's environment made of them"
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(_carry_out(**request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _carry_out(words, cwd, environment, said):
    """Become the process that `python WORDS` would be. Returns its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb" if n else "rb"), encoding="utf-8") for n in range(3))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    code = _exit_code_of(words)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _exit_code_of(words):
    try:
        _run(words)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(words):
    match words:
        case ["-c", code, *arguments]:
            sys.argv, sys.path[0] = ["-c", *arguments], ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *arguments]:
            sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
            sys.modules.pop(module, None)  # in a new interpreter nobody has imported it yet
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *arguments]:
            sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve()
