import os
import signal
import threading

import pytest

from fedjax_llm.experiments import interrupts


# As `python ... &` in a script is started: with SIGINT ignored.
@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def before(request):
  original = signal.signal(signal.SIGINT, request.param)
  yield request.param
  signal.signal(signal.SIGINT, original)


def test_the_first_is_noted_and_the_second_stops(before, capfd):
  with pytest.raises(KeyboardInterrupt):
    with interrupts.Interrupt() as interrupt:
      assert not interrupt.asked
      os.kill(os.getpid(), signal.SIGINT)
      assert interrupt.asked
      assert "Ctrl-C again stops at once" in capfd.readouterr().err
      os.kill(os.getpid(), signal.SIGINT)


def test_what_handled_it_before_does_so_after(before):
  with interrupts.Interrupt():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before


def test_other_threads_get_no_signals():
  seen = []

  def work():
    with interrupts.Interrupt() as interrupt:
      seen.append(interrupt.asked)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [False]
