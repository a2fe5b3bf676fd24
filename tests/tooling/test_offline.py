"""Quick scale and the tests reach no other machine: shown in a child process, in a notebook's kernel, under torchrun.

The address 192.0.2.1 is reserved for documentation: nothing answers there, even if a call were let through.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from tooling.sandbox import environment

TRIES = textwrap.dedent("""
    import _socket, socket, sys

    def tried(call):
        try:
            call()
        except OSError as error:
            return type(error).__name__
        return "let through"

    def sent():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(b"x", ("192.0.2.1", 9))

    def connected(address, kind=socket.socket, family=socket.AF_INET):
        s = kind(family, socket.SOCK_STREAM)
        s.settimeout(3) if kind is socket.socket else None
        try:
            s.connect(address)
        finally:
            s.close()

    OUTSIDE = {
        "tcp": lambda: connected(("192.0.2.1", 80)),
        "below the library": lambda: connected(("192.0.2.1", 80), _socket.socket),
        "by name": lambda: connected(("host.example", 80)),
        "ipv6": lambda: connected(("2001:db8::1", 80, 0, 0), family=socket.AF_INET6),
        "mapped": lambda: connected(("::ffff:192.0.2.1", 80, 0, 0), family=socket.AF_INET6),
        "datagram": sent,
        "name look-up": lambda: socket.getaddrinfo("host.example", 443),
        "old name look-up": lambda: socket.gethostbyname("host.example"),
    }
    verdicts = {name: tried(call) for name, call in OUTSIDE.items()}
    assert set(verdicts.values()) == {"NetworkBlocked"}, verdicts
""")
LOOPBACK = textwrap.dedent("""
    import socket, tempfile, os
    server = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s")
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(path)
        unix.listen()
        socket.socket(socket.AF_UNIX).connect(path)
""")
TORCHRUN = textwrap.dedent("""
    import os, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([float(os.environ["RANK"])])
    dist.all_reduce(total)
    assert total.item() == 1.0
    dist.destroy_process_group()
    print("ranks joined and blocked", flush=True)
""")


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("offline"), threads=1)


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_child_process_reaches_nobody(env: dict[str, str]) -> None:
    run([sys.executable, "-c", TRIES], env)


def test_a_grandchild_reaches_nobody(env: dict[str, str]) -> None:
    run(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TRIES!r}], check=True)",
        ],
        env,
    )


def test_this_machine_stays_within_reach(env: dict[str, str]) -> None:
    run([sys.executable, "-c", LOOPBACK], env)


def test_the_error_says_what_was_blocked_and_why(env: dict[str, str]) -> None:
    program = "import urllib.request; urllib.request.urlopen('http://host.example/data')"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert (
        "socket.getaddrinfo('host.example') was blocked: quick scale and the tests need no network."
        in done.stderr
    )


def test_another_sitecustomize_still_runs(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['OTHER'] = 'ran'\n")
    both = env | {"PYTHONPATH": env["PYTHONPATH"] + os.pathsep + str(tmp_path)}
    assert run([sys.executable, "-c", "import os; print(os.environ['OTHER'])"], both) == "ran\n"
    run([sys.executable, "-c", TRIES], both)


def test_a_notebook_kernel_reaches_nobody(env: dict[str, str]) -> None:
    manager, client = start_new_kernel(
        kernel_name="python3", startup_timeout=120, env=env, stderr=subprocess.DEVNULL
    )
    try:
        reply = client.execute_interactive(
            TRIES, store_history=False, timeout=60, output_hook=lambda message: None
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", reply["content"]


def test_torchrun_s_children_reach_each_other_and_nobody_else(env: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TRIES + TORCHRUN)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    assert run(command, env).count("ranks joined and blocked") == 2
