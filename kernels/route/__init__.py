"""The routing loss: gists learn to be found where attention over raw tokens looks (docs/method.md#training-the-routing)."""

from unfold.kernels.route.measure import ChunkMass, chunk_mass
from unfold.kernels.route.op import prepare_routing, routing_loss
from unfold.kernels.route.queries import Routed

__all__ = ["ChunkMass", "Routed", "chunk_mass", "prepare_routing", "routing_loss"]
