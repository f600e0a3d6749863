"""launch/multi_node.sh: the arguments and environment on the hosts, its end, and a training over two hosts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import (
    Job,
    assert_same_end,
    cpu_environment,
    finish,
    processes_naming,
    start,
    training,
    wait_for_checkpoint,
    wait_until,
    was_interrupted,
    works_in,
)
from launcher import ROOT
from user_errors import assert_names

SCRIPT = ROOT / "launch" / "multi_node.sh"
TOOLS = ("ip", "ssh", "ssh-keygen", "sshd", "unshare")

# A stand-in for ssh: every host is this machine. It joins the words and passes them to a shell, as sshd does. Signals
# of this machine's terminal do not reach that shell.
SSH = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do [ "$1" != -o ] || shift; shift; done
host=$1; shift
[ "$host" != unreachable ] || { echo "ssh: connect to host unreachable: No route to host" >&2; exit 255; }
exec setsid env --default-signal=INT,TERM,HUP HOST="$host" sh -c "$*"
"""
# A stand-in for the Python that starts DeepSpeed's launcher: records its arguments and environment, then waits like a
# rank, except on the host "failing".
PYTHON = """#!/bin/bash
[ "$1" != -P ] || { echo "$0"; exit; }
exec {real} -c '
import json, os, pathlib, signal, sys, time
host = os.environ["HOST"]
def end(*_):
    time.sleep(0.5)
    pathlib.Path(host + ".ended").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
record = pathlib.Path(host + ".json")
record.with_suffix(".part").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
record.with_suffix(".part").rename(record)
if host == "failing":
    sys.exit("failing: something broke" if os.environ["FAIL_WITH"] == "1" else int(os.environ["FAIL_WITH"]))
time.sleep(0 if host.startswith("quick") else 1000)
' "$@"
"""


@dataclass(frozen=True)
class StandIns:
    """A folder with the stand-ins for ssh and Python; the script is started there."""

    folder: Path

    def start(self, hosts: list[str], *arguments: object, **environment: object) -> Job:
        (self.folder / "host file").write_text(
            "# two GPUs each\n\n" + "\n".join(f"{h} slots=2" for h in hosts)
        )
        command = ["bash", SCRIPT, "--hostfile", "host file", "--master_addr", "10.0.0.1", *arguments]
        stand_ins = {
            "SSH_COMMAND": self.folder / "ssh",
            "PYTHON": self.folder / "python",
            "HOME": self.folder,
        }
        return start(command, cpu_environment(**stand_ins, **environment), self.folder)

    def given(self, host: str) -> tuple[list[str], dict[str, str]]:
        """Return arguments and environment of the launcher on a host."""
        arguments, environment = json.loads((self.folder / f"{host}.json").read_text())
        return arguments, environment

    def started(self, host: str) -> bool:
        return (self.folder / f"{host}.json").exists()

    def ended(self, host: str) -> bool:
        """Return whether the launcher on a host has ended its ranks."""
        return (self.folder / f"{host}.ended").exists()

    def running(self) -> list[Path]:
        return list(processes_naming(f"{self.folder}/python"))


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    folder = tmp_path / "a folder"
    folder.mkdir()
    # The interpreter that runs the stand-in does not name the folder; the launcher's first argument does.
    python = PYTHON.replace("{real}", sys.executable).replace('"$@"', '"$0" "$@"')
    for name, text in {"ssh": SSH, "python": python}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o700)
    # SSH_COMMAND may have options, so its own path is without spaces.
    link = tmp_path / "stand_ins"
    link.symlink_to(folder)
    return StandIns(link)


def test_arguments_and_environment_reach_every_host_unchanged(stand_ins: StandIns) -> None:
    hard = ["--teacher", 'it\'s a "$HOME" `x` \\ %n * teacher', "--data_dir", "", "--output_dir", "päth;&|"]
    (stand_ins.folder / ".deepspeed_env").write_text("# a comment\n\nMY_SETTING=a 'b' $c\nNCCL_DEBUG=WARN\n")
    job = stand_ins.start(
        ["quick1", "quick2"],
        *hard,
        HF_TOKEN='se"cret $x\nsecond line',
        NCCL_DEBUG="INFO",
        CUDA_VISIBLE_DEVICES="0",
        UNRELATED="1",
    )
    status, _, errors = finish(job)
    assert (status, errors) == (0, "")
    for rank, host in enumerate(("quick1", "quick2")):
        arguments, environment = stand_ins.given(host)
        assert arguments[-len(hard) :] == hard
        assert f"--node_rank={rank}" in arguments
        assert "--master_addr=10.0.0.1" in arguments
        assert "--resume" in arguments
        assert Path(environment["PWD"]).resolve() == stand_ins.folder.resolve()
        assert environment["HF_TOKEN"] == 'se"cret $x\nsecond line'
        assert environment["MY_SETTING"] == "a 'b' $c"
        assert environment["NCCL_DEBUG"] == "WARN"  # the file's, as DeepSpeed's launcher does it


def test_no_token_is_in_a_command_line(stand_ins: StandIns) -> None:
    job = stand_ins.start(["host1"], HF_TOKEN="hf_in_nobodys_sight")
    wait_until(lambda: stand_ins.started("host1"), job)
    assert not list(processes_naming("hf_in_nobodys_sight"))
    job.terminate()
    assert finish(job)[0] == 143


@pytest.mark.parametrize(
    ("host", "fail_with", "status", "shown"),
    [
        ("failing", 7, 7, "error: failing ended with status 7"),
        ("failing", 3, 3, ""),  # the trainer has printed its error
        ("unreachable", 0, 255, "error: the connection to unreachable failed"),
    ],
)
def test_a_host_that_fails_ends_the_others(
    stand_ins: StandIns, host: str, fail_with: int, status: int, shown: str
) -> None:
    ended, _, errors = finish(stand_ins.start(["host1", host, "host3"], FAIL_WITH=fail_with))
    assert ended == status
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == bool(shown)
    assert shown in errors
    assert not stand_ins.running()


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_a_signal_ends_all_hosts_before_the_script_returns(
    stand_ins: StandIns, sent: signal.Signals, status: int
) -> None:
    job = stand_ins.start(["host1", "host2"])
    wait_until(lambda: stand_ins.started("host1") and stand_ins.started("host2"), job)
    os.killpg(job.pid, sent)  # as a terminal does, to the script and everything it started here
    assert job.wait(600) == status
    assert stand_ins.ended("host1")
    assert stand_ins.ended("host2")
    finish(job)


def test_the_hosts_end_even_when_the_script_is_killed(stand_ins: StandIns) -> None:
    job = stand_ins.start(["host1", "host2", "host3"])
    wait_until(lambda: all(stand_ins.started(f"host{n}") for n in (1, 2, 3)), job)
    assert len(stand_ins.running()) == 3
    job.kill()
    wait_until(lambda: not stand_ins.running(), seconds=600)
    finish(job)


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        ([], 2, "--hostfile FILE"),
        (["--help"], 0, "--hostfile FILE"),
    ],
)
def test_help_and_bad_input(arguments: list[str], status: int, shown: str, tmp_path: Path) -> None:
    ended, output, errors = finish(start(["bash", SCRIPT, *arguments], cpu_environment(), tmp_path))
    assert ended == status
    assert shown in (errors if status else output)


@dataclass(frozen=True)
class TwoHosts:
    """Two hosts on this machine; see two_hosts.sh."""

    folder: Path
    names: tuple[str, str]

    def start(self, *arguments: object) -> Job:
        """Run the script on the first host."""
        (self.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in self.names))
        command = ["ip", "netns", "exec", self.names[0], "bash", SCRIPT, "--hostfile", "hostfile", *arguments]
        environment = cpu_environment(
            SSH_COMMAND=self.folder / "ssh", GLOO_SOCKET_IFNAME="eth0", PYTHON=sys.executable
        )
        return start(command, environment, self.folder)

    def start_on_second(self, command: str) -> subprocess.Popen[bytes]:
        ssh = ["ip", "netns", "exec", self.names[0], self.folder / "ssh", self.names[1], command]
        return subprocess.Popen(ssh, stdin=subprocess.DEVNULL)

    def processes(self, text: str) -> list[Path]:
        """Return the processes of this folder's trainings with the text in their command lines."""
        return [process for process in processes_naming(text) if works_in(process, self.folder)]

    def host_of(self, process: Path) -> str:
        network = (process / "ns" / "net").stat().st_ino
        return next(name for name in self.names if Path("/run/netns", name).stat().st_ino == network)


def rank_of(process: Path) -> str:
    variables = (process / "environ").read_text().split("\0")
    return next(variable.removeprefix("RANK=") for variable in variables if variable.startswith("RANK="))


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=path)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"two hosts on one machine need root and {', '.join(missing) or 'nothing else'}")
    if subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("two hosts on one machine need the right to make network namespaces")
    folder = tmp_path_factory.mktemp("two_hosts")
    name = f"host{os.getpid()}x"
    hosts = TwoHosts(folder, (f"{name}1", f"{name}2"))
    script = subprocess.Popen(
        ["bash", ROOT / "tests" / "launch" / "two_hosts.sh", folder, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path},
        start_new_session=True,  # Ctrl-C at pytest closes its input and does not interrupt its cleanup
    )
    assert script.stdin is not None
    assert script.stdout is not None
    try:
        assert script.stdout.readline() == "up\n"
        yield hosts
    finally:
        script.stdin.close()
        script.wait(600)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    left = [*processes_naming(folder), *processes_naming(name), *Path("/etc/netns").glob(f"{name}*")]
    assert name not in listed
    assert not left


@pytest.mark.full
@pytest.mark.multihost
def test_two_hosts_train_like_one_host_and_resume_after_ctrl_c(
    two_hosts: TwoHosts, uninterrupted_run: Path, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> None:
    run = two_hosts.folder / "a run"
    arguments = training(tiny_teacher_dir, small_corpus_dir, Path("a run"))
    # Another job of this Python on the second host; DeepSpeed's own launcher would end it on Ctrl-C.
    alike = f"exec -a '{sys.executable} -u -m deepspeed.launcher.launch --node_rank=0' sleep 1000"
    other = two_hosts.start_on_second(alike)

    job = two_hosts.start(*arguments)
    wait_for_checkpoint(run, job)
    ranks = {two_hosts.host_of(process): rank_of(process) for process in two_hosts.processes("--local_rank")}
    assert ranks == {two_hosts.names[0]: "0", two_hosts.names[1]: "1"}

    os.killpg(job.pid, signal.SIGINT)
    status, _, errors = finish(job)
    assert status == 130, errors[-3000:]
    assert was_interrupted(run)
    assert not two_hosts.processes("train.py")
    assert other.poll() is None

    status, _, errors = finish(two_hosts.start(*arguments))
    assert status == 0, errors[-3000:]
    assert_same_end(run, uninterrupted_run)
    other.kill()
    other.wait()


@pytest.mark.multihost
def test_two_hosts_print_a_refusal_once(
    two_hosts: TwoHosts, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> None:
    arguments = training(tiny_teacher_dir, small_corpus_dir, Path("refused"))
    status, _, errors = finish(two_hosts.start(*arguments, "--train_batch_size", 129))
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "indivisible-batch", "train_batch_size 129", "128 and 160")
