"""DoRA (arXiv 2402.09353): each output channel of `W + scaling * B A` has a trained length, its magnitude.

The channel's own length is computed once at load, so that decoding multiplies each channel by `magnitude / length`;
peft computes it at every forward pass. Cost of the load: one product [out, rank] x [rank, in] and a norm per linear.
"""

import torch
from torch.nn.functional import linear

from graftwork.serving.engine.adapters.changes import SiteScale, SiteWeights

MAGNITUDE_KEY = "lora_magnitude_vector"


def rescaled(
    site: SiteWeights, magnitude_O: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> tuple[SiteWeights, SiteScale]:
    """The LoRA part, lora_B multiplied by the channel's scale, and the scale itself. weight_OI: the base's, fp32."""
    a_RI, b_OR = (half.float().to(weight_OI.device) for half in (site.a_RI, site.b_OR))
    delta_OI = linear(a_RI.t(), b_OR).t()  # peft's product, without its unit matrix
    length_O = torch.linalg.norm(weight_OI + site.scaling * delta_OI, dim=1).to(magnitude_O.device)
    scale_O = magnitude_O / length_O
    folded = SiteWeights(site.a_RI, (scale_O[:, None] * site.b_OR.float()).to(site.b_OR.dtype), site.scaling)
    return folded, SiteScale(output_O=scale_O, bias_O=bias_O, dora=site)
