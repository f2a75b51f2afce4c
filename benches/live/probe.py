"""The session's only process: a thread that notes gaps in its own clock, so that a pause is seen from inside.

    probe.py GAPS     appends "START END" (seconds of CLOCK_MONOTONIC) to GAPS for every sleep of 1 ms that took over 4 ms

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
        time.sleep(0.001)
        now = time.monotonic()
        if now - before > 0.004:
            gaps.write(f"{before:.4f} {now:.4f}\n")
        before = now
