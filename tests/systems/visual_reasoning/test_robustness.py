import csv
import json

import numpy as np
import torch
from small_exam import small_exam, small_network

from torchfilm.systems.visual_reasoning.evaluate import evaluate
from torchfilm.systems.visual_reasoning.exam import conclude, look, modulate
from torchfilm.systems.visual_reasoning.robustness import (
    add_noise,
    drawn_noise,
    identity,
    mean_modulations,
    robustness,
    with_parts,
)


def test_noise_of_sd_zero_is_exactly_the_plain_accuracy(tmp_path) -> None:
    exam, network = small_exam(), small_network()
    plain = evaluate(network, exam).accuracy
    found = robustness(network, exam, exam.questions, tmp_path, noise=(0.0, 5.0))
    assert found.accuracy == plain
    assert (found.noise_gamma[0], found.noise_beta[0], found.noise_both[0]) == (plain, plain, plain)


def test_the_numbers_are_the_same_for_the_same_seed_and_written_beside_the_figure(tmp_path) -> None:
    exam, network = small_exam(), small_network()
    found = robustness(network, exam, exam.questions, tmp_path, noise=(0.0, 1.0, 4.0), seed=3)
    assert found == robustness(network, exam, exam.questions, tmp_path, noise=(0.0, 1.0, 4.0), seed=3)
    assert json.loads((tmp_path / "robustness.json").read_text())["noise_beta"] == list(found.noise_beta)
    with (tmp_path / "noise.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(r["gamma"]) for r in rows] == list(found.noise_gamma)
    assert (tmp_path / "noise.png").stat().st_size > 5000


def test_means_alone_draw_bars_and_every_answer_is_counted(tmp_path) -> None:
    exam, network, heard = small_exam(), small_network(), []
    robustness(
        network,
        exam,
        exam.questions,
        tmp_path,
        noise=(0.0,),
        progress=lambda done, total: heard.append((done, total)),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"robustness.json", "means.png"}
    assert (tmp_path / "means.png").stat().st_size > 5000
    assert heard == [(60 * i, 540) for i in range(1, 10)]


def test_the_noise_has_the_stated_spread_and_touches_the_named_part_only() -> None:
    own = modulate(small_network(), small_exam(500).questions)
    noisy = add_noise(own, drawn_noise(own, seed=0), 2.0, ["beta"])
    for site in own:
        assert torch.equal(noisy[site].gamma, own[site].gamma)
        added = noisy[site].beta - own[site].beta
        assert abs(added.std().item() - 2) < 0.1
        assert abs(added.mean().item()) < 0.1


def test_a_mean_is_the_mean_over_training_questions() -> None:
    exam, network = small_exam(), small_network()
    train = exam.questions.select(np.arange(17))
    means = mean_modulations(modulate(network, train))
    own = modulate(network, exam.questions)
    for site, m in with_parts(own, means, ["gamma"]).items():
        expected = modulate(network, train)[site].gamma.double().mean(0)
        assert m.gamma.shape == (60, 8)
        assert torch.allclose(m.gamma.double(), expected.expand(60, 8), atol=1e-6)
        assert torch.equal(m.beta, own[site].beta)


def test_replacing_both_parts_makes_the_network_deaf() -> None:
    exam, network = small_exam(), small_network()
    own = modulate(network, exam.questions)
    seen = look(network, exam)
    for other in (identity(own), mean_modulations(own)):
        answers = conclude(network, seen, with_parts(own, other, ["gamma", "beta"]))
        for scene in set(exam.questions.image_index.tolist()):
            assert len(set(answers[exam.questions.image_index == scene].tolist())) == 1
