"""Data sets, templates, partitions, rows of tokens and cohorts."""

from fedjax_llm.data import corpora as corpora
from fedjax_llm.data import partition as partition
from fedjax_llm.data import records as records
from fedjax_llm.data import sources as sources
from fedjax_llm.data import templates as templates
