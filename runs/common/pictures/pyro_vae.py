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
    from matplotlib.figure import Figure

POINTS = 3_000  # draws shown of prior and posterior
GRID = 120  # cells of the prior's density along either axis
POSTERIOR = "aggregate posterior: z of test images"
DENSITY_DRAWS = 10_000  # of the prior at once, for its density
COMPARED = 12  # test images shown with their reconstructions
DRAWN = 49  # images that a column of priors.png shows


@dataclass
class PriorRecord:
    """What the pictures show of a VAE under one prior.

    Attributes:
        title: the prior's name.
        losses: pairs (step, mean negative ELBO since the last pair), where the training minimises just that.
        validation: pairs (step, negative ELBO of the validation images).
        elbo, elbo_stderr: of the test images, in nats per image, and its standard error.
        prior_match, prior_match_stderr: how often a classifier tells draws of prior and aggregate posterior apart, and
            the standard error of that; 0.5 if they match.
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
    elbo_stderr: float
    prior_match: float
    prior_match_stderr: float
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
            **{name: metrics[name] for name in ("elbo", "elbo_stderr", "prior_match", "prior_match_stderr")},
            samples=decoded_samples(vae, seed),
            reconstructions=reconstruct(vae, test),
            labels=labels[:POINTS],
            **in_a_plane(vae, test),
        )

    def draw_match(self, path: Path) -> Path:
        """The aggregate posterior, and draws of the prior, each over the prior's density."""
        with figures.figure(path, 1, 2, size=(7.6, 4.6), sharex=True, sharey=True) as (drawing, axes):
            drawing.get_layout_engine().set(h_pad=0.07)  # or what stands above and below touches the panels' words
            self.show_posterior(axes[0], POSTERIOR)
            self.show_prior(axes[1], f"{self.title} prior: draws of it")
            axes[0].set_ylabel(self.axes[1])
            for place in axes:
                place.set_xlabel(self.axes[0])
            legend_of_classes(drawing)
            drawing.supxlabel(
                f"Grey: the prior's density. A classifier tells the draws apart in {self.told_apart} of cases.\n"
                "At 50 % it can only guess: prior and posterior match.",
                fontsize=8, color=figures.FAINT,
            )  # fmt: skip
        return path

    def draw_reconstructions(self, path: Path) -> Path:
        """Test images above what the VAE makes of them."""
        columns = self.reconstructions.shape[1]
        return figures.image_grid(path, self.reconstructions.flatten(0, 1).numpy(), columns, ["x", "p(x | z)"])

    @property
    def told_apart(self) -> str:
        """How often the classifier is right, in words."""
        return f"{100 * self.prior_match:.1f} ± {100 * self.prior_match_stderr:.1f} %"

    def show_posterior(self, axes: "Axes", title: str) -> None:
        """Draws of the aggregate posterior, coloured by the class of their image."""
        self.show_density(axes, title)
        colours = [figures.CLASSES[label] for label in self.labels.tolist()]
        axes.scatter(self.posterior[:, 0], self.posterior[:, 1], s=4, alpha=0.7, linewidths=0, c=colours)

    def show_prior(self, axes: "Axes", title: str) -> None:
        """Draws of the prior over its density."""
        self.show_density(axes, title)
        axes.scatter(self.prior[:, 0], self.prior[:, 1], s=3, alpha=0.6, linewidths=0, color=figures.ACCENT)

    def show_density(self, axes: "Axes", title: str) -> None:
        """The prior's density in grey."""
        ends = (-self.reach, self.reach)
        axes.imshow(
            self.density.numpy(), origin="lower", extent=(*ends, *ends), cmap="Greys", interpolation="bilinear",
            aspect="equal", vmin=0, vmax=2 * self.density.max().item(),
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
                label = f"{prior.title}, test {figures.signed(prior.elbo)} ± {prior.elbo_stderr:.1f}"
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
        second = next(iter(self.priors.values())).axes[1]  # of all alike
        rows = (POSTERIOR, "draws of the prior", "images decoded from such draws")
        with figures.figure(path, 3, columns, size=(2.7 * columns + 0.6, 9.2), squeeze=False) as (drawing, axes):
            for column, prior in zip(axes.T, self.priors.values(), strict=True):
                elbo = f"{figures.signed(prior.elbo)} ± {prior.elbo_stderr:.1f}"
                prior.show_posterior(column[0], f"{prior.title} prior\ntest ELBO {elbo} nats")
                prior.show_prior(column[1], f"told apart: {prior.told_apart}")
                for place in column[:2]:
                    place.set_xlabel(prior.axes[0], fontsize=8)
                column[2].imshow(mosaic(prior.samples[:DRAWN].numpy(), 7), cmap="gray", vmin=0, vmax=1)
                column[2].set_axis_off()
            for first, name, label in zip(axes[:, 0], (second, second, ""), rows, strict=True):
                first.set_ylabel(name, fontsize=8)
                first.annotate(
                    label, (-0.34, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center",
                    color=figures.INK, fontsize=figures.LABEL,
                )  # fmt: skip
            legend_of_classes(drawing)
            drawing.supxlabel(
                "Grey: the prior's density. Told apart: how often a classifier says rightly whether z was drawn from "
                "the prior or\nfrom the aggregate posterior. At 50 % it can only guess: the two match.",
                fontsize=9, color=figures.FAINT,
            )  # fmt: skip
        return path


def legend_of_classes(drawing: "Figure") -> None:
    """The colour of each class, in a row above the axes."""
    from matplotlib.lines import Line2D

    spots = [Line2D([], [], color=colour, marker="o", linewidth=0, markersize=6) for colour in figures.CLASSES]
    names = list(map(str, range(len(spots))))
    title = "class of the image that a draw of the posterior belongs to"
    options: dict[str, Any] = {"ncols": len(spots), "columnspacing": 0.8, "handletextpad": 0.1, "title": title}
    drawing.legend(spots, names, loc="outside upper center", **options)


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
        times = min(20, max(5, len(test) // 500))  # so that few test images are shown quickly
        parts = []
        with seeded(EVALUATION_SEED, device), progress(times * DENSITY_DRAWS, "drawing from the prior", "draw") as bar:
            for _ in range(times):
                parts.append(project(vae.prior().sample((DENSITY_DRAWS,)).cpu()))
                bar.update(DENSITY_DRAWS)
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
