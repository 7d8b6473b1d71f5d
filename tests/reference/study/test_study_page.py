"""The studies' pages and figures show what their csv have, and the prose quotes nothing else."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
from harness.study_trials import SEEDS, write_made_tables
from matplotlib.colors import to_hex
from PIL import Image

from reference_models.errors import DataError
from reference_models.markdown import section
from reference_models.study import documents, figures, page, when_it_helps
from reference_models.study.methods import METHODS
from reference_models.study.quote import quotation, short
from reference_models.study.results import Results
from reference_models.study.sections import CAUTION
from reference_models.study.sites.plan import SCENES as SITE_SCENES
from reference_models.study.sites.runner import SiteRows
from reference_models.study.tables import Difference

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "reference_models" / "study" / "results"
PROSE = [
    ROOT / name
    for name in ("README.md", "docs/explanation/study.md", "docs/start/should-i-use-this.md")
]
GENERATED = re.compile(r"<!-- ([\w-]+): begin -->.*?<!-- \1: end -->", re.DOTALL)
WHOLE = [name for name, method in METHODS.items() if method.kind != "ablation"]
QUOTATION = re.compile(r"[+-]\.\d{3}\s\((?:-?\.\d{3}\sto\s-?\.\d{3}|no\sinterval);\s\d+\sof\s\d+\)")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole study's tables; to be read only."""
    folder = tmp_path_factory.mktemp("results")
    write_made_tables(folder)
    return folder


def rows(folder, name):
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(block):
    """Each table: by (row's name, column's name), the cell."""
    for text in re.findall(r"(?:^\|.*\n?)+", block, re.MULTILINE):
        header, _, *lines = (line.strip("| ").split(" | ") for line in text.strip().splitlines())
        header = ["", *header] if len(header) < len(lines[0]) else header
        yield {
            (line[0], title): cell
            for line in lines
            for title, cell in zip(header[1:], line[1:], strict=True)
        }


def numbers(cell):
    return [float(number) for number in re.findall(r"-?\d*\.\d+", cell)]


RENEW = "python -m reference_models.study.documents renews it"


def test_the_committed_page_is_what_the_committed_csv_give():
    written = (COMMITTED / page.PAGE).read_text(encoding="utf-8")
    assert written == page.text_of(Results(COMMITTED)), RENEW


def test_the_costs_shown_are_what_the_committed_csv_give():
    written = (documents.DOCS / documents.START).read_text(encoding="utf-8")
    assert section("costs", documents.costs()) in written, RENEW


def test_the_committed_figure_is_drawn_from_the_committed_csv():
    scenes = when_it_helps.scenes_drawn(Results(COMMITTED), SiteRows.read(documents.SITES))
    with Image.open(documents.DOCS / when_it_helps.FIGURE) as image:
        assert image.text["Source"] == when_it_helps.digest(scenes), RENEW


def of_other_studies():
    """The differences that the generated pages of many sites and of unknown attributes show."""
    pages = [results / "README.md" for results in (documents.SITES, documents.UNKNOWN)]
    return {
        found for page in pages for found in QUOTATION.findall(page.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_every_number_that_a_page_quotes_is_a_row_of_the_committed_csv(path):
    prose = GENERATED.sub("", path.read_text(encoding="utf-8"))
    results = Results(COMMITTED)
    quoted = {" ".join(found.split()) for found in QUOTATION.findall(prose)}
    assert quoted <= {quotation(row) for row in results.differences} | of_other_studies()
    # The page that explains how to read a number takes one apart.
    prose = re.sub(r"\*\*\+?\.\d{3}( to \.\d{3})?\*\*", "", QUOTATION.sub("", prose))
    # Nothing that looks like a difference goes without its interval.
    assert not re.findall(r"(?<![\w.])[+−-]\d?\.\d+", prose)
    if path != PROSE[0]:  # which has the demo's numbers, too
        assert quoted
        scores = {*re.findall(r"(?<![\w.])\.\d{3}\b", prose)}
        assert scores <= {short(row.mean) for row in results.summary}


def test_a_quotation_is_found_across_a_line_and_as_the_page_writes_it():
    row = Difference(
        "rule", "dmoe", "film", "es_dice", -0.0206, low=-0.04, high=0.0004, ahead=1, seeds=5,
        by_seed=(),
    )  # fmt: skip
    assert quotation(row) == "-.021 (-.040 to .000; 1 of 5)"
    assert QUOTATION.fullmatch(quotation(row).replace(" to ", "\nto "))
    alone = dataclasses.replace(row, low=None, high=None)
    assert QUOTATION.fullmatch(quotation(alone))


def test_every_score_of_the_page_is_that_of_its_scene_and_method(made):
    first, *_ = tables(page.text_of(Results(made)))
    titles = {
        "rule": "(a) rule",
        "appearance": "(b) appearance",
        "none": "(c) none",
        "two": "(d) two",
        "mri": "(e) mri",
    }
    seen = 0
    means = {
        (row["scene"], row["method"], row["metric"]): row["mean"]
        for row in rows(made, "summary.csv")
        if row["condition"] == "right"
    }
    for row in rows(made, "summary.csv"):
        if METHODS[row["method"]].kind == "ablation" or row["condition"] != "right":
            continue
        title = titles[row["scene"]]
        if row["metric"] == "unseen":
            title += ", Dice of unseen combinations"
        elif row["metric"] != "es_dice":
            continue
        expected = [float(row[key]) for key in ("mean", "low", "high", "lowest", "highest")]
        if row["metric"] == "es_dice":
            beside = [means[row["scene"], row["method"], name] for name in ("worst", "overall")]
            expected += map(float, beside)
        cell = first[METHODS[row["method"]].title, title]
        assert numbers(cell) == pytest.approx(expected, abs=0.00051)
        seen += 1
    assert seen == len(WHOLE) * 6
    for row in rows(made, "costs.csv"):
        if METHODS[row["method"]].kind != "ablation":
            name = METHODS[row["method"]].title
            assert int(first[name, "parameters"].replace(",", "")) == int(row["parameters"])
            assert numbers(first[name, "time of a step"]) == pytest.approx(
                [float(row["milliseconds_of_dense"])], abs=0.0051
            )


def test_every_difference_of_the_page_is_that_of_its_pair(made):
    _, against, told, ablations, *_ = tables(page.text_of(Results(made)))
    found = {(row.scene, row.a, row.b, row.metric): row for row in Results(made).differences}

    def quoted(*key):
        return quotation(found[key]).replace(" (", "<br>(")

    assert against["dMoE against FiLM + MLP", "(e) mri"] == quoted("mri", "dmoe", "film", "es_dice")
    variant = METHODS["dmoe-within"].title
    assert against[f"{variant} against dMoE", "(a) rule"] == quoted(
        "rule", "dmoe-within", "dmoe", "es_dice"
    )
    variants = [m for m in WHOLE if METHODS[m].kind == "dmoe" and m != "dmoe"]
    rivals = [m for m in WHOLE if METHODS[m].kind == "baseline" and METHODS[m].settings.told]
    assert {METHODS[m].title for m in rivals} == {
        METHODS[m].title for m in ("channels", "film", "film-identity", "per_value")
    }
    others = [m for m in WHOLE if METHODS[m].kind in ("baseline", "robust")]
    candidates = [m for m in WHOLE if METHODS[m].kind == "candidate"]
    pairs = len(others) + (len(rivals) + 1) * len(variants) + 2 * len(candidates)
    assert len(against) == pairs * 5
    for method in (m for m in METHODS if METHODS[m].kind == "ablation"):
        cells = [ablations[METHODS[method].title, key] for key in ("ES-Dice",
                 "Dice of the worst group")]  # fmt: skip
        assert cells == [quoted("rule", method, "dmoe", metric) for metric in ("es_dice", "worst")]
    expected = [
        found["two", f"film@{condition}", "film", "es_dice"].difference
        for condition in ("shuffled", "wrong", "unknown")
    ]
    assert numbers(told["FiLM + MLP", "(d) two"]) == pytest.approx(expected, abs=0.00051)
    # All three are clear where the image does not show the rule, none where there is none.
    assert told["dMoE", "(a) rule"].count("**") == 6
    assert "**" not in told["dMoE", "(c) none"]
    assert {name for name, _ in told} == {
        METHODS[m].title for m in WHOLE if METHODS[m].settings.told
    }


def test_the_page_shows_the_rates_chosen_and_which_lie_at_the_grids_end(made):
    *_, rates, spread = tables(page.text_of(Results(made)))
    chosen = [row for row in rows(made, "rates.csv") if row["chosen"] == "yes"]
    assert {cell for (name, _), cell in rates.items() if name.startswith("dense")} == {"0.012*"}
    assert {cell for (name, _), cell in rates.items() if name == "dMoE"} == {"0.006"}
    assert len([cell for cell in rates.values() if cell[0].isdigit()]) == len(chosen)
    assert rates[METHODS["dmoe-learned"].title, "(a) rule"] == "as dMoE"
    assert [*spread.values()] == [
        f"{short(float(row[key]))} ({row[count]})"
        for row in rows(made, "spread.csv")
        for key, count in (("over_inits", "inits"), ("over_seeds", "seeds"))
    ]


def test_a_page_is_written_whole_or_not_at_all(made, tmp_path):
    (made / page.PAGE).write_text("last run's", encoding="utf-8")
    page.write_page(made)
    whole = (made / page.PAGE).read_text(encoding="utf-8")
    assert "last run" not in whole
    assert "Made with seeds 10, 11, 12, 13, 14;" in whole
    assert whole.count("| dMoE against FiLM + MLP |") == 1
    assert CAUTION in whole
    with pytest.raises(DataError, match=r"machine.json: cannot be read .*Run the study, or name"):
        page.write_page(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_document_that_shows_costs_is_renewed_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "DOCS", tmp_path)
    path = tmp_path / documents.START
    path.parent.mkdir()
    path.write_text(f"before\n{section('costs', 'old')}\nafter\n", encoding="utf-8")
    documents.renew_documents()
    written = path.read_text(encoding="utf-8")
    assert written == f"before\n{section('costs', documents.costs())}\nafter\n"
    assert (tmp_path / when_it_helps.FIGURE).exists()
    path.write_text("no mark", encoding="utf-8")
    with pytest.raises(DataError, match=r"expected the marks .*, one is missing; add both"):
        documents.renew_documents()


def test_the_figure_shows_means_and_seeds_of_scenes_that_all_four_networks_have(made):
    committed = SiteRows.read(documents.SITES)
    scenes = when_it_helps.scenes_drawn(Results(made), committed)
    one = next(scene for scene in scenes if "two attributes" in scene.title)
    trials = [row for row in rows(made, "trials.csv") if row["scene"] == "two"]
    for method, scores in one.scores.items():
        found = [r for r in trials if (r["method"], r["condition"]) == (method, "right")]
        groups = [[float(r[key]) for key in r if key.startswith("dice_") and r[key]] for r in found]
        assert scores == pytest.approx([sum(of) / len(of) for of in groups])
        assert len(scores) == len(SEEDS)
    axes = when_it_helps.draw(scenes).axes[0]
    means, seeds = ([line.get_xdata() for line in axes.lines if line.get_marker() in marks]
                    for marks in ("XosD", "o"))  # fmt: skip
    expected = [[*scores] for scene in scenes for scores in scene.scores.values()]
    assert all(any([*x] == scores for x in seeds) for scores in expected)
    assert all(any([*x] == [sum(of) / len(of)] for x in means) for of in expected)
    # Without dMoE's runs no scene of many sites is drawn.
    lacking = SiteRows([run for run in committed.runs if run.method != "dmoe"], [])
    titles = {scene.title for scene in SITE_SCENES.values()}
    assert titles & {scene.title for scene in scenes}
    of_study = when_it_helps.scenes_drawn(Results(made), lacking)
    assert not titles & {scene.title for scene in of_study}
    assert when_it_helps.digest(of_study) != when_it_helps.digest(scenes)


def test_part_of_a_study_and_a_single_seed_have_a_page_and_figures(tmp_path):
    write_made_tables(tmp_path, ("rule", "two"), ("wide", "dmoe", "k1"), (3,), shares=(0.5, 0.5))
    machine = json.loads((tmp_path / "machine.json").read_text(encoding="utf-8"))
    machine["settings"]["quick"] = True
    (tmp_path / "machine.json").write_text(json.dumps(machine), encoding="utf-8")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mri.png").write_text("of an earlier run", encoding="utf-8")
    figures.write_figures(tmp_path)
    page.write_page(tmp_path)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"rule.png", "two.png", "ablations.png", "loads.png"}
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "A smoke run" in text
    assert "no interval" in text
    assert "](figures/two.png)" in text
    assert "mri" not in text
    for path in (tmp_path / "figures").iterdir():
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert int.from_bytes(head[16:20], "big") == 1100


def dots(axes):
    """By height in the figure and colour, the numbers drawn as dots."""
    return {
        (round(float(line.get_ydata()[0]), 3), to_hex(line.get_color())): [*line.get_xdata()]
        for line in axes.lines
        if line.get_marker() == "o" and line.get_linestyle() == "None"
    }


def test_every_seed_is_drawn_at_its_place_and_spread_trials_are_not(made):
    scores, told, _ = figures.FIGURES["two"](Results(made)).axes
    trials = [row for row in rows(made, "trials.csv") if row["scene"] == "two"]
    names = [label.get_text() for label in scores.get_yticklabels()]
    assert names == [METHODS[m].title for m in WHOLE]
    for axes, keys, colours in (
        (scores, [("es_dice", "right"), ("worst", "right")], ["#0072b2", "#d55e00"]),
        (
            told,
            [("es_dice", c) for c in ("right", "shuffled", "wrong", "unknown")],
            ["#0072b2", "#009e73", "#d55e00", "#cc79a7"],
        ),
    ):
        drawn = dots(axes)
        for place, method in enumerate(WHOLE):
            for n, ((metric, condition), colour) in enumerate(zip(keys, colours, strict=True)):
                y = round(place + 0.8 * ((n + 0.5) / len(keys) - 0.5), 3)
                expected = [
                    float(row[metric]) for row in trials
                    if (row["method"], row["condition"]) == (method, condition)
                ]  # fmt: skip
                assert drawn.pop((y, colour), []) == expected
                assert len(expected) in (len(SEEDS), 0)
        assert not drawn
    # "rule" has trials besides, from other initialisations.
    assert all(len(x) == len(SEEDS) for x in dots(figures.FIGURES["rule"](Results(made)).axes[0])
               .values())  # fmt: skip


def test_ablations_are_drawn_as_differences_by_seed(made):
    axes, _ = figures.FIGURES["ablations"](Results(made)).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    found = {
        METHODS[row["a"]].title: [float(number) for number in row["by_seed"].split(";")]
        for row in rows(made, "differences.csv")
        if (row["scene"], row["b"], row["metric"]) == ("rule", "dmoe", "es_dice")
        and "@" not in row["a"]
        and METHODS[row["a"]].kind != "candidate"
    }
    drawn = {names[int(y)]: x for (y, _), x in dots(axes).items()}
    assert drawn == found
    assert len(found) == sum(m.kind in ("dmoe", "ablation") for m in METHODS.values()) - 1


def test_loads_are_drawn_for_every_seed_of_the_control_and_of_the_rule(made):
    results = Results(made)
    results.loads = [  # the made-up loads are the same in every scene
        dataclasses.replace(row, shares=row.shares[::-1]) if row.scene == "none" else row
        for row in results.loads
    ]
    figure = figures.FIGURES["loads"](results)
    images = [axes.images[0].get_array().tolist() for axes in figure.axes if axes.images]
    expected = {}
    for row in results.loads:
        if (row.method, row.condition) == ("dmoe", "right"):
            expected.setdefault((row.scene, row.data_seed), []).append([*row.shares])
    assert images == [expected[scene, seed] for scene in ("none", "rule") for seed in SEEDS]
