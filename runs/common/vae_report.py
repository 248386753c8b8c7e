"""The exercise's two questions about the VAE's priors, answered in words from a run's metrics."""

# Best published test ELBO for this exercise with a Gaussian prior, pixels > 0.5, with its own best M.
PUBLISHED = -81.76
COLUMNS = ("elbo", "reconstruction", "kl", "log_likelihood", "prior_match")
TITLES = {"gaussian": "Gaussian", "mog": "mixture", "vamp": "Vamp"}


def title(prior: str) -> str:
    """A prior's name in prose: its entry in ``TITLES``, or else its own name."""
    return TITLES.get(prior, prior)


def report(metrics: dict[str, dict[str, float]], comparable: bool) -> None:
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
    several = any("elbo_std" in found for found in metrics.values())
    print(
        f"log_likelihood from {first['importance_samples']} importance samples on {first['importance_images']} images; "
        + ("mean ± standard deviation over the seeds" if several else "one seed; --seeds 3 for the spread")
    )
    finished = {prior: found for prior, found in metrics.items() if not found.get("interrupted")}
    if not finished:
        print("\nThe training was cut short: --resume goes on with it.")
        return
    print("\nIs the test ELBO better?", *better(finished, comparable), sep="\n  ")
    print("Do prior and aggregate posterior match?")
    for prior, found in finished.items():
        print(
            f"  {title(prior)}: a classifier tells their draws apart in {100 * found['prior_match']:.1f} % of cases "
            "(50 %: they match)"
        )


def cell(figures: dict[str, float], column: str) -> str:
    """A figure, and its standard deviation over the seeds if there are several."""
    digits = 3 if column == "prior_match" else 2
    deviation = f" ± {figures[f'{column}_std']:.{digits}f}" if f"{column}_std" in figures else ""
    return f"{figures[column]:.{digits}f}{deviation}"


def better(metrics: dict[str, dict[str, float]], comparable: bool) -> list[str]:
    """Is the test ELBO better than a Gaussian prior's: one's own, or else the best published one's?"""
    if list(metrics) == ["gaussian"]:
        return ["this is the prior to compare with: --prior all trains the others too"]
    if "gaussian" in metrics:
        reference, than = metrics["gaussian"]["elbo"], "the Gaussian prior"
    elif comparable:
        reference = PUBLISHED
        than = f"the best published with a Gaussian prior ({PUBLISHED}); --prior all trains that one too"
    else:
        return ["--prior all trains the Gaussian prior too, to compare with"]
    gains = {prior: found["elbo"] - reference for prior, found in metrics.items() if prior != "gaussian"}
    return [
        f"{title(prior)}: {abs(gain):.2f} nats {'better' if gain > 0 else 'worse'} than {than}"
        for prior, gain in gains.items()
    ]
