"""What all networks of the family share: channel tables, units, wirings and the names of their parts.

The channels are those of table 5 of Ma et al. (ECCV 2018). Nothing here needs JAX.
"""

from typing import Literal, get_args

CHANNELS = {  # width: output channels of stage2, stage3, stage4, conv5
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
STEM_CHANNELS = 24
UNITS = {"stage2": 4, "stage3": 8, "stage4": 4}

Layout = Literal["torchvision", "megvii"]  # How units are wired; "megvii" is the authors' own release.
LAYOUTS = get_args(Layout)
LAYERS = ("conv1", *UNITS, "conv5")  # The backbone, as parameter paths name it.
FEATURES = ("stem", *UNITS, "conv5", "pooled")  # The outputs that a network returns beside its logits.
