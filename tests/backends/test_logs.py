"""What a job prints is read back: while it runs, after its end, whole and in order."""

import threading
import time

from tests.backends.local_target import Here

BEHIND_S = 5.0
LINES = 20_000


def test_lines_are_read_while_it_runs_and_at_most_five_seconds_behind(here: Here) -> None:
    program = """
import os, time
print(f"{time.time()}", flush=True)
time.sleep(1)
"""
    job = here.python(program * 8)
    here.backend.submit(job)
    behind: list[float] = []
    while len(behind) < 3:
        lines = here.log(job.job_id).split()
        behind += [time.time() - float(line) for line in lines[len(behind) :]]
        time.sleep(0.05)
    assert max(behind) < BEHIND_S
    assert not here.backend.status(job.job_id).ended
    here.backend.cancel(job.job_id)


def test_who_follows_reads_all_of_it_to_its_end(here: Here) -> None:
    job = here.python("import time\nfor n in range(4): print(n); time.sleep(0.4)")
    here.backend.submit(job)
    assert "".join(here.backend.logs(job.job_id, follow=True)).split() == ["0", "1", "2", "3"]
    assert here.backend.status(job.job_id).state == "succeeded"


def test_who_follows_a_job_that_has_ended_reads_all_of_it(here: Here) -> None:
    job = here.python("print('all')")
    here.run(job)
    assert "".join(here.backend.logs(job.job_id, follow=True)) == "all\n"


def test_who_follows_a_job_that_is_cancelled_is_let_go(here: Here) -> None:
    job, read = here.waiting(), list[str]()
    here.start(job)
    reader = threading.Thread(target=lambda: read.extend(here.backend.logs(job.job_id, follow=True)))
    reader.start()
    here.backend.cancel(job.job_id)
    reader.join(10)
    assert not reader.is_alive()
    assert "".join(read) == "at work\n"


def test_a_job_that_prints_nothing_has_an_empty_log(here: Here) -> None:
    job = here.python("pass")
    here.run(job)
    assert here.log(job.job_id) == ""


def test_a_megabyte_arrives_whole_and_in_order(here: Here) -> None:
    job = here.python(f"for n in range({LINES}): print(f'{{n:07d}} ' + 'x' * 45)")
    assert here.run(job).state == "succeeded"
    text = here.log(job.job_id)
    assert len(text) > 10**6
    assert [int(line[:7]) for line in text.splitlines()] == list(range(LINES))


def test_a_line_without_end_arrives_whole(here: Here) -> None:
    job = here.python("print('y' * 300_000, end='')")
    assert here.run(job).state == "succeeded"
    assert here.log(job.job_id) == "y" * 300_000


def test_bytes_that_are_no_text_are_marked_and_the_rest_stays(here: Here) -> None:
    job = here.python(r"import sys; sys.stdout.buffer.write(b'before\xff\xfe\x00after\n')")
    assert here.run(job).state == "succeeded"
    text = here.log(job.job_id)
    assert text.startswith("before")
    assert text.endswith("after\n")


def test_a_letter_that_is_written_in_two_halves_arrives_as_one(here: Here) -> None:
    program = r"""
import sys, time
for half in ("漢".encode()[:2], "漢".encode()[2:]):
    sys.stdout.buffer.write(half)
    sys.stdout.flush()
    time.sleep(4)
"""
    job = here.python(program)
    here.backend.submit(job)
    read = "".join(here.backend.logs(job.job_id, follow=True))
    assert read == here.log(job.job_id) == "漢"


def test_errors_and_output_keep_their_order(here: Here) -> None:
    program = """
import sys
for n in range(200):
    print(n, file=(sys.stdout, sys.stderr)[n % 2], flush=True)
"""
    job = here.python(program)
    here.run(job)
    assert here.log(job.job_id).split() == [str(n) for n in range(200)]


def test_what_is_printed_just_before_the_end_is_kept(here: Here) -> None:
    job = here.python("import os; os.write(1, b'last words'); os._exit(3)")
    assert here.run(job).exit_code == 3
    assert here.log(job.job_id) == "last words"


def test_the_last_word_before_a_kill_is_kept(here: Here) -> None:
    """Also where the driver dies: what the store had by then."""
    job = here.waiting()
    here.start(job, says="at work")
    here.lose_driver(job.job_id)
    here.end(job.job_id)
    assert here.log(job.job_id) == "at work\n"
