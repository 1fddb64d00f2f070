"""Closed union of the objectives."""

from typing import Annotated

from pydantic import Field

from graftwork.training.objectives.cpo import CpoSpec
from graftwork.training.objectives.cpt import CptSpec
from graftwork.training.objectives.distill import DistillSpec
from graftwork.training.objectives.dpo import DpoSpec
from graftwork.training.objectives.fim import FimSpec
from graftwork.training.objectives.kto import KtoSpec
from graftwork.training.objectives.orpo import OrpoSpec
from graftwork.training.objectives.reward import RewardSpec
from graftwork.training.objectives.rl import RlSpec
from graftwork.training.objectives.sft import SftSpec

OnAnswers = DpoSpec | CpoSpec | OrpoSpec | KtoSpec | RewardSpec
"""Objectives on answers that are compared or labelled."""
ObjectiveSpec = Annotated[SftSpec | CptSpec | FimSpec | OnAnswers | RlSpec | DistillSpec, Field(discriminator="kind")]
