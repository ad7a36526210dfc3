"""The two networks; their normalization layer can be exchanged or left out."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxbn.linen import BatchNorm

# Called with `use_running_average`; None leaves the layer out.
Norm = Callable[..., Callable[[jax.Array], jax.Array]] | None


def norm_layer(name: str) -> Norm:
    """Return the layer that `--norm` names.

    With momentum 0.9 the running statistics are those of the last 10 batches or so:
    a run has a few hundred, and the weights move quickly.
    """
    layer = {"none": None, "flax": nn.BatchNorm, "jaxbn": BatchNorm}[name]
    return None if layer is None else functools.partial(layer, momentum=0.9)


def normalized(x: jax.Array, norm: Norm, train: bool) -> jax.Array:
    """Apply a new norm layer to x, with batch statistics if `train`."""
    return x if norm is None else norm(use_running_average=not train)(x)


class ResidualBlock(nn.Module):
    """relu(x + f(x)), where f is two convolutions with a norm after each."""

    features: int
    norm: Norm
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the network, with batch statistics if `train`."""
        # What the norm's mean takes away needs no bias before it.
        conv = functools.partial(nn.Conv, self.features, use_bias=self.norm is None)
        y = conv((3, 3), strides=self.stride, name="first")(x)
        y = nn.relu(normalized(y, self.norm, train))
        y = normalized(conv((3, 3), name="second")(y), self.norm, train)
        if x.shape != y.shape:
            x = conv((1, 1), strides=self.stride, name="shortcut")(x)
            x = normalized(x, self.norm, train)
        return nn.relu(x + y)


class CNN(nn.Module):
    """A small residual network: (examples, side, side, 1) -> (examples, 10) logits."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the network, with batch statistics if `train`."""
        x = nn.Conv(16, (3, 3), use_bias=self.norm is None)(x)
        x = nn.relu(normalized(x, self.norm, train))
        x = ResidualBlock(16, self.norm)(x, train=train)
        x = ResidualBlock(32, self.norm, stride=2)(x, train=train)
        return nn.Dense(10)(x.mean((1, 2)))


class MLP(nn.Module):
    """Three hidden layers of 100 sigmoids: images -> (examples, 10) logits.

    The network of Ioffe & Szegedy (2015), section 4.1. The paper does not say how
    small the first weights are: 0.1 keeps the variance of 100 inputs, and with a tenth
    of that the plain network hardly learns at all.
    """

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the network, with batch statistics if `train`."""
        small = nn.initializers.normal(0.1)
        x = x.reshape(len(x), -1)
        for _ in range(3):
            x = nn.Dense(100, use_bias=self.norm is None, kernel_init=small)(x)
            x = nn.sigmoid(normalized(x, self.norm, train))
        return nn.Dense(10, kernel_init=small)(x)


def create(model: str, norm: str) -> Any:
    """Return the network that `--model` and `--norm` name."""
    return {"cnn": CNN, "mlp": MLP}[model](norm=norm_layer(norm))
