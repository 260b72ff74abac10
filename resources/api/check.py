#!/usr/bin/env python3
"""Has schemathesis make requests from the API's document, and check the answers.

A colony of two VMs is started in a directory of its own; schemathesis, which speaks HTTP over TCP only,
gets to its socket by a bridge. `check.py SALP TARGET_DIRECTORY [EXAMPLES]`; schemathesis is installed there,
from PyPI. The exit status is 0 only if all runs passed and nothing of the colony is left.
"""

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

SCHEMATHESIS = "schemathesis==4.32.5"

# Of the two checks that are off for some requests: which body is possible depends on the colony (its
# memory, the files of the host, `name` beside `count`), and no schema says that.
CONFIG = """
[[operations]]
include-path-regex = "^/v1/vms(/[^/]+/fork)?$"
checks.positive_data_acceptance.enabled = false
"""

# These answer when something happens, or for as long as they like.
ENDLESS = "^/v1/(events|vms/[^/]+/(console|wait))$"
# These end a VM.
ENDING = ["POST /v1/vms/{name}/stop", "DELETE /v1/vms/{name}"]


def install(directory):
    """Schemathesis, in an environment of its own that is kept."""
    program = directory / "venv" / "bin" / "st"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
        pip = directory / "venv" / "bin" / "pip"
        subprocess.run([pip, "install", "--quiet", SCHEMATHESIS], check=True)
    return program


async def copy(source, sink):
    try:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass
    finally:
        sink.close()


def bridge(path):
    """Serves a Unix socket at a TCP port of this host's own; returns the port."""
    started, ports = threading.Event(), []

    async def connected(reader, writer):
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async def serve():
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    started.wait()
    return ports[0]


class Colony:
    """Two VMs, `a` and a clone of it, in a directory of their own."""

    def __init__(self, salp):
        self.salp = salp
        self.place = tempfile.TemporaryDirectory()
        self.environment = {**os.environ, "TMPDIR": self.place.name}
        self.environment.pop("XDG_RUNTIME_DIR", None)
        size = ["--memory", "32M", "--max-vms", "40"]
        self.run("run", "--detach", *size, "--name", "a", "--cmdline", "case=puppet")
        self.run("fork", "a", "--name", "b")
        self.url = f"http://127.0.0.1:{bridge(next(pathlib.Path(self.place.name).glob('salp-*/*.sock')))}"

    def run(self, *arguments):
        command = [self.salp, *arguments]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def end(self):
        """Stops all VMs; whether nothing is left."""
        vms = json.loads(self.run("ps", "--json"))
        live = [vm["name"] for vm in vms if vm["pid"] is not None]
        print(f"check: {len(vms)} VMs are listed, {len(live)} of them live", flush=True)
        for name in live:
            self.run("stop", name)
        left = list(pathlib.Path(self.place.name).iterdir())
        if left:
            print("check: left behind:", *left)
        self.place.cleanup()
        return bool(live) and not left


def main():
    salp, target = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    examples = sys.argv[3] if len(sys.argv) > 3 else "50"
    target.mkdir(parents=True, exist_ok=True)
    st = install(target)

    def passes(config, *selection):
        colony = Colony(salp)
        file = target / "schemathesis.toml"
        file.write_text(config + CONFIG)
        print("check:", *selection, flush=True)
        command = [st, "--config-file", file, "run", f"{colony.url}/v1/openapi.json", "--url", colony.url]
        command += ["--max-examples", examples, "--request-timeout", "60", "--no-color", *selection]
        status = subprocess.run(command, cwd=target).returncode
        return colony.end() and status == 0

    named = '[parameters]\n"path.name" = "a"\n'
    all_but_ending = ["--exclude-path-regex", ENDLESS]
    all_but_ending += [word for name in ENDING for word in ("--exclude-name", name)]
    only_ending = [word for name in ENDING for word in ("--include-name", name)]
    runs = [passes("", *all_but_ending), passes(named, *all_but_ending), passes(named, *only_ending)]
    return 0 if all(runs) else 1


sys.exit(main())
