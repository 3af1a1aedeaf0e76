"""A model of two sublayers in JAX: 20 steps of gradient descent through the kernels of a bundle, on the CPU.

python examples/porting/jax/train.py bundle build/jax/libmhc_jax.so

Tokens are counted off around a circle of 32, from a random start; the model learns to say which comes next.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from mhc_jax import Sublayer

VOCABULARY, BATCH, CONTEXT, SUBLAYERS = 32, 4, 16, 2


def initial(mhc: Sublayer, random: np.random.Generator) -> dict:
    """All parameters, in float32."""
    size, rows = mhc.hidden_size, mhc.rows

    def normal(*shape: int) -> np.ndarray:
        return random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    sublayers = [
        {
            "phi": normal(rows, mhc.num_streams * size),
            "alpha": np.full(3, 0.01, np.float32),
            "bias": np.zeros(rows, np.float32),
            "up": normal(4 * size, size),
            "down": normal(size, 4 * size),
        }
        for _ in range(SUBLAYERS)
    ]
    return {"embedding": normal(VOCABULARY, size), "sublayers": sublayers, "unembedding": normal(VOCABULARY, size)}


def loss(mhc: Sublayer, parameters: dict, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next tokens; tokens [batch, context + 1]."""
    h = parameters["embedding"][tokens[:, :-1]].astype(mhc.dtype)
    x = jnp.repeat(h[..., None, :], mhc.num_streams, axis=-2)
    for layer in parameters["sublayers"]:
        layer_input, h_post, h_res = mhc.pre(x, layer["phi"], layer["alpha"], layer["bias"])
        hidden = jax.nn.gelu(layer_input @ layer["up"].T.astype(mhc.dtype))
        x = mhc.post(x, hidden @ layer["down"].T.astype(mhc.dtype), h_post, h_res)
    logits = x.astype(jnp.float32).sum(-2) @ parameters["unembedding"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


def train(mhc: Sublayer, steps: int = 20, rate: float = 0.03) -> list[float]:
    """The loss before each step."""
    random = np.random.default_rng(0)
    parameters = initial(mhc, random)
    momentum = jax.tree.map(np.zeros_like, parameters)

    @jax.jit
    def step(parameters: dict, momentum: dict, tokens: jax.Array) -> tuple:
        value, gradient = jax.value_and_grad(lambda p: loss(mhc, p, tokens))(parameters)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
        return value, jax.tree.map(lambda p, m: p - rate * m, parameters, momentum), momentum

    losses = []
    for _ in range(steps):
        tokens = (random.integers(VOCABULARY, size=(BATCH, 1)) + np.arange(CONTEXT + 1)) % VOCABULARY
        value, parameters, momentum = step(parameters, momentum, tokens)
        losses.append(float(value))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", help="a bundle of mhc-tilelang export")
    parser.add_argument("library", help="the library that CMakeLists.txt builds from it")
    arguments = parser.parse_args()
    for number, value in enumerate(train(Sublayer(arguments.bundle, arguments.library)), 1):
        print(f"step {number:2}  loss {value:.4f}")


if __name__ == "__main__":
    main()
