"""Published methods by name: branches, placement, training and calibrator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ee_surgery.branches import BRANCHES, BranchSpec
from ee_surgery.branches.base import Option, grid
from ee_surgery.checks import renamed
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.placement import ExitPlan, place
from ee_surgery.registry import Registry
from ee_surgery.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published method. `augment(model, preset="sdn")` uses it; other arguments override it."""

    paper: str
    """Authors, venue, arXiv id."""
    branch: BranchSpec
    """If the features are not a map (texts, non-square token grids), `token` replaces branches that need one."""
    exits: int | str
    """Number of exits, fewer if the model has no room; or `all`."""
    placement: str
    config: TrainConfig
    """The published training, which is long. `dataclasses.replace(preset.config, epochs=5)` shortens it."""
    method: str
    """A name in `CALIBRATORS`: the calibrator that chooses thresholds."""
    joint: bool = False
    """Whether the paper also trains the original. A preset does so only with `joint=True`."""
    token_options: Mapping[str, Option] = field(default_factory=dict)
    """Options of the `token` replacement."""

    def plan(self, graph: ModelGraph) -> ExitPlan:
        """The paper's placement of exits on this model."""
        return place(graph, self.exits, self.placement, clip=True)

    def branches(self, points: Sequence[ExitPoint]) -> list[BranchSpec]:
        """The branch of each exit point."""
        stand_in = replace(self.branch, name="token", options=self.token_options)
        anywhere = self.branch.name == "auto" or BRANCHES[self.branch.name].any_layout
        return [self.branch if anywhere or grid(point) is not None else stand_in for point in points]

    @property
    def policy(self) -> str:
        """Old name of `method`."""
        return renamed("Preset.policy", self.method, "Preset.method", "")


PRESETS: Registry[Preset] = Registry("preset", "ee_surgery.presets")


def _adam(**settings: object) -> TrainConfig:
    """Adam at a constant rate, without warmup, clipping or distillation, as in most of the papers."""
    plain = TrainConfig(optimizer="adam", lr=1e-3, schedule="constant", warmup=0, clip_grad=None, distill=0)
    return replace(plain, **settings)


def _sgd(**settings: object) -> TrainConfig:
    """SGD with momentum 0.9; the rate is divided by ten at milestones."""
    return _adam(optimizer="sgd", schedule="step", **settings)


PRESETS.register("pteenet")(
    Preset(
        paper="PTEENet: Lahiany & Aperstein, IEEE Access 2022, arXiv:2501.02508",
        branch=BranchSpec("conv2", confidence=True),
        exits=10,
        placement="fine",
        config=_adam(objective="cumulative", cost_weight=0.9, epochs=30),
        method="learned",
    )
)
PRESETS.register("eenet")(
    Preset(
        paper="EENet: Ilhan et al., WACV 2024, arXiv:2301.07099",
        branch=BranchSpec("eenet"),
        exits=2,
        placement="linear",
        config=_sgd(
            objective="weighted_ce",
            exit_weights="linear",
            distill=0.02,  # 1/100 of the published sum of the weights, which is 1/2
            distill_from=0.75,
            temperature=3.0,
            lr=0.1,
            weight_decay=5e-4,
            epochs=150,
            milestones=(1 / 3, 2 / 3),
        ),
        method="eenet",
        joint=True,
    )
)
PRESETS.register("cascade")(
    Preset(
        paper="Cascaded inference by softmax confidence: Berestizshevsky & Even, ICANN 2019, arXiv:1805.10982",
        branch=BranchSpec("mlp"),
        exits=2,
        placement="linear",
        config=_sgd(objective="sum_ce", lr=0.005, epochs=20, milestones=(0.5,)),
        method="cascade",
        token_options={"hidden": 64},
    )
)
PRESETS.register("eenets")(
    Preset(
        paper="EENets: Demir & Akbas, arXiv:2409.05336",
        branch=BranchSpec("pool", confidence=True),
        exits=10,
        placement="fine",
        config=_adam(objective="cumulative", cost_weight=1.0, epochs=150, batch_size=32),
        method="learned",
        joint=True,
    )
)
PRESETS.register("sdn")(
    Preset(
        paper="Shallow-Deep Networks: Kaya et al., ICML 2019, arXiv:1810.07052",
        branch=BranchSpec("sdn"),
        exits=6,
        placement="linear",
        config=_adam(objective="sum_ce", epochs=25, schedule="step", milestones=(0.6,)),
        method="most_confident",
    )
)
PRESETS.register("ztw")(
    Preset(
        paper="Zero Time Waste: Wolczyk et al., NeurIPS 2021",
        branch=BranchSpec("ztw"),
        exits="all",
        placement="linear",
        config=_adam(objective="sum_ce", epochs=50, schedule="step", milestones=(0.3,)),
        method="shared",
    )
)
PRESETS.register("branchynet")(
    Preset(
        paper="BranchyNet: Teerapittayanon et al., ICPR 2016, arXiv:1709.01686",
        branch=BranchSpec("branchy"),
        exits=2,
        placement="linear",
        config=_adam(objective="weighted_ce", exit_weights="falling", epochs=100, batch_size=64, weight_decay=0.0),
        method="entropy",
        joint=True,
    )
)
PRESETS.register("msdnet")(
    Preset(
        paper="MSDNet: Huang et al., ICLR 2018, arXiv:1703.09844",
        branch=BranchSpec("msd"),
        exits=4,
        placement="linear",
        config=_sgd(objective="sum_ce", lr=0.1, epochs=300, batch_size=64),
        method="geometric",
        joint=True,
    )
)
