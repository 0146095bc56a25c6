"""Types of arrays by their shapes, and of trees of arrays. Dimensions of one name have one size within a call."""

from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

Array: TypeAlias = jax.Array | np.ndarray
Images = Float[Array, "batch height width channels"]
Windows = Float[Array, "first height width last"]  # Images in any axis order that keeps H and W in the middle.
Kernel = Float[Array, "size size inputs outputs"]  # As many inputs as a group of channels has.
Vector = Float[Array, " channels"]
Logits = Float[Array, "batch classes"]
Labels = Int[Array, " batch"]
Features = dict[str, Array]  # {name in architecture.FEATURES: output}.

Batch = dict[str, Array]  # {column: its values}, like "images", "labels" and "mask".
Metrics = dict[str, Array]  # {name: a number}.

# Trees of any depth, which Python's types cannot describe; their leaves are arrays, or ShapeDtypeStruct without values.
Params = dict[str, Any]
Variables = dict[str, Any]  # {"params": Params, "batch_stats": a tree like it}, or a deployed network's {"params"}.
Tree = TypeVar("Tree")  # Any tree, which a function returns in the same form.
