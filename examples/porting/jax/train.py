"""A model of two sublayers in JAX: 20 steps of Adam through the kernels of a bundle, on the CPU.

python examples/porting/jax/train.py bundle build/libmhc_jax.so

Tokens are counted off around a circle of 32, from a random start; the model learns to say which comes next.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from mhc_jax import Sublayer

VOCABULARY, BATCH, CONTEXT, SUBLAYERS = 32, 4, 16, 2


def initial(mhc: Sublayer, key: jax.Array) -> dict:
    """All parameters, in float32."""
    size, rows = mhc.hidden_size, mhc.rows
    keys = iter(jax.random.split(key, 2 + 3 * SUBLAYERS))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-1] ** -0.5

    sublayers = [
        {
            "phi": normal(rows, mhc.num_streams * size),
            "alpha": jnp.full(3, 0.01),
            "bias": jnp.zeros(rows),
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


def train(mhc: Sublayer, steps: int = 20, rate: float = 2e-3) -> list[float]:
    """The loss before each step."""
    parameters = initial(mhc, jax.random.key(0))
    moments = [jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)]

    @jax.jit
    def step(parameters: dict, moments: list, number: jax.Array, start: jax.Array) -> tuple:
        tokens = (start[:, None] + jnp.arange(CONTEXT + 1)) % VOCABULARY
        value, gradient = jax.value_and_grad(lambda p: loss(mhc, p, tokens))(parameters)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, moments[1], gradient)
        mean_scale, square_scale = 1 / (1 - 0.9**number), 1 / (1 - 0.99**number)
        parameters = jax.tree.map(
            lambda p, m, s: p - rate * m * mean_scale / (jnp.sqrt(s * square_scale) + 1e-8), parameters, mean, square
        )
        return value, parameters, [mean, square]

    losses = []
    for number in range(1, steps + 1):
        start = jax.random.randint(jax.random.key(number), (BATCH,), 0, VOCABULARY)
        value, parameters, moments = step(parameters, moments, jnp.float32(number), start)
        losses.append(float(value))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", help="what mhc-tilelang export wrote")
    parser.add_argument("library", help="what CMakeLists.txt built from it")
    arguments = parser.parse_args()
    for number, value in enumerate(train(Sublayer(arguments.bundle, arguments.library)), 1):
        print(f"step {number:2}  loss {value:.4f}")


if __name__ == "__main__":
    main()
