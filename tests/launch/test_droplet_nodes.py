"""What droplets do at their first start, and how they are joined, with real programs."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.droplets.user_data import user_data
from tests.tools.digitalocean import DigitalOcean

_CLONE_NEWNET = 0x40000000
_ADMIN_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def program(folder, name, text):
    """Put a program into a folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def signature(disk):
    done = subprocess.run(
        ["blkid", "-p", "-o", "export", disk],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": _ADMIN_PATH},
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@pytest.fixture
def repository(tmp_path):
    """A repository with an environment to set up; returns it and its first commit."""
    folder = tmp_path / "repository"
    (folder / "launch").mkdir(parents=True)
    script = folder / "launch" / "environment.sh"

    def git(*words):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(
            ["git", "-C", folder, *identity, *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    git("init", "--quiet")
    for version in (1, 2):
        script.write_text(f'echo {version} >>"$HOME/environment"\n')
        git("add", ".")
        git("commit", "--quiet", "--message", f"{version}")
    return folder, git("rev-parse", "HEAD~1")


@pytest.fixture
def machine(tmp_path):
    """A machine with five disks, of which one is empty; returns a function that starts it.

    The disks are files: wipefs and mkfs do with them what they do with disks.
    """
    for name in ("wipefs", "mkfs.ext4", "blkid", "git"):
        if shutil.which(name, path=_ADMIN_PATH) is None:
            pytest.skip(f"there is no {name} here")
    programs, home = tmp_path / "programs", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    for name in ("empty", "full", "partitioned", "mounted", "readonly"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(8 << 20)
    subprocess.run(
        ["mkfs.ext4", "-q", "-L", "precious", tmp_path / "full"],
        check=True,
        env={"PATH": _ADMIN_PATH},
    )
    listing = [
        f"{tmp_path}/full disk 0",
        f"{tmp_path}/partitioned disk 0",
        f"{tmp_path}/mounted disk 0 /data",
        f"{tmp_path}/readonly disk 1",
        f"{tmp_path}/empty disk 0",
    ]
    lines = "\n".join(listing)
    program(
        programs,
        "lsblk",
        f"""case "$*" in
*--nodeps*) cat <<'END'
{lines}
END
;;
*/partitioned) printf 'a\\na1\\n' ;;
*) echo a ;;
esac""",
    )
    program(programs, "apt-get", f'echo "$@" >>{tmp_path}/apt')
    program(programs, "mount", f'echo "$@" >>{tmp_path}/mounts')
    # As blkid finds labels, of the one disk that may have come to hold one.
    blkid = shutil.which("blkid", path=_ADMIN_PATH)
    found = f'[ "$({blkid} -p -s LABEL -o value {tmp_path}/empty)" = "${{5#LABEL=}}" ]'
    program(programs, "blkid", f"{found} && echo {tmp_path}/empty")
    (tmp_path / "fstab").write_text("")
    environment = {
        "PATH": f"{programs}:{_ADMIN_PATH}",
        "HOME": str(home),
        "SCRATCH": str(tmp_path / "scratch"),
        "FSTAB": str(tmp_path / "fstab"),
    }

    def start(script):
        path = tmp_path / "user_data"
        path.write_text(script)
        return subprocess.run(
            ["bash", path], env=environment, capture_output=True, text=True, check=False
        )

    return start


def test_the_first_start_installs_and_formats_what_is_empty_only(
    machine, repository, tmp_path
):
    folder, commit = repository
    script = user_data(f"file://{folder}", commit)
    kept = signature(tmp_path / "full")
    assert kept["LABEL"] == "precious"
    done = machine(script)
    assert done.returncode == 0, done.stdout
    home = tmp_path / "home"
    assert (home / ".ten-dist" / "ready").read_text() == f"{commit}\n"
    assert (home / "environment").read_text() == "1\n"
    assert "pdsh" in (tmp_path / "apt").read_text()
    made = signature(tmp_path / "empty")
    assert (made["TYPE"], made["LABEL"]) == ("ext4", "ten-scratch-1")
    assert signature(tmp_path / "full") == kept
    for other in ("partitioned", "mounted", "readonly"):
        assert not any((tmp_path / other).read_bytes())
    (line,) = (tmp_path / "fstab").read_text().splitlines()
    assert line.startswith(f"LABEL=ten-scratch-1 {tmp_path}/scratch ext4")
    assert (tmp_path / "mounts").read_text() == f"{tmp_path}/scratch\n"
    # Again: nothing is made twice.
    done = machine(script)
    assert done.returncode == 0, done.stdout
    assert signature(tmp_path / "empty") == made
    assert (tmp_path / "fstab").read_text().splitlines() == [line]
    # The disk came back empty, as after a move to another machine.
    (tmp_path / "empty").write_bytes(bytes(8 << 20))
    assert machine(script).returncode == 0
    assert signature(tmp_path / "empty")["LABEL"] == "ten-scratch-1"
    assert (tmp_path / "fstab").read_text().splitlines() == [line]


def test_a_first_start_that_fails_is_not_ready_and_goes_on_later(
    machine, repository, tmp_path
):
    folder, commit = repository
    done = machine(user_data(f"file://{folder}", "abc123"))
    ready = tmp_path / "home" / ".ten-dist" / "ready"
    assert done.returncode != 0 and not ready.exists()
    assert "abc123" in (ready.parent / "setup.log").read_text()
    assert machine(user_data(f"file://{folder}", commit)).returncode == 0
    assert ready.exists()


def inside(host, action):
    """Do something in the network of a host, as if this process ran there."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter():
        with open(f"/run/netns/{host.namespace}") as namespace:
            assert libc.setns(namespace.fileno(), _CLONE_NEWNET) == 0

    # The network is that of a thread, of the sockets that it makes and of what it starts.
    with ThreadPoolExecutor(1, initializer=enter) as pool:
        return pool.submit(action).result()


@contextlib.contextmanager
def account(host, folder, client):
    """An sshd at port 22 of a host, for a user with a home of its own there."""
    programs = folder / "programs"
    programs.mkdir(parents=True)
    (folder / ".ssh").mkdir()
    key, settings = folder / "host_key", folder / "sshd_config"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True
    )
    settings.write_text(
        f"Port 22\nListenAddress {host.address}\nHostKey {key}\nPidFile none\n"
        f"AuthorizedKeysFile {client} {folder}/.ssh/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        f'SetEnv HOME="{folder}" PATH="{programs}:{_ADMIN_PATH}"\n'
    )
    sshd = shutil.which("sshd", path=_ADMIN_PATH)
    server = subprocess.Popen(
        host.command([sshd, "-D", "-e", "-f", settings]), stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        server.kill()
        server.wait()


def test_droplets_are_joined_over_ssh(fleet_of, droplets, tmp_path):
    fleet = fleet_of(3)
    desk, *nodes = fleet.hosts
    homes = [tmp_path / node.name for node in nodes]
    settings = tmp_path / "ssh_config"
    settings.write_text(
        f"Host *\n IdentityFile {fleet.folder}/client\n IdentitiesOnly yes\n"
    )
    with contextlib.ExitStack() as stack:
        for node, home in zip(nodes, homes):
            stack.enter_context(account(node, home, fleet.folder / "client.pub"))
            ready = f"mkdir -p {home}/.ten-dist; echo 0123abc >{home}/.ten-dist/ready"
            program(home / "programs", "cloud-init", f"sleep 0.5; {ready}")
        droplets.use(stack.enter_context(inside(desk, DigitalOcean)))

        def command(action, *words, **expected):
            return inside(desk, lambda: droplets(action, *words, **expected))

        command("up", "--run", "r", "--count", 2, *droplets.UP)
        for droplet, node in zip(droplets.api.droplets.values(), nodes):
            for entry in droplet["networks"]["v4"]:
                entry["ip_address"] = node.address
        setup = ["--run", "r", "--ssh_config", settings]
        out, _ = command("setup", *setup)
        assert "ten-dist-r-1 is installed, commit 0123abc" in out
        assert "ten-dist-r-0 reaches all 2 over the private network" in out
        first, second = (home / ".ssh" for home in homes)
        admitted = (second / "authorized_keys").read_text()
        assert admitted == (first / "id_ed25519.pub").read_text()
        # Again: no key is added twice. And one whose first start failed is named.
        program(homes[1] / "programs", "cloud-init", "exit 1")
        command("setup", *setup)
        assert (second / "authorized_keys").read_text() == admitted
        (homes[1] / ".ten-dist" / "ready").unlink()
        (homes[1] / ".ten-dist" / "setup.log").write_text("no room on the disk\n")
        _, errors = command("setup", *setup, status=1)
        assert "1 of 2 droplets are not installed: ten-dist-r-1" in errors[-1]
        assert "setup.log ends with: no room on the disk" in errors[-1]
        # One that is not there at all.
        nodes[1].link("down")
        words = ("--connect_timeout", 1, "--wait_minutes", 0.001)
        _, errors = command("setup", *setup, *words, status=1)
        assert f"ten-dist-r-1 ({nodes[1].address})" in errors[-1]
