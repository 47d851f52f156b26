"""The transforms between a vector and a message. Knows only flat vectors."""

from fedjax_llm.compression.base import Compressor as Compressor
from fedjax_llm.compression.base import chain as chain
from fedjax_llm.compression.base import error_feedback as error_feedback
from fedjax_llm.compression.base import identity as identity
from fedjax_llm.compression.base import relative_to as relative_to
from fedjax_llm.compression.base import transmit as transmit
from fedjax_llm.compression.quantize import cast as cast
from fedjax_llm.compression.quantize import lloyd_max as lloyd_max
from fedjax_llm.compression.quantize import uniform as uniform
from fedjax_llm.compression.sparse import random_k as random_k
from fedjax_llm.compression.sparse import select as select
from fedjax_llm.compression.sparse import top_k as top_k
from fedjax_llm.compression.sparse import top_k_apart as top_k_apart
