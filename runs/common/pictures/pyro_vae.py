"""The pictures of runs/pyro_vae.py: how trainings went, what the VAEs make, and whether prior and posterior match."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from adapters.vae import VAE
from runs.common.devices import device_of, seeded
from runs.common.images import SHAPE, mosaic
from runs.common.pictures import figures
from runs.common.pictures.record import Record
from runs.common.progress import progress
from runs.common.samples import decoded_samples
from runs.common.scores import EVALUATION_SEED, draws_of_both
from runs.common.training_state import Fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 3_000  # draws shown of prior and posterior
GRID = 120  # cells of the prior's density along either axis
DENSITY_DRAWS = 20, 10_000  # of the prior, for its density: so many times so many
COMPARED = 12  # test images shown with their reconstructions
DRAWN = 49  # images that a column of priors.png shows


@dataclass
class PriorRecord:
    """What the pictures show of a VAE under one prior.

    Attributes:
        title: the prior's name.
        losses: pairs (step, mean negative ELBO since the last pair), where the training minimises just that.
        validation: pairs (step, negative ELBO of the validation images).
        elbo: of the test images, in nats per image.
        prior_match: how often a classifier tells draws of prior and aggregate posterior apart; 0.5 if they match.
        samples: means of p(x | z) at draws of the prior, ``(n, 28, 28)``.
        reconstructions: test images, then the means of p(x | z) with z a draw of q(z | x), ``(2, n, 28, 28)``.
        posterior, prior: draws of aggregate posterior and prior in a plane, ``(n, 2)``: z itself where that has one or
            two dimensions, its first two principal components under the aggregate posterior where it has more.
        labels: the classes of the images that the posterior's draws come from, ``(n,)``.
        density: the prior's in that plane on a grid over (−reach, reach)², row by row along the second axis: exact
            for two latent dimensions, from smoothed draws of the prior otherwise.
        reach: where the plane's picture ends.
        axes: the names of the plane's axes.
    """

    title: str
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    elbo: float
    prior_match: float
    samples: Tensor
    reconstructions: Tensor
    posterior: Tensor
    prior: Tensor
    labels: Tensor
    density: Tensor
    reach: float
    axes: tuple[str, str]

    @classmethod
    @torch.no_grad()
    def of(
        cls, title: str, vae: VAE, fitted: Fitted, metrics: dict[str, float], test: Tensor, labels: Tensor, seed: int
    ) -> Self:
        """What is to be shown of a VAE that is trained and scored.

        Args:
            title: the prior's name.
            vae: the model.
            fitted: how its training went.
            metrics: what the test set says.
            test: its images, ``(n, D)``.
            labels: their classes, ``(n,)``.
            seed: of the samples.
        """
        return cls(
            title=title,
            losses=fitted.losses,
            validation=fitted.validation,
            elbo=metrics["elbo"],
            prior_match=metrics["prior_match"],
            samples=decoded_samples(vae, seed),
            reconstructions=reconstruct(vae, test),
            labels=labels[:POINTS],
            **in_a_plane(vae, test),
        )

    def draw_match(self, path: Path) -> Path:
        """The aggregate posterior, and draws of the prior, each over the prior's density."""
        with figures.figure(path, 1, 2, size=(7.6, 3.9), sharex=True, sharey=True) as (drawing, axes):
            self.show_posterior(axes[0], "aggregate posterior, by class")
            self.show_prior(axes[1], "prior")
            drawing.supxlabel(self.axes[0], fontsize=9, color=figures.INK)
            drawing.supylabel(self.axes[1], fontsize=9, color=figures.INK)
            drawing.suptitle(
                f"over the prior's density; a classifier tells them apart in {100 * self.prior_match:.1f} % of cases "
                "(50 %: a match)",
                fontsize=9, color=figures.FAINT,
            )  # fmt: skip
        return path

    def draw_reconstructions(self, path: Path) -> Path:
        """Test images above what the VAE makes of them."""
        columns = self.reconstructions.shape[1]
        return figures.image_grid(path, self.reconstructions.flatten(0, 1).numpy(), columns, ["x", "p(x | z)"])

    def show_posterior(self, axes: "Axes", title: str) -> None:
        """Draws of the aggregate posterior, coloured by class, and each class's number near the middle of its draws."""
        self.show_density(axes, title)
        points, labels = self.posterior.numpy(), self.labels.numpy()
        axes.scatter(
            points[:, 0], points[:, 1], s=2.2, alpha=0.6, linewidths=0, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5
        )
        classes = np.unique(labels)
        middles = np.array([np.median(points[labels == label], axis=0) for label in classes])
        width, height = axes.get_window_extent().size / figures.STYLE["figure.dpi"]  # in inches
        distance = 2 * self.reach * 0.2 / min(width, height)  # a number is 0.15 inches high
        for label, middle, place in zip(classes, middles, kept_apart(middles, distance, self.reach), strict=True):
            if np.linalg.norm(place - middle) > distance / 2:
                axes.plot(*zip(middle, place, strict=True), color=figures.INK, linewidth=0.6)
            axes.text(place[0], place[1], str(label), **figures.OUTLINED)

    def show_prior(self, axes: "Axes", title: str) -> None:
        """Draws of the prior over its density."""
        self.show_density(axes, title)
        axes.scatter(self.prior[:, 0], self.prior[:, 1], s=2.2, alpha=0.6, linewidths=0, color=figures.ACCENT)

    def show_density(self, axes: "Axes", title: str) -> None:
        """The prior's density in grey."""
        ends = (-self.reach, self.reach)
        axes.imshow(
            self.density.numpy(), origin="lower", extent=(*ends, *ends), cmap="Greys", interpolation="bilinear",
            aspect="equal", vmin=0, vmax=1.6 * self.density.max().item(),
        )  # fmt: skip
        axes.set(xlim=ends, ylim=ends, title=title)


@dataclass
class VAERecord(Record):
    """What the pictures of a run show: a ``PriorRecord`` for each prior, by the name of its files."""

    priors: dict[str, PriorRecord]

    def __post_init__(self) -> None:
        # In a file there are only plain dictionaries.
        self.priors = {
            name: PriorRecord(**found) if isinstance(found, dict) else found for name, found in self.priors.items()
        }

    def draw(self, out: Path) -> list[Path]:
        pictures = [self.draw_training(out / "elbo.png")]
        for name, prior in self.priors.items():
            pictures += [
                figures.image_grid(out / f"samples-{name}.png", prior.samples.numpy(), columns=10),
                prior.draw_reconstructions(out / f"reconstructions-{name}.png"),
                prior.draw_match(out / f"match-{name}.png"),
            ]
        if len(self.priors) > 1:
            pictures.append(self.draw_priors(out / "priors.png"))
        return pictures

    def draw_training(self, path: Path) -> Path:
        """Training and validation ELBO, a curve for each prior."""
        with figures.figure(path, size=(6, 3.4)) as (_, axes):
            every = []
            for (line, colour), prior in zip(itertools.cycle(styles()), self.priors.values(), strict=False):
                steps, elbos = curve(prior.losses)
                axes.plot(steps, elbos, line, color=colour, alpha=0.3, linewidth=0.7)
                steps, elbos = curve(prior.validation)
                label = f"{prior.title}, test {prior.elbo:.1f}"
                axes.plot(steps, elbos, line, marker="o", color=colour, markersize=3, linewidth=1, label=label)
                every += elbos
            ends = [-prior.validation[-1][1] for prior in self.priors.values() if prior.validation]
            low, high = min([np.quantile(every, 0.15), *ends]), max(every)
            margin = 0.2 * (high - low) + 1
            figures.steps_axis(axes)
            axes.set(ylabel="ELBO (nats per image)", ylim=(low - margin, high + 1.5 * margin))
            axes.legend(title="validation (training faint)", loc="lower right")
        return path

    def draw_priors(self, path: Path) -> Path:
        """A column for each prior: aggregate posterior over its density, its own draws, and what they decode to."""
        columns = len(self.priors)
        rows = ("aggregate posterior", "draws of the prior", "p(x | z) at such draws")
        with figures.figure(path, 3, columns, size=(2.7 * columns + 0.5, 8.4), squeeze=False) as (_, axes):
            for column, prior in zip(axes.T, self.priors.values(), strict=True):
                prior.show_posterior(column[0], f"{prior.title}: ELBO {prior.elbo:.1f}")
                prior.show_prior(column[1], f"told apart: {100 * prior.prior_match:.0f} % (a match: 50 %)")
                for place in column[:2]:
                    place.set_xlabel(prior.axes[0], fontsize=7)
                    place.set_ylabel(prior.axes[1], fontsize=7)
                column[2].imshow(mosaic(prior.samples[:DRAWN].numpy(), 7), cmap="gray", vmin=0, vmax=1)
                column[2].set_axis_off()
            for first, label in zip(axes[:, 0], rows, strict=True):
                first.annotate(
                    label, (-0.34, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center",
                    color=figures.INK, fontsize=figures.LABEL,
                )  # fmt: skip
        return path


# What is shown


def reconstruct(vae: VAE, test: Tensor) -> Tensor:
    """Test images, evenly spaced in the set, and the means of p(x | z), z a draw of q(z | x): ``(2, n, 28, 28)``."""
    x = test[:: max(1, len(test) // COMPARED)][:COMPARED]
    device = device_of(vae)
    with seeded(EVALUATION_SEED, device):
        again = vae.decoder(vae.encoder(x.to(device)).sample()).mean.cpu()
    return torch.stack((x, again)).view(2, -1, *SHAPE)


def in_a_plane(vae: VAE, test: Tensor) -> dict[str, Any]:
    """Draws of prior and aggregate posterior, and the prior's density, in a plane: see ``PriorRecord``."""
    posterior, prior = draws_of_both(vae, test)
    latent = posterior.shape[1]
    centre, directions = torch.zeros(latent), torch.eye(latent)
    names = ("$z_1$", "$z_2$" if latent > 1 else "")
    if latent > 2:
        centre = posterior.mean(0)
        directions = torch.linalg.eigh(torch.cov((posterior - centre).T))[1].flip(1)
        names = ("first principal component", "second principal component")

    def project(z: Tensor) -> Tensor:
        flat = (z - centre) @ directions[:, :2]
        return nn.functional.pad(flat, (0, 2 - flat.shape[1]))

    posterior, prior = project(posterior[:POINTS]), project(prior[:POINTS])
    reach = 1.1 * np.quantile(torch.cat((posterior, prior)).abs().numpy(), 0.998).item()
    device = device_of(vae)
    if latent == 2:
        edge = (torch.arange(GRID) + 0.5) / GRID * 2 * reach - reach
        y, x = torch.meshgrid(edge, edge, indexing="ij")
        points = torch.stack((x.flatten(), y.flatten()), 1).to(device)
        density = vae.prior().log_prob(points).exp().view(GRID, GRID).cpu()
    else:
        times, draws = DENSITY_DRAWS
        parts = []
        with seeded(EVALUATION_SEED, device), progress(times * draws, "drawing from the prior", "draw") as bar:
            for _ in range(times):
                parts.append(project(vae.prior().sample((draws,)).cpu()))
                bar.update(draws)
        many = torch.cat(parts).numpy()
        counts = np.histogram2d(many[:, 1], many[:, 0], bins=GRID, range=[(-reach, reach)] * 2)[0]
        density = torch.from_numpy(smooth(counts))
    return {
        "posterior": posterior, "prior": prior, "density": density, "reach": reach, "axes": names,
    }  # fmt: skip


def smooth(values: np.ndarray, width: float = 1.6) -> np.ndarray:
    """Convolve with a Gaussian of so many cells, along both axes."""
    reach = np.arange(-int(4 * width), int(4 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    for axis in (0, 1):
        values = np.apply_along_axis(np.convolve, axis, values, kernel / kernel.sum(), mode="same")
    return values


def styles() -> list[tuple[str, str]]:
    """Line styles and colours of the priors' curves, in turn."""
    return list(itertools.product(("-", "--", ":", "-."), dict.fromkeys(figures.SERIES + figures.MANY)))


def curve(losses: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and ELBOs, from pairs (step, negative ELBO)."""
    return [step for step, _ in losses], [-loss for _, loss in losses]


def kept_apart(places: np.ndarray, distance: float, reach: float) -> np.ndarray:
    """The places ``(n, 2)``, moved as little as it takes for all to be so far from each other, within (−reach, reach)².

    Any two that are too close push each other away along the line between them, again and again.
    """
    turns = 2.4 * np.arange(len(places))[:, None]  # of places that coincide each moves in a direction of its own
    places = places + 1e-3 * distance * np.concatenate((np.cos(turns), np.sin(turns)), 1)
    for _ in range(200):
        gaps = places[:, None] - places
        lengths = np.linalg.norm(gaps, axis=2)
        np.fill_diagonal(lengths, np.inf)
        pushes = np.clip(1.02 * distance - lengths, 0, None) / 2
        places = places + (gaps * (pushes / lengths)[:, :, None]).sum(1)
        places = np.clip(places, distance / 2 - reach, reach - distance / 2)
        if not pushes.any():
            break
    return places
