"""Processes that train together: the first one's run, config and state are those of all, or all refuse."""

import os
from dataclasses import replace

import numpy as np
import pytest
from toy_port import together

from backends.pipeline.checkpoints.states import save_state
from backends.pipeline.runs.agreement import (
    check_same,
    check_same_config,
    fingerprint,
    resumed_by_first,
    shared_state,
)
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import parse_train
from backends.pipeline.runs.resolve import open_data, resolve
from backends.pipeline.runs.writer import writing
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.state import State

LARGE = np.random.default_rng(0).standard_normal((700, 900)).astype(np.float32)  # more than a message


def state(value=1.0, nimg=128):
    params = {"w": LARGE * value, "gain": np.float32(value)}
    return State(
        params=params,
        moments1={"w": LARGE + value},
        moments2={"w": LARGE**2},
        averages={Length.of(0.05): params, Length.half_life(500): {**params, "gain": np.float32(2)}},
        nimg=nimg,
        steps=2,
    )


def test_what_the_first_makes_is_what_all_get_errors_included():
    data = LARGE.tobytes()
    assert together(lambda team: team.first(lambda: data if team.rank == 0 else b"never")) == [data] * 3
    assert together(lambda team: team.first(lambda: b"")) == [b""] * 3

    def refuse():
        raise InputError("the rule, what came")

    assert [str(error) for error in together(lambda team: team.first(refuse))] == ["the rule, what came"] * 3


@pytest.mark.parametrize("others", [None, state(2.0), state(nimg=64)], ids=["none", "other weights", "earlier"])
def test_a_missing_or_different_state_is_replaced_by_the_first_one_s(others, capsys):
    got = together(lambda team: shared_state(lambda: state() if team.rank == 0 else others, team))
    assert {fingerprint(one) for one in got} == {fingerprint(state())}
    assert all(type(one) is State and one.averages.keys() == state().averages.keys() for one in got)
    assert capsys.readouterr().out == "sent     the state to process 1, 2, which had another or none\n"


def test_a_state_that_is_damaged_elsewhere_is_sent_and_one_that_is_damaged_in_the_first_stops_all():
    def load(team, damaged):
        if team.rank == damaged:
            raise InputError("damaged")
        return state()

    got = together(lambda team: shared_state(lambda: load(team, 2), team))
    assert {fingerprint(one) for one in got} == {fingerprint(state())}
    assert [str(error) for error in together(lambda team: shared_state(lambda: load(team, 0), team))] == ["damaged"] * 3


def test_nothing_is_sent_where_all_have_the_state_or_none_has(capsys):
    for one in (None, state()):
        assert all(got is one for got in together(lambda team, one=one: shared_state(lambda: one, team)))
    assert capsys.readouterr().out == ""


def test_a_state_that_the_first_lacks_is_refused_by_all():
    got = together(lambda team: shared_state(lambda: None if team.rank == 0 else state(), team))
    assert all("the first process must have the state that is resumed" in str(error) for error in got)


def test_another_state_in_one_process_is_found():
    assert together(lambda team: check_same(fingerprint(state()), team, nimg=128)) == [None] * 3
    got = together(lambda team: check_same(fingerprint(state(1 + 1e-7 * (team.rank == 2))), team, nimg=128))
    assert all("got another in process 2 after 128 images" in str(error) for error in got)


def test_a_run_that_the_first_alone_has_is_resumed_by_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = parse("--outdir", "run")  # there is none yet
    Run("run").save_config(resolved(parse("--lr", 0.03)))
    here = parse("--outdir", "run")
    got = together(lambda team: resumed_by_first(here if team.rank == 0 else elsewhere, team, prog="train"), count=2)
    assert [resolved(options).hyper.lr for options in got] == [0.03] * 2  # tyro parses in one thread at a time
    got = together(lambda team: resumed_by_first(elsewhere if team.rank == 0 else here, team, prog="train"))
    assert all("the first process must have the run that is resumed" in str(error) for error in got)


def test_processes_that_would_train_something_else_are_refused_but_paths_may_differ():
    config = resolved(parse())
    other = replace(config, data="/elsewhere")
    assert together(lambda team: check_same_config(other if team.rank else config, team)) == [None] * 3
    other = replace(config, seed=1)
    got = together(lambda team: check_same_config(other if team.rank == 2 else config, team))
    assert all("got another seed in process 2" in str(error) for error in got)


def parse(*words):
    return parse_train(list(map(str, words)), prog="train", description="")


def resolved(options):
    return resolve(options, open_data(options, options.previous), options.previous)


# ---- one writer


def test_a_folder_has_one_writer_who_is_named(tmp_path):
    refused = pytest.raises(InputError, match=r"a run must have one writer, got .*, which process \d+ on ")
    with writing(tmp_path), refused, writing(tmp_path):
        pass
    with writing(tmp_path):  # it was released
        pass


def test_remains_of_dead_writers_are_removed_and_other_files_stay(tmp_path):
    old, own = tmp_path / "samples" / ".old.0.tmp", tmp_path / "state" / ".state.safetensors.1.tmp"
    young, whole = tmp_path / "samples" / ".young.2.tmp", tmp_path / "state" / "state.safetensors"
    for path in (old, own, young):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    save_state(whole, state())
    os.utime(old, (0, 0))
    with writing(tmp_path):
        assert [path.exists() for path in (old, own, young, whole)] == [False, False, True, True]
