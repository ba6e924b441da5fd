"""What slurm/train.sh is told: which nodes to train on, and what to do when a start has ended."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import REPOSITORY, environment

from phi3v_dist.attempt.attempt import STOPPED_NAME, SUMMARY_NAME, folder_of
from phi3v_dist.cluster import nodes, starts
from phi3v_dist.cluster.judge import judge, refused
from phi3v_dist.cluster.report import Report
from phi3v_dist.cluster.starts import AGAIN, DONE, REQUEUE, STOP, End, Life
from phi3v_dist.errors import (
    ConfigError,
    CrashLoopError,
    DataError,
    DivergedError,
    InUseError,
    LostRankError,
    OutOfStepError,
    StuckError,
)  # fmt: skip
from phi3v_dist.watch.blame import Actor
from phi3v_dist.watch.node_report import DIED, ENDED, FAILED, HANG, RUNNING, NodeReport, RankReport, Verdict

LIFE = Life("12", 0, 1)
HOSTS = ["node1", "node2", "node3"]


def actor(rank: int, host: str) -> Actor:
    return Actor(
        rank=rank, host=host, pid=1, lane="train", phase="forward", step=3, what="", position=(3, 1), silent_s=1.0,
        bound_s=30.0,
    )  # fmt: skip


class Run:
    """A run folder as ranks and watchers leave it behind."""

    def __init__(self, folder):
        self.folder, self.attempts = folder, 0

    def start(self, life: Life = LIFE, step: int = 0, hosts=HOSTS) -> "Run":
        starts.begin(self.folder, life, hosts, step)
        self.attempts += 1
        attempt = folder_of(self.folder, self.attempts)
        attempt.mkdir(parents=True)
        owner = {"job": life.job, "restart": life.restart, "start": life.number, "hosts": hosts, "world_size": 3}
        (attempt / "owner.json").write_text(json.dumps(owner))
        return self

    def reached(self, step: int) -> "Run":
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"train/step": step, "run/attempt": self.attempts, "train/loss": 1.0}) + "\n")
        return self

    def rank(
        self,
        host: str,
        outcome: str,
        code: int = 0,
        kind: str = "",
        blamed=(),
        where="forward, step 3",
        of_memory=False,
    ) -> "Run":
        verdict = Verdict(kind, [f"{kind}: of {host}"], list(blamed), of_memory) if kind else None
        rank = RankReport(
            HOSTS.index(host), 1, 1, outcome, code, message=f"why {host} ended" if code else "", where=where
        )
        NodeReport(host, kind or ENDED, [rank], verdict=verdict).write(folder_of(self.folder, self.attempts))
        return self

    def judge(self, code: int = 1, noticed: bool = False, life: Life = LIFE) -> End:
        ending = judge(self.folder, life, code, noticed)
        starts.end(self.folder, life, ending)
        return ending


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_a_finished_run_is_done_whatever_srun_says(run):
    (run.start().reached(3).folder / SUMMARY_NAME).write_text("{}")
    assert run.judge(code=143).action == DONE


def test_a_summary_from_before_counts_only_when_the_ranks_have_found_the_run_finished(run):
    """Of a run that was asked for more steps since: its next attempt removes the summary."""
    (run.start().reached(3).folder / SUMMARY_NAME).write_text("{}")
    life = Life("13", 0, 1)
    starts.begin(run.folder, life, HOSTS, 3)
    assert run.judge(code=1, life=life).action == AGAIN
    assert run.judge(code=ConfigError.exit_code, life=life).action == STOP
    assert run.judge(code=0, life=life).action == DONE
    (run.folder / "attempts" / f"last-word-{life}.json").write_text('{"outcome": "stopped"}')
    assert run.judge(code=0, life=life).action == REQUEUE, "stopped before they could look"


def test_so_does_the_summary_that_an_attempt_has_not_come_to_remove(run):
    (run.start().reached(3).folder / SUMMARY_NAME).write_text("{}")
    assert run.start(Life("13", 0, 1), step=3).judge(code=137, life=Life("13", 0, 1)).action == AGAIN


@pytest.mark.parametrize("notice, action", [(True, REQUEUE), (False, DONE)])
def test_a_clean_stop_comes_back_when_the_cluster_asked_and_rests_when_a_person_did(run, notice, action):
    marker = {"step": 7, "why": "SIGUSR1", "notice": notice, "attempt": 1}
    (run.start().folder / STOPPED_NAME).write_text(json.dumps(marker))
    ending = run.judge(code=0)
    assert (ending.action, ending.exit_code) == (action, 0)
    assert "after step 7 by SIGUSR1" in ending.why


def test_the_marker_of_an_earlier_start_says_nothing_about_this_one(run):
    run.start(Life("12", 0, 1)).start(Life("12", 0, 2))
    (run.folder / STOPPED_NAME).write_text(json.dumps({"step": 7, "why": "x", "notice": False, "attempt": 1}))
    assert run.judge(life=Life("12", 0, 2)).action == AGAIN


@pytest.mark.parametrize("error", [ConfigError, DataError, InUseError, DivergedError])
def test_what_another_start_would_not_mend_ends_the_job_with_its_own_code(run, error):
    run.start().rank("node1", "failed", error.exit_code, FAILED, [actor(0, "node1")])
    ending = run.judge(code=143)
    assert (ending.action, ending.exit_code, ending.blamed) == (STOP, error.exit_code, [])


@pytest.mark.parametrize("error", [LostRankError, OutOfStepError, StuckError])
def test_what_another_start_may_mend_is_tried_again_in_place(run, error):
    run.start().reached(3).rank("node1", "failed", error.exit_code, FAILED, [actor(0, "node1")])
    assert run.judge().action == AGAIN


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", [DIED, HANG])
def test_the_node_of_a_dead_or_hanging_rank_is_blamed_and_no_other(run, kind):
    run.start().reached(3).rank("node1", "failed", 1, FAILED, [actor(0, "node1")])
    run.rank("node2", "died", 0, kind, [actor(1, "node2")]).rank("node3", "ended")
    ending = run.judge()
    assert (ending.action, ending.blamed) == (AGAIN, ["node2"])


@pytest.mark.fault(8)
def test_no_node_is_blamed_when_all_wait_for_each_other(run):
    everyone = [actor(number, host) for number, host in enumerate(HOSTS)]
    run.start().reached(3).rank("node1", "ended", 0, HANG, blamed=everyone)
    ending = run.judge()
    assert (ending.action, ending.blamed) == (AGAIN, [])


def test_nodes_that_srun_ended_before_their_watchers_had_a_last_word_are_not_blamed(run):
    run.start().reached(3).rank("node2", "died", 0, DIED, blamed=[actor(1, "node2")])
    run.rank("node1", "failed", LostRankError.exit_code)  # and of node3 there is no report
    node1 = folder_of(run.folder, 1) / "node-node1.json"
    node1.write_text(json.dumps(json.loads(node1.read_text()) | {"status": RUNNING}))
    assert run.judge().blamed == ["node2"]


def test_a_node_that_was_not_heard_of_again_is_blamed(run):
    run.start().reached(3).rank("node1", "failed", LostRankError.exit_code, FAILED, [actor(0, "node1")])
    assert run.rank("node2", "ended").judge().blamed == ["node3"]


@pytest.mark.fault(8)
def test_no_node_is_blamed_when_nobody_was_heard_of(run):
    assert run.start().reached(3).judge(code=137).blamed == []
    assert run.start(Life("12", 0, 2), hosts=HOSTS[:1]).judge(code=137, life=Life("12", 0, 2)).blamed == []


def test_no_node_is_blamed_for_a_rank_that_the_kernel_ended_for_want_of_memory(run):
    run.start().reached(3).rank("node2", "died", 0, DIED, [actor(1, "node2")], of_memory=True)
    ending = run.rank("node1", "failed", LostRankError.exit_code).judge()
    assert (ending.action, ending.blamed) == (AGAIN, [])


@pytest.mark.parametrize("failures, out", [
    ([("node2", 1), ("node2", 1)], ["node2"]), ([("node2", 1), ("node2", 2)], ["node2"]),
    ([("node2", 1), ("node3", 1), ("node2", 1)], []),
    ([("node2", 1), ("node3", 1), ("node2", 4), ("node2", 5)], ["node2"]),
])  # fmt: skip
def test_a_rank_that_fails_on_two_nodes_takes_its_trouble_with_it_and_none_is_blamed(run, failures, out):
    for number, (host, rank) in enumerate(failures, 1):
        life = Life("12", 0, number)
        run.start(life, step=number - 1).reached(number).rank(host, "died", 0, DIED, [actor(rank, host)])
        assert run.judge(life=life).blamed == [host]
    past = starts.read(run.folder)
    assert [start.end.ranks for start in past] == [{host: [rank]} for host, rank in failures]
    assert list(nodes.choose(HOSTS, {}, past, wanted=2, least=2).bad) == out


@pytest.mark.parametrize("code, action", [(2, STOP), (3, STOP), (13, STOP), (5, AGAIN), (1, AGAIN), (137, AGAIN)])
def test_without_an_attempt_the_exit_code_of_srun_decides(run, code, action):
    starts.begin(run.folder, LIFE, HOSTS, 0)
    ending = run.judge(code)
    assert (ending.action, ending.exit_code) == (action, code)


def test_ranks_that_ended_with_0_and_left_nothing_are_no_success(run):
    starts.begin(run.folder, LIFE, HOSTS, 0)
    assert run.judge(code=0).action == AGAIN


def test_a_notice_that_came_too_late_to_save_still_brings_the_job_back(run):
    assert run.start().reached(3).rank("node1", "died", 0, DIED).judge(code=143, noticed=True).action == REQUEUE


@pytest.mark.fault(17)
def test_three_starts_in_a_row_without_a_new_step_end_the_job(run):
    lives = [Life("12", 0, 1), Life("12", 0, 2), Life("12", 1, 1), Life("12", 1, 2)]
    run.start(lives[0], step=0).reached(5)
    endings = [run.judge(life=lives[0])]
    for life in lives[1:]:
        run.start(life, step=5).reached(5)
        endings.append(run.judge(life=life))
    assert [ending.action for ending in endings] == [AGAIN, AGAIN, AGAIN, STOP]
    assert endings[-1].exit_code == CrashLoopError.exit_code and "3 starts in a row" in endings[-1].why


def test_notices_new_steps_and_other_jobs_are_no_crash_loop(run):
    for number in range(1, 9):
        life = Life("12", number, 1)
        run.start(life, step=5).reached(5)
        if number % 3 == 0:
            marker = {"step": 5, "why": "SIGTERM", "notice": True, "attempt": run.attempts}
            (run.folder / STOPPED_NAME).write_text(json.dumps(marker))
        assert run.judge(life=life).action in (AGAIN, REQUEUE), number
    assert run.start(Life("13", 0, 1), step=5).reached(5).judge(life=Life("13", 0, 1)).action == AGAIN


def test_a_time_limit_too_short_for_a_step_does_not_requeue_for_ever(run):
    actions = []
    for number in range(1, 12):
        life = Life("12", number, 1)
        run.start(life, step=5).reached(5)
        marker = {"step": 5, "why": "the job's time limit", "notice": True, "attempt": run.attempts}
        (run.folder / STOPPED_NAME).write_text(json.dumps(marker))
        actions.append(run.judge(life=life))
        if actions[-1].action == STOP:
            break
    assert [end.action for end in actions] == [REQUEUE] * (starts.MAX_NOTICES - 1) + [STOP]
    assert "sbatch --time" in actions[-1].why


def test_nor_does_one_that_is_over_before_the_nodes_are_examined(run):
    words = ["--hosts", "node1", "--wanted", 1, "--least", 1, "--noticed"]
    for number in range(1, starts.MAX_NOTICES):
        starts.begin(run.folder, Life("12", number, 1), [], 0)
        starts.end(run.folder, Life("12", number, 1), End(REQUEUE, "", 0, 0))
    done = job("nodes", run.folder, "--life", "12.99.1", *words)
    assert done.stdout.splitlines()[:2] == ["action=stop", f"code={CrashLoopError.exit_code}"]
    assert job("nodes", run.folder, "--life", "13.0.1", *words).stdout.splitlines()[0] == "action=requeue"


def test_a_start_that_slurm_ended_with_its_batch_script_is_passed_over(run):
    for number in range(1, 6):
        run.start(Life("12", number, 1), step=5)  # nobody was left to say how it ended
    assert starts.without_step(starts.read(run.folder), "12", AGAIN) == 0
    assert run.start(Life("12", 6, 1), step=5).reached(5).judge(life=Life("12", 6, 1)).action == AGAIN


def test_damaged_lines_of_the_record_are_passed_over(run):
    run.start().reached(3).judge()
    path = run.folder / starts.STARTS_NAME
    text = path.read_text()
    path.write_text('{"start": 5}\n[]\nnull\n{}\n' + text + '{"start": {"job": "12", "res')
    assert len(starts.read(run.folder)) == 1 and starts.read(run.folder)[0].end is not None
    starts.begin(run.folder, Life("12", 0, 2), HOSTS, 3)
    assert [start.life.number for start in starts.read(run.folder)] == [1, 2], "the line after a torn one is whole"


def test_lines_of_an_earlier_release_are_read(run):
    rows = [
        {"start": asdict(LIFE) | {"nodes": HOSTS, "step": 0, "unix_s": 1.0}},
        {"end": asdict(LIFE) | {"action": AGAIN, "why": "", "exit_code": 1, "step": 0, "blamed": ["node2"]}},
    ]
    (run.folder / starts.STARTS_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert starts.to_blame(starts.read(run.folder)) == {"node2": 1}


def unended(run: Run, lives, hosts=HOSTS) -> None:
    for life in lives:
        starts.begin(run.folder, life, hosts, 0)


@pytest.mark.fault(17)
def test_a_job_whose_batch_script_is_lost_with_each_start_does_not_come_back_for_ever(run):
    words = ["--hosts", "node1", "--wanted", 1, "--least", 1]
    unended(run, [Life("12", number, 1) for number in range(starts.MAX_UNENDED)])
    done = job("nodes", run.folder, "--life", f"12.{starts.MAX_UNENDED}.1", *words)
    assert done.stdout.splitlines()[:2] == ["action=stop", f"code={CrashLoopError.exit_code}"]
    assert "10 starts since step 0 were ended together with their batch script" in done.stderr
    assert refused(run.folder, Life("13", 0, 1)) is None, "another job has other nodes"
    assert run.start(Life("12", 50, 1)).reached(1) and refused(run.folder, Life("12", 51, 1)) is None, "a new step"


def test_the_first_node_of_starts_that_were_lost_with_their_batch_script_is_suspect(run):
    other = Life("12", 0, 1)
    starts.begin(run.folder, other, ["node2", "node1"], 0)
    starts.end(run.folder, other, End(AGAIN, "", 1, 0))
    unended(run, [Life("12", 1, 1)])
    assert not starts.suspects(starts.read(run.folder), "12"), "once may be chance"
    unended(run, [Life("12", 2, 1)])
    assert starts.suspects(starts.read(run.folder), "12") == {"node1": 2}
    assert list(nodes.suspected(starts.read(run.folder), "12")) == ["node1"]
    starts.begin(run.folder, Life("12", 3, 1), HOSTS, 0)
    starts.end(run.folder, Life("12", 3, 1), End(AGAIN, "", 1, 0))
    assert not starts.suspects(starts.read(run.folder), "12"), "it came to an end there"


def test_where_every_batch_script_is_lost_no_node_is_suspect(run):
    unended(run, [Life("12", number, 1) for number in range(4)])
    unended(run, [Life("12", number, 1) for number in range(4, 8)], ["node2", "node3"])
    assert not starts.suspects(starts.read(run.folder), "12")


def test_a_start_of_another_job_that_may_still_run_is_no_lost_one(run):
    starts.begin(run.folder, Life("11", 0, 1), ["node2"], 0)
    starts.end(run.folder, Life("11", 0, 1), End(AGAIN, "", 1, 0))
    unended(run, [Life("12", 0, 1), Life("13", 0, 1)])
    assert not starts.suspects(starts.read(run.folder), "14")


def test_a_job_may_have_back_the_nodes_that_it_did_without_for_ten_starts(run):
    starts.begin(run.folder, LIFE, HOSTS, 0)
    starts.exclude(run.folder, LIFE, ["node9"], [])
    for number in range(1, starts.LOOKS_BACK + 1):
        assert starts.excluded(*starts.read_all(run.folder), "12") == (["node9"], []), number
        starts.begin(run.folder, Life("12", number, 1), HOSTS, 0)
    assert starts.excluded(*starts.read_all(run.folder), "12") == ([], ["node9"])
    assert starts.excluded(*starts.read_all(run.folder), "12", ["node9"]) == ([], []), "it is there again"
    assert starts.excluded(*starts.read_all(run.folder), "13") == ([], []), "another job excludes by itself"
    starts.exclude(run.folder, Life("12", 11, 1), [], ["node9"])
    assert starts.excluded(*starts.read_all(run.folder), "12") == ([], [])


def test_a_job_that_comes_back_is_told_which_nodes_to_do_without_and_which_no_longer(run):
    starts.exclude(run.folder, Life("12", 0, 1), ["node8"], [])
    for number in range(starts.LOOKS_BACK):
        starts.begin(run.folder, Life("12", 1, number), HOSTS, 0)
        starts.end(run.folder, Life("12", 1, number), End(AGAIN, "", 1, number + 1, ["node2"] if number > 7 else []))
    starts.exclude(run.folder, Life("12", 2, 1), ["node9"], [])
    for host in HOSTS:
        Report(host, "12.3.1", is_complete=True).write(run.folder / "preflight")
    words = ["--life", "12.3.1", "--hosts", ",".join(HOSTS), "--wanted", 3, "--least", 3]
    done = job("nodes", run.folder, *words)
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (said["action"], said["bad"], said["forgive"]) == ("requeue", "node2,node9", "node8"), done.stderr
    assert starts.excluded(*starts.read_all(run.folder), "12") == (["node9", "node2"], []), "as recorded"


@pytest.mark.parametrize("life, step, waited, action", [
    ("12.0.1", 0, 0, "stop"), ("12.0.1", 3, 0, "wait"), ("12.0.2", 0, 0, "wait"), ("12.1.1", 0, 4, "wait"),
    ("12.1.1", 3, 5, "stop"),
])  # fmt: skip
def test_what_is_wrong_on_all_nodes_is_waited_for_where_it_was_well_before(run, life, step, waited, action):
    if step:
        run.start(Life("11", 0, 1)).reached(step)
    words = ["--hosts", "node1", "--wanted", 1, "--least", 1, "--waited", waited]
    assert job("nodes", run.folder, "--life", life, *words).stdout.splitlines()[0] == f"action={action}"


@pytest.mark.parametrize("restarts, most, lines", [
    (3, 3, ["action=begin", "code=0"]), (4, 3, ["action=stop", "code=8"]),
])  # fmt: skip
def test_a_job_comes_back_as_often_as_it_may(config_file, restarts, most, lines):
    done = job("begin", "--config", config_file, "--restarts", restarts, "--most", most)
    assert done.stdout.splitlines()[1:] == lines
    assert ("come back 4 times (PHI3V_MAX_REQUEUES)" in done.stderr) == (restarts == 4)


def test_a_start_that_is_stopped_while_shards_are_copied_is_recorded(run):
    starts.begin(run.folder, LIFE, HOSTS, 0)
    assert job("judge", run.folder, "--life", "12.0.1", "--not-begun").stdout.startswith("action=requeue\ncode=0\n")
    assert [start.end.action for start in starts.read(run.folder)] == [REQUEUE]


def test_the_answer_is_given_also_where_nothing_can_be_written(run):
    (run.folder / starts.STARTS_NAME).mkdir()  # root may write anywhere else
    done = job("judge", run.folder, "--life", "12.0.1", "--exit-code", "1")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "action=again"
    assert "will not be remembered" in done.stderr and "Traceback" not in done.stderr


def test_a_run_folder_that_is_gone_is_made(tmp_path):
    starts.begin(tmp_path / "gone" / "run", LIFE, HOSTS, 0)
    assert [start.life for start in starts.read(tmp_path / "gone" / "run")] == [LIFE]


def blamed(host: str, *numbers: int) -> list[starts.Start]:
    return [
        starts.Start(Life("12", 0, number), HOSTS, 0, 0.0, End(AGAIN, "", 1, 0, [host] if number in numbers else []))
        for number in range(1, 13)
    ]


@pytest.mark.fault(24)
@pytest.mark.parametrize("numbers, out", [((11,), False), ((10, 11), True), ((1, 2), False), ((2, 12), False)])
def test_a_node_that_ended_two_of_the_last_ten_starts_is_left_out(numbers, out):
    choice = nodes.choose(HOSTS, {}, blamed("node2", *numbers), wanted=2, least=2)
    assert choice.use == (["node1", "node3"] if out else ["node1", "node2"])
    assert list(choice.bad) == (["node2"] if out else [])


@pytest.mark.parametrize(
    "unfit, wanted, least, action, use",
    [
        ([], 3, 3, nodes.TRAIN, HOSTS),
        ([], 2, 2, nodes.TRAIN, HOSTS[:2]),
        (["node1"], 2, 2, nodes.TRAIN, HOSTS[1:]),
        (["node1"], 3, 3, nodes.REQUEUE, []),
        (["node1"], 3, 2, nodes.TRAIN, HOSTS[1:]),
        (["node1", "node3"], 3, 2, nodes.REQUEUE, []),
        (HOSTS, 3, 1, nodes.REQUEUE, []),
        ([], 4, 4, nodes.REQUEUE, []),
    ],
)
def test_spares_stand_in_for_bad_nodes_and_fewer_train_only_when_allowed(unfit, wanted, least, action, use):
    choice = nodes.choose(HOSTS, dict.fromkeys(unfit, "slow"), [], wanted, least)
    assert (choice.action, choice.use, list(choice.bad)) == (action, use, unfit)
    assert choice.why or action == nodes.TRAIN


@pytest.mark.parametrize("left_s, is_first, action", [
    (None, True, nodes.TRAIN), (500.0, True, nodes.TRAIN), (20.0, True, nodes.STOP), (20.0, False, nodes.REQUEUE),
])  # fmt: skip
def test_what_the_time_limit_would_cut_is_not_begun(tmp_path, left_s, is_first, action):
    rows = [{"train/step": step, "run/attempt": 1, "time/step_s": 30.0, "time": 30.0 * step} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = nodes.in_time(nodes.Choice(nodes.TRAIN, HOSTS), tmp_path, left_s, is_first)
    assert choice.action == action
    assert action == nodes.TRAIN or ("30 s" in choice.why and "20 s left" in choice.why)


def job(*words) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/job.py", *map(str, words)], cwd=REPOSITORY, env=environment(), capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip


def test_the_answer_is_on_stdout_and_the_reasons_on_stderr(run):
    done = job("nodes", run.folder, "--life", "12.0.1", "--hosts", "node1,node2", "--wanted", 2, "--least", 2)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "action=stop"
    assert "none of 2 nodes reported" in done.stderr
    run.start().reached(3)
    done = job("judge", run.folder, "--life", "12.0.1", "--exit-code", "1")
    assert done.stdout.splitlines() == ["action=again", "code=1", "bad=", "forgive="]
    assert "again: the launcher ended with 1 and no rank said why" in done.stderr


@pytest.mark.parametrize("words, said", [
    (["judge", "x", "--life", "12", "--exit-code", "1"], "is not JOB.RESTART.NUMBER"),
    (["judge", "x", "--life", "12.0.1"], "--exit-code --not-begun is required"),
    (["nodes", "x", "--life", "1.0.1", "--hosts", "a", "--wanted", "1", "--least", "1", "--waited", "-1"], "'-1'"),
    (["begin", "--config", "missing.yaml"], "missing.yaml"),
    (["nodes", "x", "--life", "1.0.1", "--hosts", "a", "--wanted", "1", "--least", "1", "--time-left", "soon"], "soon"),
])  # fmt: skip
def test_wrong_words_are_named(words, said):
    done = job(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and not done.stdout
