"""The rule that turns evidence into a choice, on predictions made up so that it is known what is right."""

import hashlib
import json
import math
import os
from dataclasses import replace

import pytest
import torch

from vs2_plugin.model.automatic import _kept as kept
from vs2_plugin.strength import RULE, Choice, Rule, Scores, choose, neighbour_graph, scores

ALPHAS = [{"alpha": value} for value in (0.0, 0.5, 1.0, 2.0)]
TWO = [{"p": p, "alpha": alpha} for p in (0.0, 2.0) for alpha in (0.0, 1.0)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def clusters(shares, spread=0.3, seed=0, width=16):
    """Embeddings of images in clusters of the given sizes, and which cluster each is of."""
    made = generator(seed)
    labels = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    centres = torch.randn(len(shares), width, generator=made)
    return centres[labels] + spread * torch.randn(len(labels), width, generator=made), labels


def blurred(labels, classes, share, seed=1):
    """The labels, a share of them replaced at random. Of two shares, the images of the smaller are among the other."""
    made = generator(seed)
    other = torch.randint(classes, (len(labels),), generator=made)
    return torch.where(torch.rand(len(labels), generator=made) < share, other, labels)


@pytest.fixture(scope="module")
def even():
    """Ten clusters of 150 images: graph and labels."""
    embeddings, labels = clusters([150] * 10)
    return neighbour_graph(embeddings), labels


# ---- the first candidate


def test_without_a_difference_the_first_candidate_stays(even):
    graph, labels = even
    assert choose(ALPHAS, [labels] * 4, graph, 10).index == 0
    assert choose(ALPHAS, [labels * 0] * 4, graph, 10).index == 0
    assert choose(TWO, [blurred(labels, 10, 0.5)] * 4, graph, 10).values == {"p": 0.0, "alpha": 0.0}


def test_what_is_as_good_by_chance_or_worse_is_not_taken(even):
    graph, labels = even
    for seed in range(5):
        ways = [blurred(labels, 10, 0.5, 4 * seed + way) for way in range(4)]
        assert choose(ALPHAS, ways, graph, 10).index == 0
    assert choose(ALPHAS, [blurred(labels, 10, share) for share in (0.1, 0.2, 0.5, 1)], graph, 10).index == 0


def test_mended_predictions_are_taken_and_most_mended_most(even):
    graph, labels = even
    ways = [blurred(labels, 10, share) for share in (0.6, 0.4, 0.2, 0.3)]
    found = choose(ALPHAS, ways, graph, 10)
    assert found.values == {"alpha": 1.0} and found.index == 2 and found.images == 1500
    assert found.scores.information_errors[2] > 10
    expected = scores(ways, graph, 10)
    assert found.scores == expected and all(isinstance(value, float) for column in expected for value in column)


def test_of_equally_good_candidates_the_first_is_taken(even):
    graph, labels = even
    bad, good = blurred(labels, 10, 0.6), blurred(labels, 10, 0.1)
    assert choose(ALPHAS, [bad, bad, good, good], graph, 10).index == 2


def test_a_single_class_that_comes_apart_into_the_true_ones_is_taken(even):
    """What a domain shift does to zero-shot predictions."""
    graph, labels = even
    found = choose(ALPHAS, [labels * 0, labels // 5, labels, labels // 2], graph, 10)
    assert found.index == 2 and found.scores.information[0] == found.scores.information_errors[0] == 0
    assert found.scores.information_errors[2] > 100  # no image tells more than another, so that nothing is unsure
    json.dumps(found.facts, allow_nan=False)


def test_few_images_are_not_enough(even):
    embeddings, labels = clusters([6] * 3, spread=1.5)
    found = choose(
        ALPHAS, [blurred(labels, 3, share) for share in (0.7, 0.6, 0.5, 0.3)], neighbour_graph(embeddings), 3
    )
    assert found.index == 0
    assert all(value == value for column in found.scores for value in column)


# ---- a class that falls apart


@pytest.fixture(scope="module")
def split():
    """Two true classes, the first of which has two parts: graph, true classes, parts."""
    embeddings, parts = clusters([1500, 1500, 1000], spread=0.6)
    return neighbour_graph(embeddings), (parts == 2).long(), parts


def test_a_class_that_falls_apart_is_not_taken_however_sure_it_is(split):
    graph, labels, parts = split
    third = torch.rand(len(parts), generator=generator(3)) < torch.where(parts == 0, 0.25, 0.65)
    apart = torch.where(third & (labels == 0), 2, labels)
    found = choose(ALPHAS[:2], [labels, apart], graph, 3)
    assert 0 < found.scores.information[1] - found.scores.information[0] < RULE.gain
    assert found.scores.information_errors[1] > 2 * RULE.errors and found.index == 0
    assert "or not by much" in found.reason


def test_a_large_gain_is_believed():
    """A large class that falls into its four parts, with errors: more is told than a mere division in two can."""
    embeddings, parts = clusters([400] * 10)
    merged = torch.where(parts < 4, 0, parts)
    apart = torch.where(parts < 4, blurred(parts, 4, 0.27), parts)
    found = choose(ALPHAS[:2], [merged, apart], neighbour_graph(embeddings), 10)
    assert found.scores.information[1] - found.scores.information[0] > RULE.gain and found.index == 1


# ---- which of several


def test_of_those_that_pass_the_one_with_most_evidence_is_taken():
    """Not that with most information, which is the strongest as a rule: the shares speak too."""
    table = {
        "information": [0.5, 0.8, 0.9, 1.0], "information_errors": [0, 5, 6, 6.5], "entropy": [1.5, 1.6, 1.6, 1.6],
        "divergence": [0.8, 0.7, 0.6, 0.65], "divergence_errors": [0, -3, -4, -3.4],
    }  # fmt: skip
    assert RULE.pick(ALPHAS, Scores(**table)) == 2
    assert RULE.pick(ALPHAS, Scores(**{**table, "divergence_errors": [0, -3, -4, -3.6]})) == 3
    assert RULE.pick(ALPHAS, Scores(**{**table, "information_errors": [0, 5, 2.4, 2.4]})) == 1
    assert RULE.pick(ALPHAS, Scores(**{**table, "entropy": [1.5, 3.3, 3.7, 3.9]})) == 3  # a quarter of it is told
    assert RULE.pick(ALPHAS, Scores(**{**table, "entropy": [1.5, 3.3, 3.7, 4.1]})) == 0


def test_what_is_just_at_a_bound():
    """A gain has to be above its bounds; what is told, and the shares' move, may be at theirs."""
    table = {
        "information": [1.0, 1.5], "information_errors": [0, 3], "entropy": [2, 6],
        "divergence": [0.5, 0.5], "divergence_errors": [0, 2.5],
    }  # fmt: skip

    def objection(**changed):
        return Rule(errors=2.5, gain=0.25, known=0.25).objection(ALPHAS[:2], Scores(**{**table, **changed}), 1)

    assert objection() is None
    assert "not clearly more" in objection(information_errors=[0, 2.5])
    assert "not by much" in objection(information=[1.25, 1.5])
    assert "only 25% of what could be known" in objection(entropy=[2, 6.01])
    assert "move away" in objection(divergence_errors=[0, 2.51])


def test_the_constants_are_those_that_the_study_chose():
    assert Rule(errors=2.5, gain=0.075, known=0.25) == RULE


def test_a_second_option_must_have_more_to_show(even):
    graph, labels = even
    plain = blurred(labels, 10, 0.6)
    for share, values in ((0.2, {"p": 0.0, "alpha": 1.0}), (0.1, {"p": 2.0, "alpha": 1.0})):
        found = choose(TWO, [plain, blurred(labels, 10, 0.25), plain, blurred(labels, 10, share)], graph, 10)
        told = found.scores.information[3] / found.scores.entropy[3]
        assert told > RULE.known and (told > 2 * RULE.known) == (values["p"] == 2)
        assert found.scores.information[3] > found.scores.information[1] + RULE.gain / 2 and found.values == values


def test_an_option_that_stays_at_its_first_value_counts_for_none(even):
    graph, labels = even
    bad, good = blurred(labels, 10, 0.6), blurred(labels, 10, 0.3)
    candidates = [{"p": 2.0, "alpha": 1.0}, {"p": 0.0, "alpha": 2.0}, {"p": 2.0, "alpha": 2.0}]
    assert choose(candidates, [bad, good, good], graph, 10).index == 2


# ---- what it cannot know


def test_without_the_neighbours_of_its_class_nothing_is_believed(even):
    """Neighbours that tell which half of 40 classes an image is of, and no more: a gain that is sure and large."""
    graph, labels = even
    fine = torch.randint(20, (1500,), generator=generator(0))
    ways = [2 * fine + torch.randint(2, (1500,), generator=generator(1)), 2 * fine + labels % 2]
    found = choose(ALPHAS[:2], ways, graph, 40)
    assert found.scores.information[1] == pytest.approx(math.log(2), abs=0.1)
    assert found.scores.information_errors[1] > RULE.errors > abs(found.scores.divergence_errors[1])
    assert found.index == 0 and "neighbours are mostly of other classes" in found.reason
    half = [way % 2 for way in ways]  # the same, where there is no more to tell
    assert choose(ALPHAS[:2], half, graph, 2).index == 1


def test_predictions_that_gather_in_few_classes_are_not_believed(even):
    """They tell more of their neighbours' classes, and of the images less."""
    graph, labels = even
    before = blurred(labels, 10, 0.5)
    gathered = torch.where(labels < 5, labels, before)
    hubs = torch.where((labels >= 5) & (labels < 9), 9, gathered)
    found = choose(ALPHAS[:2], [before, hubs], graph, 10)
    assert found.scores.information[1] - found.scores.information[0] > RULE.gain
    assert found.scores.information_errors[1] > RULE.errors
    assert found.scores.information[1] > found.scores.entropy[1] / 2
    assert found.index == 0 and "move away from what they should be" in found.reason
    prior = torch.tensor([0.1] * 5 + [0.0] * 4 + [0.5])
    assert choose(ALPHAS[:2], [before, hubs], graph, 10, prior).index == 1


def test_the_reason_names_what_failed_of_the_candidate_that_tells_most(even):
    graph, labels = even
    worse = choose(ALPHAS[:3], [labels, blurred(labels, 10, 0.5), blurred(labels, 10, 0.2)], graph, 10)
    assert worse.reason.startswith("the model is left as it is. Most information is at alpha 1, ")
    assert "not clearly more" in worse.reason
    alone = choose(ALPHAS[:2], [labels, labels], graph, 10)
    assert "alpha 0.5, " in alone.reason and "(+0.000 nats, +0.0 standard errors)" in alone.reason
    assert worse.facts["auto_reason"] == worse.reason
    assert worse.facts["auto_entropy_plain"] == pytest.approx(math.log(10), abs=1e-4)


def test_a_choice_at_the_end_of_what_was_offered_says_so(even):
    graph, labels = even
    ways = [blurred(labels, 10, share) for share in (0.6, 0.4, 0.3, 0.1)]
    assert "no larger alpha was tried" in str(choose(ALPHAS, ways, graph, 10))
    assert "no larger" not in str(choose(ALPHAS, [*ways[:2], ways[3], ways[2]], graph, 10))
    assert "no larger" not in str(choose(TWO, [ways[0], ways[1], ways[0], ways[3]], graph, 10))  # of two values


# ---- a known prior


def test_with_a_known_prior_predictions_may_not_move_away_from_it(even):
    graph, labels = even
    five = labels // 2
    rare = torch.where(five == 1, torch.rand(1500, generator=generator(0)).lt(0.9).long() ^ 1, five)
    before = blurred(rare, 5, 0.3)  # class 1 is mostly given to class 0
    ways = [before, five]
    assert choose(ALPHAS[:2], ways, graph, 5).index == 1
    share = torch.bincount(before, minlength=5).double() / 1500
    assert choose(ALPHAS[:2], ways, graph, 5, share).index == 0
    assert choose(ALPHAS[:2], ways, graph, 5, torch.full((5,), 0.2, dtype=torch.float64)).index == 1


def test_a_move_of_equal_distance_to_the_prior_is_allowed(even):
    graph, labels = even
    before = labels.roll(75)  # half of each cluster is wrong
    after = blurred(labels, 10, 0.0)
    uniform = torch.full((10,), 0.1, dtype=torch.float64)
    assert choose(ALPHAS[:2], [before, after], graph, 10, uniform).index == 1


# ---- the whole way, on activations in which the classes lie in known directions


def scenario(shares, shift, classes=8, spread=0.5, alphas=(0.0, 0.25, 0.5, 1.0, 2.0), wrong=0.0, seed=0):
    """Images whose activations are class directions, noise and a common shift, which steering takes away:
    accuracies by α and the choice."""
    made = generator(seed)
    texts = torch.linalg.qr(torch.randn(32, classes, generator=made))[0].T
    labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(shares))
    noise = spread / 32**0.5 * 4 * torch.randn(len(labels), 32, generator=made)
    x = texts[labels] * (0 if wrong else 1) + noise + shift * texts[0]
    centre = x.mean(0) if wrong or len(set(shares)) > 1 else shift * texts[0]
    ways = [((x - alpha * centre) @ texts.T).argmax(1) for alpha in alphas]
    found = choose([{"alpha": alpha} for alpha in alphas], ways, neighbour_graph(x), classes)
    return [float((way == labels).double().mean()) for way in ways], found


def test_predictions_that_a_shift_has_collapsed_recover():
    accuracies, found = scenario([120] * 8, shift=2.0)
    assert accuracies[0] < 0.2 and max(accuracies) > 0.6
    assert accuracies[found.index] > max(accuracies) - 0.02 and found.index > 0


def test_without_a_shift_and_with_rare_classes_it_stays_at_zero():
    """One class in a hundred: centring takes the frequent class's direction away and spreads its images."""
    for seed in range(3):
        accuracies, found = scenario([1000, 10, 10, 10, 10, 10, 10, 10], shift=0.0, spread=0.35, seed=seed)
        assert accuracies[0] > 0.8 > min(accuracies) and found.index == 0


def test_where_the_classes_are_not_in_the_activations_no_choice_is_better_than_chance():
    """Neighbours then share their class by geometry alone, so that some α may well be taken; it does no harm."""
    for shift in (0.0, 2.0):
        accuracies, found = scenario([120] * 8, shift=shift, wrong=1.0)
        assert accuracies[found.index] == pytest.approx(1 / 8, abs=0.03)
        assert accuracies[0] == pytest.approx(1 / 8, abs=0.03)


# ---- what is told and kept


@pytest.fixture(scope="module")
def made(even):
    graph, labels = even
    return choose(TWO, [blurred(labels, 10, share) for share in (0.6, 0.4, 0.5, 0.1)], graph, 10)


def test_the_facts_are_flat_and_hold_the_evidence(made):
    facts = made.facts
    assert all(isinstance(value, (int, float, str)) for value in facts.values())
    assert (facts["p"], facts["alpha"], facts["auto"], facts["auto_images"]) == (2.0, 1.0, "p+alpha", 1500)
    words = dict(word.split(":") for word in facts["auto_evidence"].split())
    assert list(words) == ["0/0", "0/1", "2/0", "2/1"]
    assert [float(value) for value in words.values()] == pytest.approx(made.scores.information, abs=6e-4)
    assert facts["auto_information"] == round(made.scores.information[3], 4)
    assert facts["auto_information_plain"] == round(made.scores.information[0], 4)
    assert facts["auto_standard_errors"] == round(made.scores.information_errors[3], 2)
    assert facts["auto_entropy"] == round(made.scores.entropy[3], 4)
    assert facts["auto_entropy_plain"] == round(made.scores.entropy[0], 4)


def test_one_sentence_says_what_was_chosen_and_why(made, even):
    assert str(made).startswith("p = 2, alpha = 1: over 1500 unlabeled images, a class carries ")
    assert f"{made.scores.information[3]:.3f} nats" in str(made)
    assert f"{made.scores.information_errors[3]:+.1f} standard" in str(made)
    graph, labels = even
    stays = str(choose(ALPHAS, [blurred(labels, 10, share) for share in (0.1, 0.2, 0.5, 1)], graph, 10))
    assert stays.startswith("alpha = 0: ") and "the model is left as it is. Most information is at alpha 0.5, " in stays
    assert str(made).isascii() and stays.isascii() and "\n" not in str(made) + stays


def test_a_choice_is_the_same_after_json(made):
    again = Choice.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and str(again) == str(made) and again.facts == made.facts


DAMAGES = [
    "", "{", "null", "[]", "7", '"text"', "{}", '{"index": 1}', "\x00" * 40,
    lambda data: {**data, "index": 4}, lambda data: {**data, "index": "1"}, lambda data: {**data, "index": None},
    lambda data: {**data, "information": data["information"][:2]}, lambda data: {**data, "information": None},
    lambda data: {**data, "more": 1}, lambda data: {**data, "candidates": {}}, lambda data: {**data, "candidates": [1]},
    lambda data: {key: value for key, value in data.items() if key != "images"},
]  # fmt: skip


def written(choice):
    """A kept choice as it is written, with its digest, whatever it holds."""
    digest = hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()
    return json.dumps({"choice": choice, "sha256": digest})


def test_a_kept_choice_that_was_changed_is_made_anew(made, tmp_path):
    assert kept(tmp_path, {}, torch.eye(3), lambda: made) == made
    [file] = tmp_path.glob("*.json")
    file.write_text(file.read_text().replace('"images": 1500', '"images": 1501'))
    other = replace(made, images=7)
    assert kept(tmp_path, {}, torch.eye(3), lambda: other) == other


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: repr(damage) if isinstance(damage, str) else None)
def test_a_damaged_file_is_made_anew(damage, made, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return made

    def ask():
        return kept(tmp_path / "auto", {"name": "x"}, torch.eye(3), make)

    assert ask() == made and ask() == made and len(calls) == 1
    [file] = (tmp_path / "auto").iterdir()
    whole = file.read_text()
    file.write_text(damage if isinstance(damage, str) else written(damage(json.loads(whole)["choice"])))
    assert ask() == made and len(calls) == 2
    assert file.read_text() == whole and ask() == made and len(calls) == 2


def test_what_the_choice_depends_on_makes_another_file(made, tmp_path):
    calls = []

    def ask(identity, classifier):
        return kept(tmp_path / "auto", identity, classifier, lambda: calls.append(1) or made)

    one = torch.randn(4, 3, generator=generator(0))
    asked = [
        ({"checkpoint": "a", "options": {"gate": None}}, one),
        ({"checkpoint": "b", "options": {"gate": None}}, one),
        ({"checkpoint": "a", "options": {"gate": 0.9}}, one),
        ({"checkpoint": "a", "options": {"gate": None}}, one.flip(1)),
        ({"checkpoint": "a", "options": {"gate": None}}, one[:, :2]),
        ({"checkpoint": "a", "options": {"gate": None}}, one.bfloat16()),
    ]
    for number, question in enumerate(asked, 1):
        ask(*question)
        assert len(calls) == number and len(list((tmp_path / "auto").iterdir())) == number
    for question in asked:
        ask(*question)
    ask({"options": {"gate": None}, "checkpoint": "a"}, one.T.contiguous().T)  # the same, otherwise written
    assert len(calls) == len(asked)
    assert all(file.suffix == ".json" and file.name[0] != "." for file in (tmp_path / "auto").iterdir())


def test_a_choice_kept_by_one_can_be_read_by_all(made, tmp_path):
    tmp_path.chmod(0o755)
    kept(tmp_path / "auto", {}, torch.eye(2), lambda: made)
    [file] = (tmp_path / "auto").iterdir()
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("how", ["a file in its place", "no folder around it", "no right to write"])
def test_where_nothing_can_be_kept_the_choice_is_made_every_time(how, made, tmp_path):
    calls, folder = [], tmp_path / "checkpoint" / "auto"
    if how != "no folder around it":
        folder.parent.mkdir()
    if how == "a file in its place":
        folder.write_text("mine")
    if how == "no right to write":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.parent.chmod(0o555)
    for _ in range(2):
        assert kept(folder, {}, torch.eye(2), lambda: calls.append(1) or made) == made
    assert len(calls) == 2 and not folder.is_dir()


def test_an_error_while_choosing_keeps_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "auto", {}, torch.eye(2), lambda: 1 / 0)
    assert not list(tmp_path.rglob("*"))
