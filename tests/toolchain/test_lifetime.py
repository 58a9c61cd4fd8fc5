"""A child that ends with its parent; ``tests/accidents/test_row_05_orphans.py`` kills sentei's own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.accidents.processes import exists, wait_for
from toolchain.lifetime import TIED_VARIABLE, tied

CHILD = """
import os, sys, time
from toolchain.lifetime import TIED_VARIABLE, end_with_parent
end_with_parent(reads_stdin={reads_stdin})
print(os.getpid(), TIED_VARIABLE in os.environ, flush=True)
time.sleep(0.5)
print(repr(sys.stdin.readline()), flush=True)
time.sleep(300)
"""


def start(command, *, reads_stdin=False, environment=None, **options):
    code = CHILD.format(reads_stdin=reads_stdin)
    words = [*command, sys.executable, "-c", code]
    environment = tied(os.environ) if environment is None else environment
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment, **options
    )


@pytest.mark.parametrize("reads_stdin", [True, False])
def test_it_ends_with_the_pipe_whatever_is_unread(reads_stdin):
    with start([], reads_stdin=reads_stdin) as child:
        child.stdin.write("one\ntwo\n")
        child.stdin.flush()
        assert child.stdout.readline() == f"{child.pid} False\n"
        assert child.stdout.readline() == (r"'one\n'" if reads_stdin else "''") + "\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(timeout=15) == -signal.SIGKILL


def test_a_script_may_stand_between():
    between = ["/bin/sh", "-c", '"$@"; exit 3', "sh"]
    with start(between) as script:
        pid = int(script.stdout.readline().split()[0])
        assert pid != script.pid
        script.stdout.readline()
        assert exists(pid)
        script.stdin.close()
        wait_for(lambda: not exists(pid), 15)
        assert script.wait(timeout=15) == 3  # the group was not the child's


def test_a_group_of_its_own_ends_too():
    neighbour = ["/bin/sh", "-c", 'sleep 300 & echo $!; exec "$@"', "sh"]
    with start(neighbour, start_new_session=True) as child:
        pid = int(child.stdout.readline())
        child.stdout.readline()
        child.stdin.close()
        assert child.wait(timeout=15) == -signal.SIGKILL
        wait_for(lambda: not exists(pid), 15)


def test_what_others_started_is_not_tied():
    with start([], environment={name: value for name, value in os.environ.items() if name != TIED_VARIABLE}) as child:
        child.stdout.readline()
        child.stdin.close()
        time.sleep(1)
        assert child.poll() is None
        child.kill()
