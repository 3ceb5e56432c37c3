"""Draw an evaluation: which answers are taken for which, how far off the counts are, what length does."""

from pathlib import Path

import numpy as np

from torchfilm import plot
from torchfilm.training.checkpoint import write_csv

from .evaluate import Report, Score


def write_report(report: Report, out: Path) -> list[Path]:
    """Write report.json with all numbers, scores.csv, and the figures confusion, count_errors and lengths.

    A figure without anything to show (no question that counts) is left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    report.save(out / "report.json")
    files = [
        out / "report.json",
        _scores(report, out / "scores.csv"),
        _confusion(report, out / "confusion.png"),
    ]
    if report.count_errors.differences:
        figure = plot.bars(
            report.count_errors.differences, xlabel="predicted - true count", ylabel="number of questions"
        )
        files.append(plot.save(figure, out / "count_errors.png"))
    lengths = {
        "words of the question": report.question_lengths,
        "functions of the program": report.program_lengths,
    }
    for name, scores in lengths.items():
        if scores:
            files.append(_by_length(name, scores, out / f"by_{name.split()[0]}.png"))
    return files


def _scores(report: Report, path: Path) -> Path:
    """One line per group: what it is, how many questions, accuracy and 95 % interval."""
    groups = {
        "kind": report.kinds,
        "type": report.types,
        "family": report.families,
        "words": report.question_lengths,
        "functions": report.program_lengths,
    }
    rows = (
        (group, name, s.n, s.accuracy, s.low, s.high)
        for group, scores in groups.items()
        for name, s in scores.items()
    )
    return write_csv(path, ("group", "name", "n", "accuracy", "low", "high"), rows)


def _confusion(report: Report, path: Path) -> Path:
    """Share of each given answer (columns) among the questions with a true answer (rows)."""
    given = {answer for row in report.confusion.values() for answer in row}
    names = sorted(given | set(report.confusion), key=_order)
    rows = [name for name in names if name in report.confusion]
    counts = np.array([[report.confusion[row].get(name, 0) for name in names] for row in rows], float)
    shares = counts / counts.sum(1, keepdims=True)
    figure = plot.table(
        shares, rows, names, xlabel="given answer", ylabel="true answer", unit="share of the true answer"
    )
    return plot.save(figure, path)


ANSWER_ORDER = (
    *("yes", "no", "small", "large", "rubber", "metal", "cube", "sphere", "cylinder"),
    *("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
)


def _order(answer: str) -> tuple[int, int, str]:
    """Numbers first, by value; then answers that compete with one another side by side."""
    if answer.isdigit():
        return 0, int(answer), ""
    return 1, ANSWER_ORDER.index(answer) if answer in ANSWER_ORDER else len(ANSWER_ORDER), answer


def _by_length(name: str, scores: dict[int, Score], path: Path) -> Path:
    enough = {length: score for length, score in scores.items() if score.n >= 20} or scores
    figure = plot.curves(
        list(enough),
        {"accuracy": [100 * score.accuracy for score in enough.values()]},
        xlabel=name,
        ylabel="accuracy, %",
    )
    return plot.save(figure, path)
