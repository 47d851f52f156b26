"""A Ctrl-C handler that lets a run finish its round."""

import os
import signal
import threading


class Interrupt:
  """A context manager that notes the first SIGINT; a second one stops at once.

  `asked` is True after the first one. Python handles signals only in the main
  thread, so a run in another thread is not interrupted.
  """

  asked = False

  def __enter__(self):
    self._main = threading.current_thread() is threading.main_thread()
    if self._main:
      self._previous = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *error):
    if self._main:
      signal.signal(signal.SIGINT, self._previous)

  def _note(self, *_):
    self.asked = True
    # A process that a script starts in the background ignores SIGINT.
    ignored = self._previous == signal.SIG_IGN
    handler = signal.default_int_handler if ignored else self._previous
    signal.signal(signal.SIGINT, handler)
    # Not `print`: the signal may have come in the middle of a `print`.
    os.write(2, b"\nFinishing the round; Ctrl-C again stops at once.\n")
