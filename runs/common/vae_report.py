"""The exercise's two questions about the VAE's priors, answered in words from a run's metrics."""

import math

# Best published test ELBO for this exercise with a Gaussian prior, on all of MNIST, pixels > 0.5, with its own best M.
PUBLISHED = -81.76
COLUMNS = ("elbo", "reconstruction", "kl", "log_likelihood", "prior_match")
TITLES = {"gaussian": "Gaussian", "mog": "mixture", "vamp": "Vamp"}
ERRORS = 2  # figures that differ by fewer standard errors of their difference are not told apart
Metrics = dict[str, float]


def title(prior: str) -> str:
    """A prior's name in prose: its entry in ``TITLES``, or else its own name."""
    return TITLES.get(prior, prior)


def report(metrics: dict[str, Metrics], comparable: bool) -> None:
    """Print a table of all priors, and answer the questions.

    A prior whose training was cut short is shown, and not compared.

    Args:
        metrics: of each prior, by its name.
        comparable: whether the data are those of the published figure.
    """
    print(f"\n{'test, nats per image':<22}" + "".join(f"{column:>18}" for column in COLUMNS))
    for prior, found in metrics.items():
        label = title(prior) + (" (interrupted)" if found.get("interrupted") else "")
        print(f"{label:<22}" + "".join(f"{cell(found, column):>18}" for column in COLUMNS))
    first = next(iter(metrics.values()))
    error = (
        f"over {first['seeds']} seeds"
        if first["seeds"] > 1
        else "over the test images, of one training; --seeds 3 has it over trainings"
    )
    print(
        f"± is the standard error {error}\n{first['test_images']:,} test images; log_likelihood from "
        f"{first['importance_samples']} importance samples on {first['importance_images']:,} of them"
    )
    finished = {prior: found for prior, found in metrics.items() if not found.get("interrupted")}
    if not finished:
        print("\nThe training was cut short: --resume goes on with it.")
        return
    print("\nIs the test ELBO better?", *better(finished, comparable), sep="\n  ")
    print("Do prior and aggregate posterior match?", *matching(finished), sep="\n  ")


def cell(figures: Metrics, column: str) -> str:
    """A figure and its standard error."""
    digits = 3 if column == "prior_match" else 2
    return f"{figures[column]:.{digits}f} ± {figures[f'{column}_stderr']:.{digits}f}"


def better(metrics: dict[str, Metrics], comparable: bool) -> list[str]:
    """Is the test ELBO better than a Gaussian prior's: one's own, or else the best published one's?"""
    if list(metrics) == ["gaussian"]:
        return ["this is the prior to compare with: --prior all trains the others too"]
    if "gaussian" in metrics:
        return [
            comparison(title(prior), found["elbo_gain"], found["elbo_gain_stderr"], "the Gaussian prior")
            for prior, found in metrics.items()
            if prior != "gaussian"
        ]
    if not comparable:
        return [
            "--prior all trains the Gaussian prior too, to compare with; the published figures are of all of MNIST, "
            "pixels > 0.5"
        ]
    than = f"the best published with a Gaussian prior ({PUBLISHED}); --prior all trains that one too"
    return [
        comparison(title(prior), found["elbo"] - PUBLISHED, found["elbo_stderr"], than)
        for prior, found in metrics.items()
    ]


def comparison(name: str, gain: float, error: float, than: str) -> str:
    """So many nats better or worse, or not told apart."""
    if abs(gain) < ERRORS * error:
        return f"{name}: not told apart ({gain:+.2f} ± {error:.2f} nats) from {than}"
    return f"{name}: {abs(gain):.2f} ± {error:.2f} nats {'better' if gain > 0 else 'worse'} than {than}"


def matching(metrics: dict[str, Metrics]) -> list[str]:
    """How well each prior matches the aggregate posterior, the best first, and which of them can't be told apart."""
    groups: list[list[str]] = []
    for prior in sorted(metrics, key=lambda prior: metrics[prior]["prior_match"]):
        if groups and alike(metrics[groups[-1][0]], metrics[prior]):
            groups[-1].append(prior)
        else:
            groups.append([prior])
    lines = ["a classifier tells draws of the two apart in so many % of cases (50: they match)"]
    for group in groups:
        names = ", ".join(f"{title(prior)} {percent(metrics[prior])}" for prior in group)
        lines.append(names + (": within the error of each other" if len(group) > 1 else ""))
    if len(metrics) > 1:
        best = ", ".join(title(prior) for prior in groups[0])
        lines.append(f"the best match: {best}" if len(groups) > 1 else "no prior matches better than another")
    return lines


def alike(one: Metrics, other: Metrics) -> bool:
    """Whether the matches of two priors can't be told apart."""
    error = math.hypot(one["prior_match_stderr"], other["prior_match_stderr"])
    return abs(one["prior_match"] - other["prior_match"]) < ERRORS * error


def percent(figures: Metrics) -> str:
    """How often the classifier is right, in per cent."""
    return f"{100 * figures['prior_match']:.1f} ± {100 * figures['prior_match_stderr']:.1f}"
