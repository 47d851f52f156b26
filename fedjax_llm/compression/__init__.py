"""Compression: how a flat vector becomes a message and a vector again."""

from fedjax_llm.compression import sparse as sparse
from fedjax_llm.compression import wire as wire
from fedjax_llm.compression.base import Compressor as Compressor
from fedjax_llm.compression.base import Dense as Dense
from fedjax_llm.compression.base import chain as chain
from fedjax_llm.compression.base import error_feedback as error_feedback
from fedjax_llm.compression.base import identity as identity
from fedjax_llm.compression.base import relative_to as relative_to
from fedjax_llm.compression.base import stateless as stateless
from fedjax_llm.compression.base import transmit as transmit
from fedjax_llm.compression.grouped import top_k_per_group as top_k_per_group
from fedjax_llm.compression.levels import qsgd as qsgd
from fedjax_llm.compression.levels import sign as sign
from fedjax_llm.compression.levels import (
  stochastic_uniform as stochastic_uniform,
)
from fedjax_llm.compression.levels import tern_grad as tern_grad
from fedjax_llm.compression.lowrank import power_sgd as power_sgd
from fedjax_llm.compression.published import (
  deep_gradient_compression as deep_gradient_compression,
)
from fedjax_llm.compression.published import drive as drive
from fedjax_llm.compression.published import eden as eden
from fedjax_llm.compression.published import ef_sign_sgd as ef_sign_sgd
from fedjax_llm.compression.published import stc as stc
from fedjax_llm.compression.quantize import cast as cast
from fedjax_llm.compression.quantize import lloyd_max as lloyd_max
from fedjax_llm.compression.quantize import natural as natural
from fedjax_llm.compression.rotation import rotate as rotate
from fedjax_llm.compression.sketch import count_sketch as count_sketch
from fedjax_llm.compression.sparse import random_k as random_k
from fedjax_llm.compression.sparse import select as select
from fedjax_llm.compression.sparse import top_k as top_k
from fedjax_llm.compression.trellises import trellis as trellis
from fedjax_llm.compression.wire import message as message
