"""Jobs wait in line, report their progress, stop where they are asked to, and end with whoever waits for them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from erasure.app import jobs
from erasure.app.jobs import Job, Line, Stopped
from erasure.errors import ErasureError


def finish(job: Job, work) -> Job:
    for _ in job.run(work, every=0.01):
        pass
    return job


def test_the_result_of_the_work_is_the_jobs():
    assert finish(Job(), lambda job: 7).result == 7


def test_faults_are_passed_on_as_messages():
    def refuse(job):
        raise ErasureError("not like this")

    with pytest.raises(ErasureError, match="^not like this$"):
        finish(Job(), refuse)
    with pytest.raises(ErasureError, match="ZeroDivisionError: division by zero"):
        finish(Job(), lambda job: 1 / 0)


def test_progress_counts_the_samples_of_the_first_network_alone():
    network, encoder = nn.Linear(2, 2), nn.Linear(2, 2)
    job = Job()
    job.enter("drawing", total=12)
    with job.watching(network, encoder):
        network(torch.ones(3, 2))
        network(input=torch.ones(2, 2))
        encoder(torch.ones(4, 2))
    network(torch.ones(5, 2))  # outside
    assert job.done == 5 and job.share == 5 / 12 and job.stage == "drawing"
    job.done = 30
    assert job.share == 0.99
    job.enter("next")
    assert job.done == 0 and job.share is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_stopped_job_stops_at_the_next_call_of_any_network(which):
    networks = nn.Linear(2, 2), nn.Linear(2, 2)
    calls = []

    def work(job):
        with job.watching(*networks):
            while len(calls) < 1000:
                calls.append(networks[which](torch.ones(1, 2)))
                if len(calls) == 3:
                    job.stop()

    job = finish(Job(), work)
    assert len(calls) == 3 and job.stopped and job.result is None and job.fault is None
    assert not any(network._forward_pre_hooks for network in networks)


def test_code_that_carries_on_after_faults_does_not_carry_on_after_a_stop():
    def work(job):
        job.stop()
        try:
            job.check()
        except Exception:
            return "carried on"

    assert finish(Job(), work).result is None


def test_whoever_stops_looking_stops_the_work():
    begun, ended = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        try:
            while True:
                job.check()
                time.sleep(0.01)
        except Stopped:
            ended.set()
            raise

    steps = Job().run(work, every=0.01)
    next(steps)
    assert begun.wait(10)
    steps.close()
    assert ended.wait(10)


def test_a_job_at_which_nobody_looks_any_more_stops(monkeypatch):
    monkeypatch.setattr(jobs, "ABANDONED", 0.2)
    job, ended = Job(), threading.Event()

    def work(job):
        try:
            while True:
                job.check()
                time.sleep(0.01)
        finally:
            ended.set()

    steps = job.run(work, every=0.01)
    next(steps)  # and nobody ever asks for more, nor closes it
    assert ended.wait(10)


def test_jobs_work_one_at_a_time_in_the_order_in_which_they_came():
    line, order, go = Line(), [], threading.Event()
    working, most = [], []

    def work(name):
        def inner(job):
            working.append(name)
            most.append(len(working))
            assert go.wait(10)
            order.append(name)
            working.remove(name)

        return inner

    waiting = [Job(line) for _ in "abc"]
    steps = [job.run(work(name), every=0.01) for job, name in zip(waiting, "abc", strict=True)]
    for step in steps:
        next(step)
    assert [line.ahead(job) for job in waiting] == [0, 1, 2]
    assert waiting[2].where == "Waiting: 2 before you" and "Waiting" not in waiting[0].where
    go.set()
    for step in reversed(steps):
        for _ in step:
            pass
    assert order == ["a", "b", "c"] and max(most) == 1


def test_who_stops_while_waiting_leaves_the_line():
    line, go = Line(), threading.Event()
    first, second, third = (Job(line) for _ in range(3))
    steps = [job.run(lambda job: go.wait(10), every=0.01) for job in (first, second, third)]
    for step in steps:
        next(step)
    second.stop()
    for _ in steps[1]:
        pass
    assert second.result is None and line.ahead(third) == 1
    go.set()
    assert finish_all(steps[0], steps[2]) and third.result is True


def finish_all(*steps) -> bool:
    for step in steps:
        for _ in step:
            pass
    return True


def test_a_full_line_refuses():
    line, go = Line(most=2), threading.Event()
    steps = [Job(line).run(lambda job: go.wait(10), every=0.01) for _ in range(2)]
    for step in steps:
        next(step)
    with pytest.raises(ErasureError, match="2 people are waiting"):
        next(Job(line).run(lambda job: None))
    go.set()
    assert finish_all(*steps)
    assert finish(Job(line), lambda job: 1).result == 1
