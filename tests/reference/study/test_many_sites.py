"""The study of many sites: its cases, its plan, what an adaptation touches, and that it goes on."""

import dataclasses
import json
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from reference_models.errors import RunError
from reference_models.study.methods import METHODS
from reference_models.study.sites import jobs, page, plan, runner
from reference_models.study.sites.__main__ import RESULTS
from reference_models.study.sites.cases import SEEN, ZONES, make_cases, make_rules
from reference_models.study.sites.jobs import Effort, choose_ways, run_adaptations, run_training
from reference_models.study.sites.learning import Schedule, build, case_dice, train
from reference_models.study.sites.newcomer import adapt, extended
from reference_models.study.sites.plan import COMPARED, SCENES, TUNING_SEED, Job, Plan, Scene
from reference_models.study.sites.runner import SiteRows, run_sites
from reference_models.study.sites.tables import Adaptation, SiteRun

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_STEP = Schedule(batch_size=4, warmup=1, every=1, patience=1, most=1)
QUICK = Effort(training=ONE_STEP, tuning=ONE_STEP, adapting=(1,))


@pytest.fixture
def small(monkeypatch):
    """One scene of two sites, one seed, and the fewest cases."""
    scenes = {"tiny": Scene("phantom", sites=2, cases=2, rules=1)}
    monkeypatch.setattr(plan, "MAIN", ("tiny",))
    monkeypatch.setattr(plan, "SEEDS", (10,))
    monkeypatch.setattr(plan, "GRID", (0.01,))
    for name, value in {
        "ADAPT_GRID": (0.01,), "NEW_SITES": 1, "VALIDATION_CASES": 1, "TEST_CASES": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(jobs, name, value)
    monkeypatch.setattr(page, "MAIN", ("tiny",))
    for module in (plan, jobs, runner, page):
        monkeypatch.setattr(module, "SCENES", scenes)
    monkeypatch.setattr(jobs, "NEW_TEST_CASES", 1)
    monkeypatch.setattr(jobs, "LABELLED", (1, 2))
    jobs._world.cache_clear()
    yield scenes
    jobs._world.cache_clear()


@pytest.mark.parametrize("kind", ["phantom", "mri"])
def test_cases_are_the_same_each_time_and_others_of_another_split_or_seed(kind):
    def images(split, seed):
        return make_cases(kind, split, 1, 2, seed).image_N1HW

    assert torch.equal(images("train", 1), images("train", 1))
    assert not torch.equal(images("train", 1), images("test", 1))
    assert not torch.equal(images("train", 1), images("train", 2))


@pytest.mark.parametrize("kind", ["phantom", "mri"])
def test_every_zone_is_somewhere_in_what_networks_see(kind):
    zones_NHW = make_cases(kind, "test", 1, 8, seed=0).middle.zones_NHW
    assert zones_NHW.shape[1:] == (SEEN, SEEN)
    assert {*zones_NHW.unique().tolist()} == {*range(ZONES[kind] + 1)}


def test_sites_share_rules_in_turn_and_more_sites_change_no_others_rule():
    shared_SZ = make_rules("phantom", 12, rules=4, seed=3)
    assert len(shared_SZ.unique(dim=0)) == 4
    assert torch.equal(shared_SZ[:4], shared_SZ[8:])
    own_SZ = make_rules("phantom", 12, rules=12, seed=3)
    assert len(own_SZ.unique(dim=0)) == 12
    assert torch.equal(make_rules("phantom", 16, rules=16, seed=3)[:12], own_SZ)
    with pytest.raises(ValueError, match="rules: got 51, expected 1 to 50, for mri"):
        make_rules("mri", 60, rules=51, seed=3)


def scored(scene, seeds, *, lead=0.01, methods=COMPARED):
    """Scores of a scene where dMoE is ahead of all by `lead` and a little that differs by seed."""
    scores = {job: 0.5 for method in COMPARED for job in Plan.tuning(scene, method)}
    for seed in seeds:
        for method in methods:
            score = 0.8 + (lead + 0.001 * (seed % 2) if method == "dmoe" else 0.0)
            scores[Job("train", scene, method, seed, plan.GRID[0])] = score
    return scores


def test_a_plan_begins_with_learning_rates_and_then_takes_one_seed_of_all_methods_at_a_time():
    first = [*Plan({}).ahead()]
    assert {(job.task, job.seed) for job in first} == {("tune", TUNING_SEED)}
    assert TUNING_SEED not in plan.SEEDS
    scene = plan.MAIN[0]
    ahead = [job for job in Plan(scored(scene, ())).ahead() if job.scene == scene]
    assert [(job.task, job.method, job.seed) for job in ahead[:10]] == [
        ("train", method, seed) for seed in (10, 11) for method in COMPARED
    ]


def test_the_rate_with_the_highest_validation_score_is_taken_and_the_lowest_of_equals():
    jobs_ = Plan.tuning("mri-few", "dmoe")
    scores = dict(zip(jobs_, (0.5, 0.7, 0.7), strict=True))
    assert Plan(scores).rate("mri-few", "dmoe") == jobs_[1].rate
    assert Plan(scores).rate("mri-few", "sharp") == jobs_[1].rate
    assert Plan(dict([*scores.items()][:2])).rate("mri-few", "dmoe") is None


@pytest.mark.parametrize(("lead", "seeds"), [(0.01, 5), (0.0005, 5), (-0.0005, 10)])
def test_a_scene_gets_ten_seeds_where_five_leave_an_interval_across_zero(lead, seeds):
    decided = Plan(scored("mri-own", plan.SEEDS[:5], lead=lead)).seeds("mri-own")
    assert decided == plan.SEEDS[:seeds]


def test_a_scene_of_which_one_method_is_not_there_is_not_decided():
    rest = COMPARED[:-1]
    found = Plan(scored("mri-own", plan.SEEDS[:5], lead=-0.0005, methods=rest)).seeds("mri-own")
    assert found == plan.SEEDS[:5]


@pytest.mark.parametrize("method", COMPARED)
def test_a_new_site_starts_as_the_mean_and_the_others_stay_as_they_are(method):
    network = build(METHODS[method], sites=3, seed=0).eval()
    grown = extended(METHODS[method], network, sites=3)
    cases = make_cases("phantom", "test", 3, 1, seed=0)
    rules_SZ = make_rules("phantom", 4, 4, seed=0)
    with torch.inference_mode():
        pairs = [(dict(n.named_parameters())) for n in (network, grown.network)]
    for name, dim in grown.own.items():
        old, new = (parameters[name].detach() for parameters in pairs)
        assert torch.equal(new.narrow(dim, 0, old.shape[dim]), old)
        of_sites = old.narrow(dim, old.shape[dim] - 3, 3)
        assert torch.allclose(new.select(dim, -1), of_sites.mean(dim), atol=1e-7)
    assert bool(grown.own) == METHODS[method].settings.told
    assert case_dice(grown.network, cases, rules_SZ) == case_dice(network, cases, rules_SZ)


def test_a_new_router_has_as_many_numbers_as_the_design_says():
    start = extended(METHODS["dmoe"], build(METHODS["dmoe"], 3, seed=0), 3)
    assert start.numbers == sum(2 * 8 * (width + 1) for width in (12, 24, 48))


@pytest.mark.parametrize("method", [m for m in COMPARED if METHODS[m].settings.told])
def test_what_is_adapted_of_the_new_site_alone_changes_nothing_else(method):
    start = extended(METHODS[method], build(METHODS[method], 3, seed=0), 3)
    cases = make_cases("phantom", "train", 1, 2, seed=0)
    last = dataclasses.replace(cases, site_N=torch.full_like(cases.site_N, 3))
    rules_SZ = make_rules("phantom", 4, 4, seed=0)
    ((_, adapted),) = adapt(
        METHODS[method], start, "own", last, rules_SZ, rate=0.01, steps=(2,), seed=0
    )
    before = start.network.state_dict()
    for name, after in adapted.state_dict().items():
        if name not in start.own:
            assert torch.equal(after, before[name])
            continue
        dim = start.own[name]
        places = after.shape[dim] - 1
        assert torch.equal(after.narrow(dim, 0, places), before[name].narrow(dim, 0, places))
        assert not torch.equal(after.select(dim, -1), before[name].select(dim, -1))


def test_a_blind_network_has_nothing_of_a_site_s_own_to_adapt():
    start = extended(METHODS["wide"], build(METHODS["wide"], 3, seed=0), 3)
    cases, rules_SZ = make_cases("phantom", "train", 1, 2, seed=0), make_rules("phantom", 4, 4, 0)
    with pytest.raises(ValueError, match="the network receives no site"):
        next(adapt(METHODS["wide"], start, "own", cases, rules_SZ, rate=1, steps=(1,), seed=0))


def test_training_keeps_the_weights_of_the_highest_score_and_stops_when_it_falls(monkeypatch):
    scores = iter([0.2, 0.6, 0.5, 0.4, 0.9])
    weights = []

    def score(network, cases, rules_SZ):
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        return [next(scores)]

    monkeypatch.setattr("reference_models.study.sites.learning.case_dice", score)
    network = build(METHODS["wide"], 1, seed=0)
    cases, rules_SZ = make_cases("phantom", "train", 1, 4, seed=0), make_rules("phantom", 1, 1, 0)
    learned = train(
        METHODS["wide"], network, cases, cases, rules_SZ,
        rate=0.01, schedule=Schedule(batch_size=2, every=1, patience=2, most=9), seed=0,
    )  # fmt: skip
    assert (learned.steps, learned.validation, learned.stopped) == (2, 0.6, True)
    assert len(weights) == 4
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights[1], strict=True))


@pytest.fixture
def inline(monkeypatch):
    """Runs jobs at once, in this process."""

    class Pool:
        def submit(self, act, *arguments):
            future = Future()
            future.set_result(act(*arguments))
            return future

    @contextmanager
    def workers(processes):
        yield Pool()

    monkeypatch.setattr(runner, "workers", workers)


def test_a_study_goes_on_by_its_tables_alone(small, inline, tmp_path, monkeypatch):
    ran = []
    training, adapting = jobs.run_training, jobs.run_adaptations

    def stop_after(count):
        def counted(act):
            def run(job, *arguments):
                if len(ran) == count:
                    raise KeyboardInterrupt
                ran.append(job)
                return act(job, *arguments)

            return run

        monkeypatch.setattr(runner, "run_training", counted(training))
        monkeypatch.setattr(runner, "run_adaptations", counted(adapting))

    monkeypatch.setattr(plan, "COMPARED", ("dmoe", "wide"))
    monkeypatch.setattr(page, "COMPARED", ("dmoe", "wide"))
    monkeypatch.setattr(plan, "VARIANTS", {})
    results = tmp_path / "results"
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run_sites(results, tmp_path / "one", processes=1, effort=QUICK)
    assert [job.task for job in ran] == ["tune"] * 2 + ["train"]
    stop_after(None)
    rows = run_sites(results, tmp_path / "another", processes=1, effort=QUICK)
    assert [job.task for job in ran[3:]] == ["train"] + ["adapt"] * 4
    assert len({*ran}) == len(ran)
    assert {*rows.plan.scores} == {*SiteRows.read(results).plan.scores} == {*ran}
    page.write_page(results)
    text = (results / page.PAGE).read_text(encoding="utf-8")
    assert "`tiny`: phantom, 2 sites of 2 cases, 1 rules" in text

    made = json.loads((results / runner.MADE_WITH).read_text(encoding="utf-8"))
    made["design"]["test_cases"] = 9
    (results / runner.MADE_WITH).write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(RunError, match=r"another design \(test_cases\)"):
        run_sites(results, tmp_path / "one", processes=1, effort=QUICK)


def test_an_adaptation_is_chosen_by_part_and_number_of_cases(small, tmp_path):
    job = Job("adapt", "tiny", "film", TUNING_SEED, 0.01)
    tried = run_adaptations(job, tmp_path, QUICK, {})
    ways = [(row.part, row.cases, row.adapt_rate) for row in tried]
    assert ways.count(("none", 0, 0.0)) == 1
    assert len({*ways}) == len(ways) == 1 + 2 * 2
    best = dataclasses.replace(tried[-1], dice=2.0)
    chosen = choose_ways([*tried, best])
    assert chosen["all", 2] == (best.adapt_rate, best.steps)
    assert {*chosen} == {(part, cases) for part in ("own", "all") for cases in (1, 2)}


def test_a_training_tells_what_it_scores_where_the_site_is_unknown(small, tmp_path):
    rows = {
        method: run_training(Job("train", "tiny", method, 10, 0.01), tmp_path, QUICK)
        for method in ("film", "wide")
    }
    assert rows["wide"].policy is None
    assert rows["wide"].outputs is None
    assert rows["film"].dice == pytest.approx(sum(rows["film"].by_site) / 2)
    # Both test cases of each site are predicted so, and told their sites they are what they were.
    assert rows["film"].known == pytest.approx(rows["film"].dice)
    assert rows["film"].policy is not None
    assert rows["film"].outputs is not None


def test_the_committed_page_is_what_the_committed_tables_give():
    rows = SiteRows.read(RESULTS)
    machines = json.loads((RESULTS / runner.MADE_WITH).read_text(encoding="utf-8"))["machines"]
    written = (RESULTS / page.PAGE).read_text(encoding="utf-8")
    assert written == page.text_of(rows, machines)
    # A scene that has not been run in full is not counted, and its table decides nothing.
    ahead = [job for job in rows.plan.ahead() if job.task != "adapt" and job.method in COMPARED]
    left = {job.scene for job in ahead}
    of_all = f"{len(SCENES) - len(left)} of the {len(SCENES)} scenes have all seeds of the plan."
    assert page.overview(rows).startswith(of_all)
    _, _, compared = written.partition("## Where dMoE is ahead")
    for section in compared.partition("\n## ")[0].split("\n### `")[1:]:
        scene, _, text = section.partition("`")
        decided = "**On all " in text
        assert decided == (scene not in left)


def runs(seeds, lead):
    """The rows of a scene's trainings, scored as `scored` does."""
    run = SiteRun(
        "train", "mri-own", "dmoe", 0, 0.01, 0.5, 1000, True, 1, 1, 1.0, 0.5, 0.5, None, None,
        None, (0.5,),
    )  # fmt: skip
    rows = SiteRows([], [])
    for job, score in scored("mri-own", seeds, lead=lead).items():
        where = {"task": job.task, "method": job.method, "seed": job.seed}
        rows.runs.append(dataclasses.replace(run, learning_rate=job.rate, dice=score, **where))
    return rows


def test_a_verdict_is_given_on_all_seeds_of_the_plan_alone():
    assert "4 of 5 seeds have all methods: nothing is decided yet" in page.verdict(
        runs(plan.SEEDS[:4], 0.01), "mri-own"
    )
    ahead = page.verdict(runs(plan.SEEDS[:5], 0.01), "mri-own")
    names = ", ".join(METHODS[rival].title for rival in plan.RIVALS)
    assert ahead == f"**On all 5 seeds of the plan dMoE is ahead of {names}.**"
    level = page.verdict(runs(plan.SEEDS, -0.0005), "mri-own")
    assert level == f"**On all 10 seeds of the plan dMoE is not distinguishable from {names}.**"
    assert page.overview(runs(plan.SEEDS[:4], 0.01)).startswith("0 of the 10 scenes have all seeds")
    (count, *lines) = page.overview(runs(plan.SEEDS[:5], 0.01)).splitlines()
    assert count.startswith("1 of the 10 scenes have all seeds")
    (line,) = (line for line in lines if line.startswith(f"| {SCENES['mri-own'].title}"))
    assert line.count("; 5 of 5)") == 4


def test_trainings_that_hardly_began_are_named_and_left_out_of_a_second_comparison():
    rows = runs(plan.SEEDS[:5], 0.01)
    assert page.endings(rows, "mri-own") == (
        "0 of the 25 trainings reached 3000 steps before validation stopped rising."
    )

    def ended(run):
        if (run.task, run.method, run.seed) == ("train", "film", 12):
            return dataclasses.replace(run, steps=page.EARLY_STEPS, dice=0.1)
        return dataclasses.replace(run, stopped=run.task == "tune" or run.method != "wide")

    rows.runs[:] = map(ended, rows.runs)
    text = page.endings(rows, "mri-own")
    assert text.startswith("5 of the 25 trainings reached 3000 steps before")
    assert "so longer training could change these scores." in text
    assert "500 or before with FiLM + MLP on seed 12. Without" in text
    # Without the seed, dMoE is ahead of FiLM by what `scored` says; of others nothing is said.
    left = page.difference([0.01, 0.011, 0.011, 0.01])
    assert left.startswith("+.011") or left.startswith("+.010")
    assert f"did so, dMoE minus FiLM + MLP is {left}. This second" in text
    assert text in page.compared(rows)
    # Where no seed is left there is no second comparison.
    only = SiteRows([run for run in rows.runs if run.seed in (plan.TUNING_SEED, 12)], [])
    assert page.endings(only, "mri-own").endswith("FiLM + MLP on seed 12.")


def test_at_a_new_site_dmoes_router_is_compared_on_the_seeds_that_both_have():
    def row(method, part, cases, seed, dice):
        return Adaptation(
            scene="mri-few", method=method, seed=seed, learning_rate=0.01, part=part, cases=cases,
            adapt_rate=0.01, steps=25, numbers=1234, dice=dice, by_site=(dice,),
        )  # fmt: skip

    dmoe = {(1, 10): 0.8, (1, 11): 0.9, (1, 12): 0.1, (3, 10): 0.85}
    film = {(1, 10): 0.7, (1, 11): 0.85, (3, 10): 0.9}
    tuning = row("film", "own", 1, plan.TUNING_SEED, 0.0)
    text = page.newcomers(
        SiteRows(
            [],
            [
                *(row("dmoe", "own", *key, dice) for key, dice in dmoe.items()),
                *(row("film", "own", *key, dice) for key, dice in film.items()),
                tuning,
            ],
        )
    )
    (scores, minus) = [line for line in text.splitlines() if line.startswith("| FiLM + MLP | own")]
    assert scores.split(" | ")[2:5] == ["1,234", "—", "**.775** (.700 … .850; 2)"]
    assert minus.split(" | ")[2:4] == [page.difference([0.1, 0.05]), page.difference([-0.05])]
    assert text.count("minus that of") == 1  # in the scene that has rows


def test_no_scene_is_there_that_cannot_be_made():
    for scene in SCENES.values():
        total = scene.sites + plan.NEW_SITES
        make_rules(scene.kind, total, scene.rules or total, seed=0)
    assert {*plan.MAIN} <= {*SCENES}
    assert {*plan.VARIANTS} <= {*METHODS}
