"""Attention within documents: masks, positions, and a cache of past tokens.

`segments` [batch, time] assigns tokens to documents. Tokens with the same
number form one document; 0 marks padding, on either side. Positions start at 0
in each document. None means that each row is one document without padding. In
a causal model, padding on the right needs no segments: no token before it
attends to it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
  """The keys and values of past tokens, for all layers.

  Attributes:
    keys: the keys, [layers, batch, length, heads, head_dim].
    values: the values, of the same shape.
    segments: int32 [batch, length]; 0 for padding and for unused slots.
    used: int32 scalar, the number of used slots.
  """

  keys: Any
  values: Any
  segments: Any
  used: Any


def empty_cache(shape: tuple[int, int, int, int, int], dtype: Any) -> Cache:
  """Returns an empty cache.

  Args:
    shape: the shape of the keys, (layers, batch, length, heads, head_dim).
    dtype: the type of the keys and values.
  """
  return Cache(
    jnp.zeros(shape, dtype),
    jnp.zeros(shape, dtype),
    jnp.zeros(shape[1:3], jnp.int32),
    jnp.zeros((), jnp.int32),
  )


class Scope(NamedTuple):
  """The positions of the tokens of a call, and the keys they may attend to.

  Attributes:
    positions: int32 [rows, time], where `rows` is `batch`, or 1 if all rows
      have the same positions.
    segments: int32 [batch, keys], the documents of the keys, or None.
    slots: int32 [time], the index of each query among the keys.
    keys: the number of keys.
  """

  positions: Any
  segments: Any
  slots: Any
  keys: int

  def masks(
    self, windows: Sequence[int | None], *, causal: bool = True
  ) -> list[Bool[Array, "rows 1 time keys"] | None]:
    """Returns a mask for each window: True where a query may see a key.

    Args:
      windows: for each mask, the largest number of keys that a query sees,
        counting its own key and the keys before it. None for no limit.
      causal: whether keys after the query are hidden.

    Returns:
      The masks. All are None if attention without a mask gives the same result.
    """
    shortest = min((x for x in windows if x is not None), default=self.keys)
    if self.segments is None and self.keys <= shortest:
      return [None for _ in windows]
    queries, keys = self.slots[:, None], np.arange(self.keys)[None]
    order = keys <= queries if causal else keys >= 0 * queries
    masks = []
    for window in windows:
      seen = order if window is None else order & (queries - keys < window)
      seen = jnp.asarray(seen)[None, None]
      if self.segments is not None:
        own = jnp.take(self.segments, self.slots, axis=1)[:, None, :, None]
        seen = seen & (own == self.segments[:, None, None, :])
      masks.append(seen)
    return masks


def scope(
  shape: tuple[int, ...],
  segments: Int[Array, "batch time"] | None,
  cache: Cache | None = None,
) -> tuple[Scope, Cache | None]:
  """Computes each token's position in its document, and the keys it may see.

  Args:
    shape: the shape of the tokens, (batch, time).
    segments: the documents of the tokens; see the docstring of this module.
    cache: the cache of the earlier tokens, or None. In a cache, each row is one
      document.

  Returns:
    The scope; and the cache with the new segments, or None without a cache.
  """
  batch, time = shape
  if cache is None:
    slots = np.arange(time)
    if segments is None:
      return Scope(jnp.asarray(slots)[None], None, slots, time), None
    starts = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(starts, slots[None], 0), axis=1)
    return Scope(slots[None] - start, segments, slots, time), None
  if segments is None:
    segments = jnp.ones((batch, time), jnp.int32)
  slots = cache.used + jnp.arange(time)
  segments = jax.lax.dynamic_update_slice(
    cache.segments, segments.astype(jnp.int32), (0, cache.used)
  )
  count = jnp.cumsum(segments > 0, axis=1) - 1
  positions = jnp.maximum(jnp.take(count, slots, axis=1), 0)
  cache = cache._replace(segments=segments, used=cache.used + time)
  return Scope(positions, segments, slots, segments.shape[1]), cache


def remember(past, key, value, slots):
  """Writes keys and values into the cache of one layer, if there is one.

  Args:
    past: the cached (keys, values) of the layer, or None.
    key: the new keys, [batch, time, heads, head_dim].
    value: the new values, of the same shape.
    slots: int32 [time], the index of each new key in the cache.

  Returns:
    The keys and values to attend to: the updated cache. Without a cache, the
    new keys and values.
  """
  if past is None:
    return key, value
  return tuple(
    jax.lax.dynamic_update_slice(
      old, new.astype(old.dtype), (0, slots[0], 0, 0)
    )
    for old, new in zip(past, (key, value), strict=True)
  )


def attend(
  query: Float[Array, "batch time heads head_dim"],
  key: Float[Array, "batch keys key_heads head_dim"],
  value: Float[Array, "batch keys key_heads head_dim"],
  mask: Bool[Array, "rows 1 time keys"] | None,
  *,
  causal: bool = True,
  scale: float | None = None,
  softcap: float | None = None,
) -> Float[Array, "batch time heads head_dim"]:
  """Computes multi-head attention; query heads share key heads in equal groups.

  Args:
    query: the queries.
    key: the keys.
    value: the values.
    mask: True where a query sees a key; None for no mask.
    causal: whether keys after the query are hidden; ignored if there is a mask.
    scale: the factor of the logits; None for 1 / sqrt(head_dim).
    softcap: the bound of the logits, applied as
      `softcap * tanh(logits / softcap)` (Gemma 2); None for no bound.
  """
  attend_fn = functools.partial(
    jax.nn.dot_product_attention, is_causal=causal and mask is None, scale=scale
  )
  if softcap is not None:
    if mask is None:
      mask = jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)
      mask = jnp.tril(mask) if causal else mask
    attend_fn = functools.partial(_capped, scale=scale, softcap=softcap)
  # The backward pass recomputes the [time, time] probabilities, so that memory
  # need not hold those of all layers. This takes no measurable extra time.
  call = lambda query, key, value: attend_fn(query, key, value, mask=mask)
  return jax.checkpoint(call, prevent_cse=False)(query, key, value)


def _capped(query, key, value, *, mask, scale, softcap):
  batch, time, heads, width = query.shape
  groups = key.shape[2]
  query = query.reshape(batch, time, groups, heads // groups, width)
  logits = jnp.einsum(
    "btghd,bsgd->bghts", query, key, preferred_element_type=jnp.float32
  )
  logits = softcap * jnp.tanh(logits * (scale or width**-0.5) / softcap)
  logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  y = jnp.einsum("bghts,bsgd->btghd", weights, value)
  return y.reshape(batch, time, heads, width)
