"""Queue disciplines on one server: the worked example of FastServe's rules, and what holds for any jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.queueing import LEVELS, Fcfs, Mlfq, Queued


@dataclass(slots=True, eq=False)
class Work(Queued):
    """`iterations` with the prompt's; each but the first takes 1."""

    arrives: float = 0.0
    iterations: int = 1
    ended: float | None = None


def serve(queue: Fcfs[Work] | Mlfq[Work], jobs: Sequence[Work]) -> list[tuple[int, float]]:
    """One server, busy whenever a job is there. What ran, as (number of the job, when it began)."""
    coming, now, ran = sorted(jobs, key=lambda job: job.arrives), 0.0, []
    done = dict.fromkeys(jobs, 0)
    while coming or len(queue):
        if not len(queue):
            now = max(now, coming[0].arrives)
        while coming and coming[0].arrives <= now:
            queue.join(coming.pop(0), now)
        job = queue.head(now)
        assert job is not None
        queue.leave(job)
        work = 1.0 if done[job] else job.first
        ran.append((jobs.index(job), now))
        now += work
        done[job] += 1
        while coming and coming[0].arrives < now:
            early = coming.pop(0)
            queue.join(early, early.arrives)
        if done[job] == job.iterations:
            job.ended = now
        else:
            queue.back(job, work, now)
    return ran


DISCIPLINES = {
    "fcfs": Fcfs,
    "mlfq": lambda: Mlfq(skips=False),
    "skip-join": lambda: Mlfq(skips=True),
    "skip-join, starving at 5": lambda: Mlfq(skips=True, starving=5),
}


@pytest.mark.parametrize(
    ("name", "ended", "mean"),
    [("fcfs", [13, 15, 18], 15.33), ("mlfq", [18, 7, 10], 11.67), ("skip-join", [18, 2, 5], 8.33)],
)
def test_the_worked_example_has_its_known_completion_times(name, ended, mean):
    jobs = [Work(first, iterations=iterations) for first, iterations in [(5, 9), (1, 2), (2, 2)]]
    serve(DISCIPLINES[name](), jobs)
    assert [job.ended for job in jobs] == ended
    assert sum(job.ended for job in jobs) / 3 == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize(
    ("first", "level"), [(5, 3), (1, 0), (2, 1), (0.1, 0), (8, 3), (8.1, 4), (1e9, LEVELS - 1)]
)
def test_a_job_skips_the_queues_whose_quantum_its_prompt_exceeds(first, level):
    queue = Mlfq(skips=True)
    queue.join(job := Work(first), 0)
    assert job.level == level


JOBS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=8)


def works(rows):
    return [Work(first, arrives=arrives, iterations=n) for arrives, first, n in rows]


@pytest.mark.parametrize("name", DISCIPLINES)
@settings(max_examples=40, deadline=None)
@given(rows=JOBS)
def test_every_discipline_ends_all_work_as_early(name, rows):
    """None idles while a job waits, so all end when first come, first served does."""
    fcfs, jobs = works(rows), works(rows)
    serve(Fcfs(), fcfs)
    ran = serve(DISCIPLINES[name](), jobs)
    assert max(job.ended for job in jobs) == max(job.ended for job in fcfs)
    assert len(ran) == sum(job.iterations for job in jobs)
    queue = DISCIPLINES[name]()
    assert (len(queue), queue.head(0)) == (0, None)


@settings(max_examples=40, deadline=None)
@given(rows=JOBS)
def test_who_comes_first_ends_first_where_first_come_is_first_served(rows):
    jobs = sorted(works(rows), key=lambda job: job.arrives)
    serve(Fcfs(), jobs)
    ends = [job.ended for job in jobs]
    assert ends == sorted(ends)


@pytest.mark.parametrize(("starving", "longest"), [(20, 21), (5, 6)])
def test_a_job_that_starves_runs_within_one_period(starving, longest):
    """Beside short jobs that leave no room: at most the period, and what runs when it is over, later."""
    long = Work(4, iterations=20)
    stream = [Work(1, arrives=second) for second in range(400)]
    ran = serve(Mlfq(skips=True, starving=starving), [long, *stream])
    assert min(at for job, at in ran if job == 0) <= longest
    assert long.ended < max(job.ended for job in stream)


def test_a_job_never_starves_where_nothing_promotes_it():
    long = Work(4, iterations=20)
    stream = [Work(1, arrives=second) for second in range(400)]
    ran = serve(Mlfq(skips=True), [long, *stream])
    assert min(at for job, at in ran if job == 0) >= 400


def test_who_starves_longest_goes_first():
    queue = Mlfq(skips=True, starving=10)
    older, newer, young = Work(8), Work(1), Work(1)
    queue.join(older, 0)
    queue.join(newer, 1)
    queue.join(young, 9)
    assert queue.head(9.5) is newer
    order = []
    for _ in range(3):
        order.append(queue.head(12))
        queue.leave(order[-1])
    assert order == [older, newer, young]


def test_a_job_falls_no_further_than_the_last_queue():
    queue = Mlfq(skips=False)
    queue.join(job := Work(1, iterations=99), 0)
    for now in range(LEVELS + 5):
        queue.leave(job)
        queue.back(job, 1e9, now)
    assert job.level == LEVELS - 1
    assert queue.head(99) is job
