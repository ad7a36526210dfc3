"""What the Linen and the NNX modules share; imports neither flax.linen nor flax.nnx."""
