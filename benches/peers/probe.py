"""The session's only process: notes when it could not run, so that a pause is seen from inside, whoever makes it.

    probe.py GAPS     appends "START END" (seconds of CLOCK_MONOTONIC) to GAPS for every sleep of 10 ms that took over 50 ms

GAPS lies on a tmpfs of the container, so that noting changes nothing that is saved.
"""
import signal
import sys
import time

# As the first process of its namespace it would ignore the signal, and engines wait ten seconds then.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

with open(sys.argv[1], "w", buffering=1) as gaps:
    before = time.monotonic()
    while True:
        time.sleep(0.01)
        now = time.monotonic()
        if now - before > 0.05:
            gaps.write(f"{before:.3f} {now:.3f}\n")
        before = now
