"""Turns, priorities, fairness and memory, on a simulated clock: hours of jobs take milliseconds."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs.lanes import LAG_S, MAX_WORK_S, SETUP_SHARE, TURN_S
from service.jobs.scheduler import PASSED_OVER_S
from service.jobs.waiting import LEVELS_S, PATIENT_TURN
from tests.jobs.simulation import STEP_S, Simulation, Work

HOUR = 3600.0


def test_jobs_of_one_tenant_run_in_order_of_arrival_and_higher_priorities_before() -> None:
    simulation = Simulation()
    for number, priority in enumerate([0, 0, 5, -5, 5, 0, 100]):
        simulation.submit(f"{number}", Work(0.5), priority=priority)
    simulation.run_until_ended()
    assert simulation.started == ["0", "6", "2", "4", "1", "5", "3"]


@pytest.mark.parametrize("long_jobs", [2, 7])
def test_a_short_job_ends_within_a_few_tensors_of_long_ones(long_jobs: int) -> None:
    simulation = Simulation({"cpu": 2})
    for number in range(long_jobs):
        simulation.submit(f"long-{number}", Work(HOUR, tensor_s=0.5))
    simulation.run(600.0)
    simulation.submit("short", Work(1.0, tensor_s=0.5))
    simulation.run_until_ended("short")
    ended = simulation.jobs["short"].ended_at
    assert ended is not None
    assert ended - 600.0 <= 1.0 + 2 * 0.5 + 2 * STEP_S


def test_a_device_that_loses_lanes_lets_those_in_them_end_and_keeps_one_for_the_others() -> None:
    simulation = Simulation({"cpu": 1, "cuda": 4})
    for number in range(8):
        simulation.submit(f"{number}", Work(5.0), device="cuda")
    simulation.run(1.0)
    simulation.scheduler.keep({"cuda": 0})
    assert len(simulation.running) == 4
    simulation.run_until_ended(*"0123")
    simulation.run(1.0)
    assert len(simulation.running) == 1
    simulation.scheduler.keep({"cuda": 3})
    simulation.run(1.0)
    assert len(simulation.running) == 1, "what is lost comes back at the next start"
    simulation.run_until_ended()


def test_a_tensor_is_never_cut_and_is_the_bound_of_the_wait() -> None:
    simulation = Simulation()
    simulation.submit("long", Work(HOUR, tensor_s=60.0))
    simulation.run(65.0)
    simulation.submit("short", Work(1.0))
    simulation.run_until_ended("short")
    assert simulation.jobs["short"].first_turn_at == pytest.approx(120.0, abs=2 * STEP_S)


def test_long_jobs_of_one_tenant_do_not_take_turns_for_nothing() -> None:
    simulation = Simulation()
    for number in range(20):
        simulation.submit(f"{number}", Work(300.0))
    simulation.run_until_ended()
    turns = sum(work.turns for work in simulation.jobs.values())
    assert turns <= 20 * (len(LEVELS_S) + 1) * (1 + 2 / PATIENT_TURN)
    ends = [simulation.jobs[f"{number}"].ended_at for number in range(20)]
    assert ends == sorted(ends), "who came first is ready first"


def test_a_turn_lasts_ten_times_as_long_as_it_takes_to_begin() -> None:
    simulation = Simulation()
    simulation.submit("costly", Work(HOUR, setup_s=3.0))
    simulation.run(10.0)
    for number in range(30):
        simulation.submit(f"short-{number}", Work(0.5), tenant=f"t{number}")
    simulation.run(SETUP_SHARE * 3.0 - 10.0)
    assert list(simulation.running) == ["costly"]
    simulation.run(2.0)
    assert "costly" not in simulation.running


def test_a_turn_that_took_long_to_begin_ends_half_a_minute_later() -> None:
    simulation = Simulation()
    simulation.submit("costly", Work(HOUR, setup_s=60.0))
    simulation.submit("short", Work(0.5))
    simulation.run(60.0 + MAX_WORK_S - 1.0)
    assert list(simulation.running) == ["costly"], "it gets something done"
    simulation.run(2.0)
    assert simulation.jobs["short"].turns == 1


def test_a_turn_lasts_a_second_at_least() -> None:
    simulation = Simulation()
    simulation.submit("first", Work(HOUR, tensor_s=STEP_S))
    simulation.submit("urgent", Work(HOUR, tensor_s=STEP_S), priority=1)
    simulation.run(TURN_S - STEP_S)
    assert list(simulation.running) == ["first"]
    simulation.run(4 * STEP_S)
    assert list(simulation.running) == ["urgent"]


def test_the_priorities_of_a_tenant_are_strict() -> None:
    simulation = Simulation()
    simulation.submit("low", Work(5.0))
    simulation.run(2.0)
    for number in range(3):
        simulation.submit(f"high-{number}", Work(100.0), priority=1)
    simulation.run_until_ended()
    low, high = simulation.jobs["low"], [simulation.jobs[f"high-{number}"] for number in range(3)]
    assert low.ended_at is not None
    assert all(work.ended_at is not None and work.ended_at < low.ended_at for work in high)


def test_no_priority_holds_up_another_tenant() -> None:
    simulation = Simulation({"cpu": 2})
    for number in range(4):
        simulation.submit(f"loud-{number}", Work(HOUR), tenant="loud", priority=100)
    simulation.run(60.0)
    simulation.submit("quiet", Work(5.0), tenant="quiet", priority=-100)
    simulation.run_until_ended("quiet", limit_s=60.0 + LAG_S)
    for number in range(4):
        simulation.submit(f"quiet-{number}", Work(HOUR), tenant="quiet", priority=-100)
    before = dict(simulation.served)
    simulation.run(400.0)
    loud = simulation.served["loud"] - before["loud"]
    assert simulation.served["quiet"] - before["quiet"] == pytest.approx(loud, abs=3 * LAG_S)


def test_a_higher_priority_takes_the_lane_of_its_own_tenant_only() -> None:
    simulation = Simulation({"cpu": 2})
    simulation.submit("other", Work(HOUR), tenant="other")
    simulation.submit("low", Work(HOUR), tenant="own")
    simulation.run(5.0)
    simulation.submit("high", Work(HOUR), tenant="own", priority=1)
    simulation.run(60.0)
    assert sorted(simulation.running) == ["high", "other"]
    assert simulation.jobs["other"].turns == 1


def test_a_thousand_jobs_of_one_tenant_do_not_hold_up_one_of_another() -> None:
    simulation = Simulation({"cpu": 2})
    for number in range(1000):
        simulation.submit(f"{number}", Work(60.0), tenant="many")
    simulation.run(100.0)
    simulation.submit("one", Work(30.0), tenant="one")
    simulation.run_until_ended("one")
    assert simulation.now - 100.0 < 35.0, "it has a lane of the two from its first moment on"


def test_two_tenants_with_work_without_end_have_half_each() -> None:
    simulation = Simulation({"cpu": 3})
    for number in range(5):
        simulation.submit(f"a{number}", Work(HOUR), tenant="a")
    simulation.run(50.0)
    for number in range(5):
        simulation.submit(f"b{number}", Work(HOUR), tenant="b")
    before = dict(simulation.served)
    simulation.run(600.0)
    a = simulation.served["a"] - before["a"]
    assert simulation.served["b"] == pytest.approx(a, abs=3 * LAG_S)
    assert sum(work.turns for work in simulation.jobs.values()) < 100, "and change lanes seldom"


def test_time_in_which_a_tenant_wanted_nothing_earns_it_no_credit() -> None:
    simulation = Simulation()
    simulation.submit("early", Work(1.0), tenant="idle")
    simulation.submit("a", Work(HOUR), tenant="busy")
    simulation.run(1000.0)
    simulation.submit("late", Work(HOUR), tenant="idle")
    before = dict(simulation.served)
    simulation.run(200.0)
    assert simulation.served["idle"] - before["idle"] == pytest.approx(100.0, abs=20.0)


def test_lanes_that_nobody_else_wanted_cost_nothing_later() -> None:
    simulation = Simulation({"cpu": 4})
    for number in range(3):
        simulation.submit(f"a{number}", Work(HOUR), tenant="a")
    simulation.submit("b", Work(HOUR), tenant="b")
    simulation.run(1000.0)  # the one had 3,000 seconds, the other 1,000
    for number in range(8):
        simulation.submit(f"more-{number}", Work(HOUR), tenant=f"{'ab'[number % 2]}")
    before = dict(simulation.served)
    simulation.run(400.0)
    assert simulation.served["a"] - before["a"] == pytest.approx(800.0, abs=100.0)


def test_a_stream_of_short_jobs_does_not_hold_up_a_long_one_of_the_same_tenant() -> None:
    simulation = Simulation()
    simulation.submit("long", Work(30.0))
    for number in range(30 * 2 * PATIENT_TURN):
        simulation.submit(f"short-{number}", Work(1.0, tensor_s=0.5))
        simulation.run(1.0)
    assert simulation.jobs["long"].ended_at is not None


def test_devices_have_lanes_of_their_own() -> None:
    simulation = Simulation({"cpu": 1, "cuda": 2})
    for number in range(3):
        simulation.submit(f"gpu-{number}", Work(HOUR), device="cuda")
        simulation.submit(f"cpu-{number}", Work(HOUR))
    simulation.run(0.5)
    assert sorted(simulation.running) == ["cpu-0", "gpu-0", "gpu-1"]


def test_jobs_that_do_not_fit_together_wait_and_smaller_ones_pass() -> None:
    simulation = Simulation({"cpu": 3}, memory=100)
    for job_id, memory in (("a", 60), ("b", 50), ("c", 30)):
        simulation.submit(job_id, Work(5.0), memory_bytes=memory)
    simulation.run(0.5)
    assert sorted(simulation.running) == ["a", "c"]
    simulation.run_until_ended()
    assert simulation.started == ["a", "c", "b"]


def test_a_big_job_is_not_passed_over_for_ever() -> None:
    simulation = Simulation({"cpu": 2}, memory=100)
    simulation.submit("small-0", Work(2.0), memory_bytes=40)
    simulation.submit("big", Work(5.0), memory_bytes=90)
    for number in range(1, 400):
        if number % 2:
            simulation.submit(f"small-{number}", Work(2.0), memory_bytes=40)
        simulation.run(0.5)
    first = simulation.jobs["big"].first_turn_at
    assert first is not None
    assert first < PASSED_OVER_S + 10.0


@pytest.mark.parametrize("big_ones", [1, 5])
def test_nothing_is_kept_for_a_big_job_while_a_higher_priority_holds_what_it_needs(big_ones: int) -> None:
    simulation = Simulation({"cpu": 2}, memory=10)
    simulation.submit("high", Work(300.0), priority=10, memory_bytes=6)
    for number in range(big_ones):
        simulation.submit(f"big-{number}", Work(5.0), memory_bytes=8)
    simulation.run(PASSED_OVER_S + 1.0)
    for number in range(3):
        simulation.submit(f"small-{number}", Work(10.0), memory_bytes=1)
    simulation.submit("middle", Work(1.0), memory_bytes=4)
    simulation.run(100.0)
    passing = [simulation.jobs[name] for name in ("small-0", "small-1", "small-2", "middle")]
    assert all(work.ended_at is not None for work in passing), "there is a lane, and memory for them"
    simulation.submit("late", Work(HOUR), memory_bytes=4)
    simulation.run_until_ended("high")
    simulation.run_until_ended(*(f"big-{number}" for number in range(big_ones)), limit_s=simulation.now + 60.0)
    assert simulation.jobs["late"].ended_at is None, "now it is kept"


def test_a_big_job_gets_the_memory_of_jobs_on_other_devices() -> None:
    simulation = Simulation({"cpu": 1, "cuda": 1}, memory=10)
    simulation.submit("gpu", Work(HOUR), device="cuda", memory_bytes=6)
    simulation.submit("big", Work(5.0), memory_bytes=8)
    simulation.run_until_ended("big", limit_s=PASSED_OVER_S + 10.0)
    simulation.run(1.0)
    assert list(simulation.running) == ["gpu"], "and it goes on"


def test_what_is_kept_for_a_big_job_goes_when_it_is_cancelled() -> None:
    simulation = Simulation({"cpu": 3}, memory=100)
    simulation.submit("runs", Work(HOUR, tensor_s=HOUR), memory_bytes=50)
    simulation.submit("big", Work(5.0), memory_bytes=100)
    simulation.run(PASSED_OVER_S + 1.0)
    simulation.submit("small", Work(5.0), memory_bytes=10)
    simulation.run(1.0)
    assert list(simulation.running) == ["runs"]
    assert simulation.scheduler.remove("big")
    assert not simulation.scheduler.remove("big")
    del simulation.jobs["big"]
    simulation.run(1.0)
    assert sorted(simulation.running) == ["runs", "small"]


def test_a_job_that_needs_more_than_was_thought_waits_again_with_what_it_needs() -> None:
    simulation = Simulation({"cpu": 2}, memory=100)
    simulation.submit("a", Work(5.0), memory_bytes=60)
    simulation.submit("b", Work(5.0), memory_bytes=10)
    assert not simulation.ledger.give("b", 50)
    del simulation.running["b"]
    simulation.scheduler.left("b", waits_again=True, memory_bytes=50)
    simulation.run(1.0)
    assert list(simulation.running) == ["a"]
    simulation.run_until_ended()
    assert simulation.jobs["b"].turns == 2


def test_the_place_in_the_queue_is_the_number_of_turns_that_come_before() -> None:
    simulation = Simulation()
    simulation.submit("runs", Work(0.5), tenant="z")
    for number in range(5):
        simulation.submit(f"a{number}", Work(0.5), tenant="a")
    simulation.submit("b0", Work(0.5), tenant="b")
    simulation.submit("urgent", Work(0.5), tenant="b", priority=1)
    ahead = simulation.scheduler.ahead_of
    assert ahead("a", 0, "cpu") == 5 + 2
    assert ahead("b", 0, "cpu") == 2 + 3
    assert ahead("new", 0, "cpu") == 2
    assert ahead("b", 1, "cpu") == 1 + 2
    assert ahead("b", 2, "cpu") == 1
    assert ahead("a", 1, "cpu") == 0


def test_nothing_is_started_before_it_is_open_and_after_it_is_closed() -> None:
    simulation = Simulation()
    simulation.scheduler.close()
    simulation.submit("low", Work(1.0))
    simulation.submit("high", Work(1.0), priority=1)
    assert not simulation.running
    simulation.scheduler.open()
    assert list(simulation.running) == ["high"]


def calls_of_a_look(waiting: int) -> int:
    """How many Python functions are called by a look, a submission and an end when so many jobs wait."""
    simulation = Simulation({"cpu": 2}, memory=100)
    for number in range(waiting):
        memory = 100 if number % 2 else 10
        tenant, priority = f"t{number % 20}", number % 3
        simulation.submit(f"{number}", Work(HOUR), tenant=tenant, priority=priority, memory_bytes=memory)
    simulation.run(1.0)
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        simulation.scheduler.look()
        simulation.submit("new", Work(HOUR), tenant="t1", memory_bytes=10)
        simulation.scheduler.left(next(iter(simulation.running)))
        simulation.scheduler.ahead_of("t1", 0, "cpu")
    finally:
        sys.setprofile(None)
    return calls


def test_with_ten_thousand_waiting_jobs_a_look_takes_as_many_steps_as_with_a_few() -> None:
    assert calls_of_a_look(10_000) < 2 * calls_of_a_look(200)


JOBS = st.lists(
    st.tuples(
        st.floats(0.1, 30.0),  # seconds of work
        st.floats(0.1, 3.0),  # seconds of a tensor
        st.floats(0.0, 0.5),  # seconds to set up
        st.sampled_from("abc"),  # tenant
        st.integers(-1, 1),  # priority
        st.integers(0, 100),  # memory
        st.floats(0.0, 10.0),  # seconds until it comes
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(jobs=JOBS, lanes=st.integers(1, 3))
def test_whatever_comes_every_job_ends_and_lanes_and_memory_are_never_exceeded(jobs, lanes: int) -> None:
    simulation = Simulation({"cpu": lanes}, memory=100)
    for number, (seconds, tensor_s, setup_s, tenant, priority, memory, pause) in enumerate(jobs):
        work = Work(seconds, tensor_s, setup_s)
        simulation.submit(f"{number}", work, tenant=tenant, priority=priority, memory_bytes=memory)
        simulation.run(pause)
    simulation.run_until_ended(limit_s=5000.0)
    assert simulation.ledger.used_bytes == 0
    assert simulation.scheduler.depth == simulation.scheduler.running == 0


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    lanes=st.integers(1, 3),
    tensor_s=st.floats(0.1, 2.0),
    priorities=st.lists(st.integers(-100, 100), min_size=3, max_size=3),
)
def test_tenants_with_enough_to_do_are_served_alike(
    counts: list[int], lanes: int, tensor_s: float, priorities: list[int]
) -> None:
    simulation = Simulation({"cpu": lanes})
    for tenant, count in enumerate(counts):
        for number in range(count * lanes):
            priority = priorities[(tenant + number) % 3]
            simulation.submit(f"{tenant}-{number}", Work(HOUR, tensor_s), tenant=f"t{tenant}", priority=priority)
    simulation.run(400.0)
    served = sorted(simulation.served.values())
    assert len(served) == len(counts)
    assert all(later - earlier < 3 * (LAG_S + 8 * TURN_S) for earlier, later in pairwise(served))
