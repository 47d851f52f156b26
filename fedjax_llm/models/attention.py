"""Attention within documents: masks, positions, and a cache of what was seen.

`segments` [batch, time] is the one way to say what belongs together: 0 is
padding, on either side, and tokens of equal numbers are one document. Positions
start at 0 in each document. None means one document without padding on the
left; a causal model is not touched by padding on the right.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
  """Keys and values of the tokens so far, of all layers.

  Attributes:
    keys: [layers, batch, length, heads, head_dim].
    values: of the same shape.
    segments: int32 [batch, length]; 0 for padding and for what is yet to come.
    used: int32 scalar, how many of the slots are filled.
  """

  keys: Any
  values: Any
  segments: Any
  used: Any


def empty_cache(
  layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: Any
) -> Cache:
  """A cache that holds nothing yet, for `length` tokens a row."""
  shape = (layers, batch, length, heads, head_dim)
  return Cache(
    jnp.zeros(shape, dtype),
    jnp.zeros(shape, dtype),
    jnp.zeros((batch, length), jnp.int32),
    jnp.zeros((), jnp.int32),
  )


class Scope(NamedTuple):
  """Where the tokens of a call stand, and what each of them may attend to.

  Attributes:
    positions: int32 [rows, time], `rows` being 1 where all rows agree.
    segments: int32 [batch, keys] of the keys, or None.
    slots: int32 [time], the places of the queries among the keys.
    keys: how many keys there are.
  """

  positions: Any
  segments: Any
  slots: Any
  keys: int

  def masks(
    self, windows: Sequence[int | None], *, causal: bool = True
  ) -> list[Bool[Array, "rows 1 time keys"] | None]:
    """Which keys each query sees, for each of `windows`.

    Args:
      windows: how many of the last keys are seen, the query's own included;
        None for all.
      causal: whether keys after the query are hidden.

    Returns:
      The masks; None in place of all of them where plain (causal) attention is
      the same.
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
  """Places the tokens of a call [batch, time] in their documents.

  Args:
    shape: (batch, time).
    segments: see above.
    cache: of the tokens before these; a cache holds one document a row.

  Returns:
    The scope, and the cache with these tokens' segments in it.
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
  """Writes keys and values into one layer's cache, if there is one.

  Args:
    past: (keys, values) of the layer, or None.
    key: [batch, time, heads, head_dim].
    value: of the same shape.
    slots: int32 [time], where they belong.

  Returns:
    What to attend to: keys, values.
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
  """Multi-head attention; query heads share key heads in equal groups.

  Args:
    query: what asks.
    key: what is asked.
    value: what is answered with.
    mask: which keys a query sees; None for all, or all that are not after it.
    causal: read where `mask` is None.
    scale: of the products; 1 / sqrt(head_dim) if None.
    softcap: bounds the logits by `softcap * tanh(logits / softcap)` (Gemma 2).
  """
  attend_fn = functools.partial(
    jax.nn.dot_product_attention, is_causal=causal and mask is None, scale=scale
  )
  if softcap is not None:
    if mask is None:
      mask = jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)
      mask = jnp.tril(mask) if causal else mask
    attend_fn = functools.partial(_capped, scale=scale, softcap=softcap)
  # The backward pass computes the [time, time] probabilities again: it costs
  # no time that could be measured, and to keep those of all layers memory.
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
